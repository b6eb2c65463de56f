"""How much to guess: what guesses have brought, against what they have cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from llmdoctor.decoding.row import RANKS, Row
from llmdoctor.decoding.tree import Tree, best_tree

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_DEPTHS = 4
_PRIOR = 16.0
"""A row counts as if it had so many guesses behind it that held as often as all rows' do."""

_USUAL = (0.35, 0.13, 0.065, 0.045, 0.03, 0.025, 0.02, 0.015)
"""How often candidates are thought to hold until that is known: about as those of SmolLM2-135M's draft do."""

_LEVEL, _GUESS = 0.1, 0.02
"""What a level of guesses and a guess are thought to cost, in passes, until that was measured."""

_FADE = 0.98
"""What is left, a round later, of the weight of a round with guesses."""

_PLAIN_STEP = 0.1
"""Weight of the newest round in the average of those without guesses."""

_OUTLIER = 2.0
"""A round is counted as at most so many times what was expected of it."""

_GUESSED_FIRST = 3
"""Rounds with guesses that are timed before they may be thought not to pay."""

_LONGEST_WAIT = 1000
"""Rounds between two tries of guesses that do not pay, at most."""

_ASIDE_EVERY = 12
"""Rounds after which something else than the best is tried, no guesses or a neighbouring size: costs change with the
rows' lengths, and what is always chosen does not tell what part of its cost is the guesses'."""


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
    def round(self, rows: Sequence[Row], guesses: bool) -> Iterator[Tree]:
        """A round of these rows: gives what to guess, and times what is done with it."""
        if not guesses:
            yield Tree()
            return
        tree = self.choose(rows)
        rows = [row for row in rows if not row.done]
        before = [(row.guesses_tried.copy(), row.guesses_held.copy()) for row in rows]
        start = time.perf_counter()
        yield tree
        seconds = time.perf_counter() - start
        costs = self._costs.setdefault(_bucket(len(rows)), _Costs())
        # The first pass of a shape pays for what is set up once, so it says little.
        if (shape := (len(rows), tree.guesses)) in self._shapes:
            costs.add(tree, seconds)
        self._shapes.add(shape)
        for row, (tried, held) in zip(rows, before, strict=True):
            self._tried += row.guesses_tried - tried
            self._held += row.guesses_held - held

    def choose(self, rows: Sequence[Row]) -> Tree:
        """What to guess in the next round."""
        self._rounds += 1
        alive = [row for row in rows if not row.done]
        usual = self._held / self._tried
        rates = np.mean(
            [(row.guesses_held + _PRIOR * usual) / (row.guesses_tried + _PRIOR) for row in alive], axis=0
        ).tolist()
        costs = self._costs.setdefault(_bucket(len(alive)), _Costs())
        if not costs.plain:
            return Tree()
        sizes = [size for size in _SIZES if size <= self.most]
        found = []
        for depth in range(1, _DEPTHS + 1):
            for place, size in enumerate(sizes):
                tree, tokens = best_tree(rates, size, depth)
                found.append((tokens / costs.seconds(tree), place, depth, tree))
        pays, place, depth, tree = max(found, key=lambda entry: entry[0])
        if costs.guessed >= _GUESSED_FIRST and pays < 1 / costs.seconds(Tree()):
            return tree if costs.try_again() else Tree()
        costs.pays()
        aside, rest = divmod(self._rounds, _ASIDE_EVERY)
        if rest == 0:
            if aside % 2:
                return Tree()
            place += 1 if aside % 4 else -1
            return best_tree(rates, sizes[min(max(place, 0), len(sizes) - 1)], depth)[0]
        return tree


class _Costs:
    """Seconds of a round: without guesses an average, with them a + b · levels + c · guesses, fitted to what was timed.

    The newest rounds weigh most.

    Attributes:
        plain, guessed: rounds without guesses and with some that were timed.
    """

    def __init__(self) -> None:
        self.plain = self.guessed = 0
        self._plain_seconds = 1.0
        self._products: npt.NDArray[np.float64] = np.zeros((3, 3))
        self._sums: npt.NDArray[np.float64] = np.zeros(3)
        self._fit: npt.NDArray[np.floating] | None = None
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
        self.plain += not tree.guesses
        self.guessed += tree.guesses > 0
        if self.plain == 1 and not tree.guesses:
            self._plain_seconds = seconds
            return
        # Other programs' work, a prompt that was read in between: no reason to believe in a new price at once.
        seconds = min(seconds, _OUTLIER * self.seconds(tree))
        if not tree.guesses:
            self._plain_seconds += _PLAIN_STEP * (seconds - self._plain_seconds)
            return
        features = _features(tree)
        self._products = _FADE * self._products + np.outer(features, features)
        self._sums = _FADE * self._sums + seconds * features
        # What was thought before is evidence, too: where rounds are all alike nothing else tells one part from another.
        weights = np.array([1.0, 3.0, 300.0])
        self._fit = np.linalg.solve(self._products + np.diag(weights), self._sums + weights * self._believed())

    def seconds(self, tree: Tree) -> float:
        """Expected of a round with this tree."""
        if not tree.guesses:
            return self._plain_seconds
        fit = self._believed() if self._fit is None else self._fit
        return max(float(_features(tree) @ fit), 1e-9)

    def _believed(self) -> npt.NDArray[np.float64]:
        return self._plain_seconds * np.array([1.0, _LEVEL, _GUESS])


def _features(tree: Tree) -> npt.NDArray[np.float64]:
    return np.array([1.0, len(tree.levels) - 1.0, float(tree.guesses)])


def _bucket(rows: int) -> int:
    return (rows - 1).bit_length()
