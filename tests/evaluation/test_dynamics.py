from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdoctor.evaluation.dynamics import pooled_dynamics, signal_dynamics
from llmdoctor.evaluation.metrics import bootstrap_ci

REWARDS = st.lists(st.floats(-5, 5), min_size=1, max_size=8)


def test_dynamics_by_hand():
    """Chosen [2, 0] sums to 0, 2, 2 and rejected [−1] to 0, −½, −1 at u = 0, ½, 1: gap 0, 2.5, 3. The second pair,
    [−1] against [0], has 0, −½, −1. Scale (3 + 1) / 2 = 2; means (0, 1, 1) / 2."""
    curve = signal_dynamics([[2.0, 0.0], [-1.0]], [[-1.0], [0.0]], bins=2)
    assert curve.positions == (0.0, 0.5, 1.0)
    assert curve.scale == 2.0
    assert curve.mean == (0.0, 0.5, 0.5)
    assert curve.pairs == 2
    assert curve.low == (0.0, -0.25, -0.5)
    assert curve.high == (0.0, 1.25, 1.5)


def test_lines_are_straight_between_tokens():
    """One token of 4 nats against one of 0: the gap is the diagonal."""
    curve = signal_dynamics([[4.0]], [[0.0]], bins=4)
    assert curve.mean == curve.low == curve.high == (0.0, 0.25, 0.5, 0.75, 1.0)


@given(st.lists(st.tuples(REWARDS, REWARDS), min_size=1, max_size=6), st.integers(1, 12), st.floats(0.1, 10))
def test_dynamics_match_a_slow_loop_and_have_no_unit(pairs, bins, unit):
    def prefix(rewards, u):
        whole = math.floor(u * len(rewards) + 1e-12)
        part = u * len(rewards) - whole
        return sum(rewards[:whole]) + (part * rewards[whole] if part > 1e-9 else 0.0)

    gaps = [[prefix(one, k / bins) - prefix(two, k / bins) for k in range(bins + 1)] for one, two in pairs]
    scale = sum(abs(gap[-1]) for gap in gaps) / len(gaps)
    chosen, rejected = [one for one, _ in pairs], [two for _, two in pairs]
    if scale < 1e-3:
        return
    curve = signal_dynamics(chosen, rejected, bins, resamples=20)
    assert curve.scale == pytest.approx(scale)
    assert curve.mean == pytest.approx((np.mean(gaps, axis=0) / scale).tolist(), abs=1e-6 / scale)
    assert len(curve.mean) == len(curve.low) == len(curve.high) == bins + 1
    assert all(low <= high for low, high in zip(curve.low, curve.high, strict=True))
    scaled = signal_dynamics(
        [[unit * value for value in one] for one in chosen], [[unit * value for value in two] for two in rejected], bins
    )
    assert scaled.mean == pytest.approx(curve.mean, abs=1e-6)


def test_the_band_is_the_bootstrap_of_each_position():
    rng = np.random.default_rng(4)
    chosen, rejected = rng.normal(0.2, 1, (30, 10)), rng.normal(0, 1, (30, 10))
    curve = signal_dynamics(list(chosen), list(rejected), bins=10, resamples=500, seed=9)
    half = (chosen - rejected)[:, :5].sum(axis=1) / curve.scale
    expected = bootstrap_ci(half, resamples=500, seed=9)
    assert (curve.mean[5], curve.low[5], curve.high[5]) == pytest.approx(expected)


def test_a_guide_that_is_always_right_ends_at_one_and_the_opposite_at_minus_one():
    chosen, rejected = [[1.0, 2.0], [0.5]], [[-1.0], [0.0, -3.0, 0.0]]
    assert signal_dynamics(chosen, rejected).mean[-1] == pytest.approx(1)
    assert signal_dynamics(rejected, chosen).mean[-1] == pytest.approx(-1)


def test_several_trainings_each_have_their_own_scale_and_a_pair_is_drawn_with_all_of_them():
    """The second training says ten times what the first says, so it adds nothing; the third has it the wrong way."""
    rng = np.random.default_rng(5)
    chosen, rejected = rng.normal(0.3, 1, (20, 4)), rng.normal(0, 1, (20, 6))
    one = signal_dynamics(list(chosen), list(rejected), seed=2)
    louder = (list(10 * chosen), list(10 * rejected))
    two = pooled_dynamics([(list(chosen), list(rejected)), louder], seed=2)
    assert (two.mean, two.low, two.high) == (
        pytest.approx(one.mean), pytest.approx(one.low), pytest.approx(one.high)
    )  # fmt: skip
    assert two.scale == pytest.approx(5.5 * one.scale)
    assert (one.trainings, two.trainings, two.pairs) == (1, 2, 20)
    opposed = pooled_dynamics([(list(chosen), list(rejected)), (list(rejected), list(chosen))])
    assert opposed.mean == opposed.low == opposed.high == pytest.approx([0.0] * 21)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: signal_dynamics([], []), "got 0 and 0"),
        (lambda: signal_dynamics([[1.0]], []), "got 1 and 0"),
        (lambda: signal_dynamics([[1.0]], [[]]), "rejected response 0 must be a non-empty"),
        (lambda: signal_dynamics([[math.nan]], [[1.0]]), "chosen response 0 contains NaN"),
        (lambda: signal_dynamics([[1.0]], [[1.0]]), "final gap is 0.0: there is no scale"),
        (lambda: signal_dynamics([[math.inf]], [[1.0]]), "final gap is inf: there is no scale"),
        (lambda: signal_dynamics([[1.0]], [[0.0]], bins=0), "bins must be at least 1, got 0"),
        (lambda: pooled_dynamics([]), "at least one training"),
        (lambda: pooled_dynamics([([[1.0]], [[0.0]]), ([[1.0], [1.0]], [[0.0], [0.0]])]), r"got \[1, 2\]"),
    ],
)
def test_what_has_no_dynamics_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
