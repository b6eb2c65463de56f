"""How much to guess: what guesses have brought, against what they have cost."""

from __future__ import annotations

import statistics
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

_USUAL = (0.42, 0.14, 0.065, 0.045, 0.03, 0.02, 0.02, 0.015)
"""How often candidates are thought to hold until that is known: about as those of SmolLM2-135M's draft do."""

_BELIEVED = np.array([1.0, 0.02, 0.06, 0.03])
"""What a round, guessing at all, a level of guesses and a guess are thought to cost, in passes, until that is known."""

_UNSURE = np.array([0.1, 0.05, 0.1, 0.08])
"""Standard deviations of that."""

_DRIFT = np.array([0.01, 0.002, 0.002, 0.002])
"""How far each price moves from a round to the next."""

_NOISE = 0.06
"""How far a round's time is from its price, relative to it."""

_LEAST = 0.05
"""Passes that a round is thought to cost at least."""

_FIRST = ((1, 1), (4, 1), (4, 2), (1, 1))
"""Sizes and depths of the first trees that are timed, before any may be thought not to pay: so different that they tell
what a guess costs from what a level does."""

_FIRST_PLAIN = 3
"""Rounds without guesses before any are made; the median of their times is the unit of all prices."""

_HOPELESS = 0.8
"""Tokens a second, relative to no guesses, below which the rest of the first trees is left out."""

_CLEAR = 0.2
"""What guesses gain where no doubt is left that they do; the less it is, the more often none are tried."""

_OUTLIER = 1.5
"""A round is counted as at most so many times what was expected of it."""

_PATIENCE = 40.0
"""Rounds without guesses before some are tried that seem to lose a whole round; where they lose less, fewer."""

_LONGEST_WAIT = 1000
"""Rounds between two tries of guesses that do not pay, at most."""

_ASIDE_EVERY = 24
"""Rounds after which no guesses, or another number of them, are tried in place of what is best: costs change with the
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
        self._guessed = self._plain = 0
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
        alive = [row for row in rows if not row.done]
        usual = self._held / self._tried
        rates = np.mean(
            [(row.guesses_held + _PRIOR * usual) / (row.guesses_tried + _PRIOR) for row in alive], axis=0
        ).tolist()
        costs = self._of(len(alive))
        if not costs.begun:
            return Tree()
        branchings = [Branching(rates, self.most, depth) for depth in range(1, _DEPTHS + 1)]
        # Tokens a second of each tree of one node and more, by depth.
        pays = [np.array(branching.tokens[1:]) / costs.all_seconds(branching.levels[1:]) for branching in branchings]
        best = max(range(_DEPTHS), key=lambda place: float(pays[place].max()))
        size = int(pays[best].argmax()) + 1
        gain = float(pays[best].max()) * costs.seconds(Tree())
        if costs.guessed < len(_FIRST) and (not costs.guessed or gain > _HOPELESS):
            size, depth = _FIRST[costs.guessed]
            return branchings[depth - 1].tree(min(size, self.most))
        if gain < 1:
            if not costs.try_again(1 / gain - 1):
                return Tree()
            # Trees of one size would not tell a guess's price from a level's.
            return branchings[best].tree(min(size * (1 if costs.tries % 2 else _ASIDE), self.most))
        costs.pays()
        self._guessed += 1
        if self._guessed - self._plain >= _ASIDE_EVERY * min(1.0, (gain - 1) / _CLEAR):
            self._plain = self._guessed
            return Tree()
        # Half way between rounds without guesses, or those would always come first.
        aside, rest = divmod(self._guessed + _ASIDE_EVERY // 2, _ASIDE_EVERY)
        if rest == 0:
            size = size * _ASIDE if aside % 2 else max(1, size // _ASIDE)
        return branchings[best].tree(min(size, self.most))


class _Costs:
    """Seconds of a round, a + f · whether it guesses + b · levels + c · guesses, by a Kalman filter on what was timed.

    A price that is not tried is kept, and known less well with every round. Everything is in units of about a pass.

    Args:
        like: costs that these are thought to be like, until they are known.

    Attributes:
        guessed: rounds with guesses that were timed.
        tries: of guesses that did not seem to pay.
    """

    def __init__(self, like: _Costs | None = None) -> None:
        self.guessed = self.tries = 0
        self._first: list[float] = []
        self._unit = 1.0
        self._prices: npt.NDArray[np.float64] = _BELIEVED if like is None else like._prices / like._prices[0]
        self._covariance: npt.NDArray[np.float64] = np.diag(_UNSURE**2)
        self._waited, self._patience = 0, _PATIENCE

    @property
    def begun(self) -> bool:
        """Whether enough rounds without guesses were timed for any to be made."""
        return len(self._first) == _FIRST_PLAIN

    def pays(self) -> None:
        """Guesses pay: should they stop to, they are tried again soon."""
        self._waited, self._patience = 0, _PATIENCE

    def try_again(self, loss: float) -> bool:
        """Whether to make guesses although they seem to cost so much of a round.

        The more it is, the less often, and less and less often as long as they do not pay.
        """
        self._waited += 1
        if self._waited < min(self._patience * loss, _LONGEST_WAIT):
            return False
        self._waited, self._patience, self.tries = 0, 2 * self._patience, self.tries + 1
        return True

    def add(self, tree: Tree, seconds: float) -> None:
        """A round with this tree took so long."""
        if len(self._first) < _FIRST_PLAIN and not tree.guesses:
            self._first.append(seconds)
            self._unit = statistics.median(self._first)
            return
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
