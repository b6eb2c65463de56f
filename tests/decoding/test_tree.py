"""The shape of guesses, and how much is guessed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from llmdoctor.decoding.pace import Pace, _Costs
from llmdoctor.decoding.row import RANKS
from llmdoctor.decoding.tree import Branching, Tree


def worth(tree: Tree, rates: Sequence[float]) -> float:
    """Expected tokens of a pass: one, and one more for every guess whose whole branch is drawn."""
    chances = [1.0]
    for parent, rank in zip(tree.parents, tree.ranks, strict=True):
        chances.append(chances[parent] * rates[rank])
    return sum(chances)


def well_formed(tree: Tree) -> None:
    depths = [0]
    for parent in tree.parents:
        depths.append(depths[parent] + 1)
    assert depths == sorted(depths), "level by level"
    for node, children in enumerate(tree.children):
        assert [tree.parents[child - 1] for child in children] == [node] * len(children)
        assert [tree.ranks[child - 1] for child in children] == list(range(len(children)))
    assert list(itertools.chain(*tree.levels)) == list(range(tree.guesses + 1))
    # Children stand in the order of their parents: the ward appends them so.
    assert list(tree.parents) == sorted(tree.parents)


def brute_force(rates: Sequence[float], guesses: int, depth: int) -> float:
    """The best of all trees whose children are the first candidates: as lists of how many children each node has."""

    def grow(open_nodes: tuple[tuple[float, int], ...], left: int) -> float:
        if not open_nodes or not left:
            return 0.0
        (chance, level), *rest = open_nodes
        best = 0.0
        for count in range(min(left, len(rates)) + 1 if level < depth else 1):
            children = [(chance * rates[rank], level + 1) for rank in range(count)]
            gained = sum(value for value, _ in children)
            best = max(best, gained + grow((*rest, *children), left - count))
        return best

    return 1.0 + grow(((1.0, 0),), guesses)


@pytest.mark.parametrize("seed", range(6))
def test_no_tree_of_that_size_is_better(seed: int) -> None:
    draw = random.Random(seed)
    parts = sorted((draw.random() for _ in range(3)), reverse=True)
    rates = [0.9 * part / sum(parts) for part in parts]
    for guesses, depth in itertools.product(range(7), range(1, 4)):
        branching = Branching(rates, guesses, depth)
        tree, tokens = branching.tree(guesses), branching.tokens[-1]
        assert branching.levels[-1] == len(tree.levels) - 1
        well_formed(tree)
        assert len(tree.levels) - 1 <= depth
        assert tokens == pytest.approx(worth(tree, rates))
        assert tokens == pytest.approx(brute_force(rates, guesses, depth))


def test_large_trees_are_well_formed() -> None:
    tree = Branching([0.4, 0.2, 0.1, 0.05, 0.0], 32, 4).tree(32)
    well_formed(tree)
    assert tree.guesses == 32


class Person:
    """A row, as far as a pace looks at it."""

    def __init__(self) -> None:
        self.done = False
        self.guesses_tried = np.zeros(RANKS)
        self.guesses_held = np.zeros(RANKS)


def lives(
    pace: Pace, rates: Sequence[float], level: float, guess: float, rounds: int = 300, longer: Mapping[int, float] = {}
) -> list[Tree]:
    """What a pace chooses where guesses hold with these rates and cost so many passes; some rounds take longer."""
    rows: list[Any] = [Person()]
    draw = random.Random(0)
    chosen = []
    for number in range(rounds):
        tree = pace.choose(rows)
        chosen.append(tree)
        node = 0
        while tree.children[node]:
            children = tree.children[node]
            rows[0].guesses_tried[: len(children)] += 1
            pace._tried[: len(children)] += 1
            pick = draw.random()
            rank = next((r for r in range(len(children)) if pick < sum(rates[: r + 1])), None)
            if rank is None:
                break
            rows[0].guesses_held[rank] += 1
            pace._held[rank] += 1
            node = children[rank]
        seconds = 0.02 * (1 + level * (len(tree.levels) - 1) + guess * tree.guesses)
        pace._costs[0].add(tree, seconds * draw.uniform(0.95, 1.05) * longer.get(number, 1.0))
    return chosen


def test_guesses_that_do_not_pay_are_left_off() -> None:
    late = lives(Pace(16), [0.02] + [0.0] * (RANKS - 1), level=0.3, guess=0.1)[100:]
    assert sum(tree.guesses == 0 for tree in late) > 0.8 * len(late)


def test_guesses_that_pay_are_made() -> None:
    """Chances of 0.8 and levels that cost next to nothing: chains; many candidates that are nearly free: wide trees."""
    chains = lives(Pace(16), [0.8, 0.05] + [0.0] * (RANKS - 2), level=0.02, guess=0.02)[100:]
    assert np.mean([len(tree.levels) - 1 for tree in chains]) > 2.5
    wide = lives(Pace(16), [0.2] * 4 + [0.0] * (RANKS - 4), level=0.3, guess=0.001)[100:]
    assert np.mean([len(tree.children[0]) for tree in wide]) > 3


def test_now_and_then_something_else_is_tried() -> None:
    """However well a number of guesses does: no guesses, more of them and fewer."""
    late = lives(Pace(32), USUAL, level=0.3, guess=0.01)[100:]
    sizes = [tree.guesses for tree in late]
    usual = max(set(sizes), key=sizes.count)
    assert sizes.count(0) >= 4
    assert any(size > 1.5 * usual for size in sizes)
    assert any(0 < size < usual / 1.5 for size in sizes)


def test_no_more_than_allowed() -> None:
    assert max(tree.guesses for tree in lives(Pace(3), [0.5, 0.3] + [0.0] * (RANKS - 2), 0.01, 0.001)) == 3


USUAL = [0.4, 0.12, 0.06, 0.045, 0.03, 0.025, 0.02, 0.015]


def share(chosen: Sequence[Tree], level: float, guess: float) -> float:
    """Tokens a second, relative to those of the best tree of all, had it been known."""

    def cost(tree: Tree) -> float:
        return 1 + level * (len(tree.levels) - 1) + guess * tree.guesses

    every = [Branching(USUAL, 32, depth).tree(size) for size in range(33) for depth in range(1, 5)]
    best = max(worth(tree, USUAL) / cost(tree) for tree in every)
    return sum(worth(tree, USUAL) for tree in chosen) / sum(map(cost, chosen)) / best


@pytest.mark.parametrize(
    ("level", "guess", "least"),
    [(0.02, 0.13, 0.95), (0.05, 0.2, 0.95), (0.1, 0.45, 0.85), (0.1, 0.02, 0.85), (0.08, 0.003, 0.8)],
    ids=["cores, few rows", "cores, more rows", "cores, many rows", "one row", "a GPU"],
)
def test_most_of_what_could_be_had_is_had_from_the_start(level: float, guess: float, least: float) -> None:
    """Within 64 rounds, the usual length of an answer."""
    assert share(lives(Pace(32), USUAL, level, guess, rounds=64), level, guess) > least


@pytest.mark.parametrize(("level", "guess", "least"), [(0.65, 0.15, 0.93), (0.1, 0.02, 0.88)], ids=["lost", "won"])
@pytest.mark.parametrize("disturbed", [0, 4], ids=["a round without guesses", "a round with some"])
def test_one_round_that_was_disturbed_decides_nothing(level: float, guess: float, least: float, disturbed: int) -> None:
    """What is timed first weighs most. (Believed, the first made no guesses look dear, the second guesses.)"""
    chosen = lives(Pace(16), USUAL, level, guess, rounds=150, longer={disturbed: 4.0})
    assert share(chosen, level, guess) > least


def test_guesses_that_nearly_pay_are_tried_more_often_than_those_that_cost_much() -> None:
    near, far = (sum(costs.try_again(loss) for _ in range(300)) for costs, loss in ((_Costs(), 0.03), (_Costs(), 0.5)))
    assert near > 1.5 * far > 0
    assert near < 20, "less and less often, as long as they do not pay"
