from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdoctor.evaluation.pareto import hypervolume, pareto_front


def clouds(low, high):
    return st.integers(2, 4).flatmap(
        lambda d: st.lists(st.lists(st.integers(low, high), min_size=d, max_size=d), min_size=1, max_size=7)
    )


def slow_front(points):
    def dominates(a, b):
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    return [
        row
        for row, point in enumerate(points)
        if point not in points[:row] and not any(dominates(other, point) for other in points)
    ]


def slow_volume(points, reference):
    """Inclusion-exclusion over the boxes between reference and point."""
    boxes = np.maximum(np.array(points, dtype=float) - reference, 0)
    return sum(
        (-1) ** (size + 1) * np.prod(np.min([boxes[row] for row in chosen], axis=0))
        for size in range(1, len(boxes) + 1)
        for chosen in combinations(range(len(boxes)), size)
    )


def test_front_by_hand():
    """(2, 2) is beaten by (2, 3), (1, 1) by all; the second (3, 1) equals the first."""
    assert pareto_front([(3, 1), (2, 2), (1, 1), (2, 3), (3, 1), (0, 4)]) == [5, 3, 0]


def test_hypervolume_by_hand():
    """Boxes above (0, 0): 3×1, 2×3, 1×4. Staircase: columns of height 4, 3, 1: 8. Above (1, 0): 2×1 ∪ 1×3 = 4."""
    points = [(3, 1), (2, 3), (1, 4)]
    assert hypervolume(points, (0, 0)) == 8
    assert hypervolume(points, (1, 0)) == 4
    assert hypervolume(points, (-1, -1)) == 4 * 2 + 3 * 2 + 2 * 1


def test_hypervolume_in_three_dimensions_by_hand():
    """Boxes 2×1×1 and 1×1×3 share 1×1×1: 2 + 3 − 1."""
    assert hypervolume([(2, 1, 1), (1, 1, 3)], (0, 0, 0)) == 4


def test_points_that_do_not_exceed_the_reference_add_nothing():
    assert hypervolume([(5, -1), (0, 5)], (0, 0)) == 0
    assert hypervolume([(5, -1), (1, 1)], (0, 0)) == 1


@given(clouds(-3, 3))
@settings(deadline=None)
def test_front_is_what_brute_force_finds(points):
    front = pareto_front(points)
    assert sorted(front) == slow_front(points)
    firsts = [points[row][0] for row in front]
    assert firsts == sorted(firsts)


@given(clouds(-1, 4))
@settings(deadline=None)
def test_hypervolume_is_inclusion_exclusion_and_the_fronts_own(points):
    reference = [0.0] * len(points[0])
    volume = hypervolume(points, reference)
    assert volume == pytest.approx(slow_volume(points, reference))
    assert hypervolume([points[row] for row in pareto_front(points)], reference) == pytest.approx(volume)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pareto_front([]), "at least two objectives, got shape"),
        (lambda: pareto_front([[1.0]]), r"at least two objectives, got shape \(1, 1\)"),
        (lambda: pareto_front([[1.0, math.nan]]), "points must be finite"),
        (lambda: hypervolume([[1.0, math.inf]], [0, 0]), "points must be finite"),
        (lambda: hypervolume([[1.0, 1.0]], [0.0]), "reference must be 2 finite numbers"),
        (lambda: hypervolume([[1.0, 1.0]], [0.0, math.nan]), "reference must be 2 finite numbers"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_callers_array_is_left_alone():
    points = np.array([[1.0, 2.0], [2.0, 1.0]])
    hypervolume(points, np.zeros(2))
    pareto_front(points)
    assert points.tolist() == [[1.0, 2.0], [2.0, 1.0]]
