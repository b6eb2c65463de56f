"""How much to guess: what guesses have brought, against what they have cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from llmdoctor.decoding.row import RANKS, Row
from llmdoctor.decoding.tree import Branching, Tree

_DEPTHS = 4
_PRIOR = 16.0
"""A row counts as if it had so many guesses behind it that held as often as all rows' do."""

_USUAL = (0.35, 0.13, 0.065, 0.045, 0.03, 0.025, 0.02, 0.015)
"""How often candidates are thought to hold until that is known: about as those of SmolLM2-135M's draft do."""

_BELIEVED = np.array([1.0, 0.02, 0.06, 0.03])
"""What a round, guessing at all, a level of guesses and a guess are thought to cost, in passes, until that is known."""

_UNSURE = np.array([0.1, 0.05, 0.1, 0.08])
"""Standard deviations of that."""

_DRIFT = np.array([0.004, 0.0005, 0.0005, 0.0005])
"""How far each price moves from a round to the next."""

_NOISE = 0.06
"""How far a round's time is from its price, relative to it."""

_LEAST = 0.05
"""Passes that a round is thought to cost at least."""

_FIRST = ((1, 1), (4, 1), (4, 2), (1, 1))
"""Sizes and depths of the first trees that are timed, before any may be thought not to pay: so different that they tell
what a guess costs from what a level does."""

_OUTLIER = 2.0
"""A round is counted as at most so many times what was expected of it."""

_LONGEST_WAIT = 1000
"""Rounds between two tries of guesses that do not pay, at most."""

_ASIDE_EVERY = 12
"""Rounds after which something else than the best is tried, no guesses or another number of them: costs change with the
rows' lengths, and what is always chosen does not tell what part of its cost is the guesses'."""

_ASIDE = 3
"""How many times as many guesses that is, or as few."""


class Pace:
    """Chooses the guesses that give most tokens a second, over the rows that are decoded together.

    It changes nothing about what is decoded, so it may go by the clock.

    Args:
        most: guesses in a round.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._tried = np.full(RANKS, _PRIOR)
        self._held = _PRIOR * np.array(_USUAL)
        self._rounds = 0
        self._costs: dict[int, _Costs] = {}
        self._shapes: set[tuple[int, int]] = set()

    @contextmanager
    def round(self, rows: Sequence[Row], guesses: bool, ready: Callable[[], None] = lambda: None) -> Iterator[Tree]:
        """A round of these rows: gives what to guess, and times what is done with it.

        `ready` is called before a round with guesses is timed: it does what waited for one, which is not its price.
        """
        if not guesses:
            yield Tree()
            return
        tree = self.choose(rows)
        if tree.guesses:
            ready()
        rows = [row for row in rows if not row.done]
        before = [(row.guesses_tried.copy(), row.guesses_held.copy()) for row in rows]
        start = time.perf_counter()
        yield tree
        seconds = time.perf_counter() - start
        costs = self._of(len(rows))
        # The first pass of a shape pays for what is set up once, so it says little.
        if (shape := (len(rows), tree.guesses)) in self._shapes:
            costs.add(tree, seconds)
        self._shapes.add(shape)
        for row, (tried, held) in zip(rows, before, strict=True):
            self._tried += row.guesses_tried - tried
            self._held += row.guesses_held - held

    def _of(self, rows: int) -> _Costs:
        """The costs for so many rows; at first, in passes, as those for about as many."""
        bucket = _bucket(rows)
        if bucket not in self._costs:
            nearest = min(self._costs, key=lambda known: abs(known - bucket), default=None)
            self._costs[bucket] = _Costs(None if nearest is None else self._costs[nearest])
        return self._costs[bucket]

    def choose(self, rows: Sequence[Row]) -> Tree:
        """What to guess in the next round."""
        self._rounds += 1
        alive = [row for row in rows if not row.done]
        usual = self._held / self._tried
        rates = np.mean(
            [(row.guesses_held + _PRIOR * usual) / (row.guesses_tried + _PRIOR) for row in alive], axis=0
        ).tolist()
        costs = self._of(len(alive))
        if not costs.plain:
            return Tree()
        if costs.guessed < len(_FIRST):
            size, depth = _FIRST[costs.guessed]
            return Branching(rates, min(size, self.most), depth).tree(size)
        branchings = [Branching(rates, self.most, depth) for depth in range(1, _DEPTHS + 1)]
        # Tokens a second of each tree of one node and more, by depth.
        pays = [np.array(branching.tokens[1:]) / costs.all_seconds(branching.levels[1:]) for branching in branchings]
        best = max(range(_DEPTHS), key=lambda place: float(pays[place].max()))
        size = int(pays[best].argmax()) + 1
        if pays[best].max() < 1 / costs.seconds(Tree()):
            return branchings[best].tree(size) if costs.try_again() else Tree()
        costs.pays()
        aside, rest = divmod(self._rounds, _ASIDE_EVERY)
        if rest == 0:
            if aside % 2:
                return Tree()
            size = size * _ASIDE if aside % 4 else max(1, size // _ASIDE)
        return branchings[best].tree(min(size, self.most))


class _Costs:
    """Seconds of a round, a + f · whether it guesses + b · levels + c · guesses, by a Kalman filter on what was timed.

    A price that is not tried is kept, and known less well with every round. Everything is in units of about a pass.

    Args:
        like: costs that these are thought to be like, until they are known.

    Attributes:
        plain, guessed: rounds without guesses and with some that were timed.
    """

    def __init__(self, like: _Costs | None = None) -> None:
        self.plain = self.guessed = 0
        self._unit = 1.0
        self._prices: npt.NDArray[np.float64] = _BELIEVED if like is None else like._prices / like._prices[0]
        self._covariance: npt.NDArray[np.float64] = np.diag(_UNSURE**2)
        self._wait = self._left = _ASIDE_EVERY

    def pays(self) -> None:
        """Guesses pay: should they stop to, they are tried again soon."""
        self._wait = self._left = _ASIDE_EVERY

    def try_again(self) -> bool:
        """Whether to make guesses although they do not seem to pay: less and less often, as long as they do not."""
        self._left -= 1
        if self._left:
            return False
        self._wait = self._left = min(2 * self._wait, _LONGEST_WAIT)
        return True

    def add(self, tree: Tree, seconds: float) -> None:
        """A round with this tree took so long."""
        if not self.plain and not tree.guesses:
            self._unit = seconds
        self.plain += not tree.guesses
        self.guessed += tree.guesses > 0
        x, expected = _features(tree), self._passes(tree)
        covariance = self._covariance + np.diag(_DRIFT**2)
        # Nothing is known less well than before anything was timed.
        excess = np.minimum(1.0, _UNSURE / np.sqrt(np.diag(covariance)))
        covariance *= np.outer(excess, excess)
        # Other programs' work, a prompt that was read in between: no reason to believe in a new price at once.
        surprise = min(seconds / self._unit, _OUTLIER * expected) - x @ self._prices
        gain = covariance @ x / (x @ covariance @ x + (_NOISE * expected) ** 2)
        self._prices = self._prices + surprise * gain
        self._covariance = covariance - np.outer(gain, x @ covariance)

    def seconds(self, tree: Tree) -> float:
        """Expected of a round with this tree."""
        return self._unit * self._passes(tree)

    def all_seconds(self, levels: Sequence[int]) -> npt.NDArray[np.float64]:
        """Expected of rounds with 1, 2, … guesses on so many levels."""
        start, guessing, level, guess = self._prices
        count = np.arange(1, len(levels) + 1)
        return self._unit * np.maximum(start + guessing + level * np.array(levels) + guess * count, _LEAST)

    def _passes(self, tree: Tree) -> float:
        return max(float(_features(tree) @ self._prices), _LEAST)


def _features(tree: Tree) -> npt.NDArray[np.float64]:
    return np.array([1.0, tree.guesses > 0, len(tree.levels) - 1.0, float(tree.guesses)])


def _bucket(rows: int) -> int:
    return (rows - 1).bit_length()
