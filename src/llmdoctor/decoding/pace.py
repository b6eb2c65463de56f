"""How many tokens to guess: what guesses have brought, against what they have cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llmdoctor.decoding.row import Row

_FIRST = 3
_COST = 0.15
"""Of a pass; what a guess is thought to cost until that was measured."""

_PRIOR = 8.0
"""A row counts as if it had so many guesses behind it that held as often as all rows' do."""

_FRESH = 0.2
_ASIDE_EVERY = 24
"""Rounds after which a neighbouring number is tried, because what guesses cost changes with the rows' lengths."""


class Pace:
    """Chooses the number of guesses that gives most tokens a second, over the rows that are decoded together.

    It does not matter for what is decoded, so it may go by the clock.

    Args:
        most: guesses in a round.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._tried = self._held = 0
        self._rounds = 0
        # By about how many rows there are and how many guesses are made: passes that were timed, and seconds of one.
        self._timed: dict[tuple[int, int], tuple[int, float]] = {}

    @contextmanager
    def round(self, rows: Sequence[Row], guesses: bool) -> Iterator[int]:
        """A round of these rows: gives the number of guesses to make, and times what is done with it."""
        if not guesses:
            yield 0
            return
        count = self.choose(rows)
        size = len(rows)
        before = [(row.guesses_reached, row.completion.guesses_held) for row in rows]
        start = time.perf_counter()
        yield count
        self.book(size, count, time.perf_counter() - start)
        for row, (reached, held) in zip(rows, before, strict=False):
            self._tried += row.guesses_reached - reached
            self._held += row.completion.guesses_held - held

    def choose(self, rows: Sequence[Row]) -> int:
        """The number of guesses for the next round."""
        self._rounds += 1
        size = _bucket(len(rows))
        known = {count: seconds for (bucket, count), (passes, seconds) in self._timed.items()
                 if bucket == size and passes}  # fmt: skip
        if not known:
            return min(_FIRST, self.most)
        usual = (self._held + _PRIOR / 2) / (self._tried + _PRIOR)
        rates = [
            (row.completion.guesses_held + _PRIOR * usual) / (row.guesses_reached + _PRIOR)
            for row in rows
            if not row.done
        ]
        tokens = [sum(_expected(rate, count) for rate in rates) for count in range(self.most + 1)]
        best = max(range(self.most + 1), key=lambda count: tokens[count] / _seconds(known, count))
        if self._rounds % _ASIDE_EVERY == 0:
            best += 1 if self._rounds % (2 * _ASIDE_EVERY) else -1
        return min(max(best, 0), self.most)

    def book(self, rows: int, count: int, seconds: float) -> None:
        """A round of `rows` rows with `count` guesses took so long."""
        key = (_bucket(rows), count)
        if key not in self._timed:
            # The first pass of a shape pays for what is set up once, so it says little.
            self._timed[key] = 0, seconds
            return
        passes, average = self._timed[key]
        self._timed[key] = passes + 1, seconds if passes == 0 else average + _FRESH * (seconds - average)


def _bucket(rows: int) -> int:
    return (rows - 1).bit_length()


def _expected(rate: float, count: int) -> float:
    """Tokens of a pass with `count` guesses, each of which holds with `rate` if those before it do."""
    return sum(rate**place for place in range(count + 1))


def _seconds(known: dict[int, float], count: int) -> float:
    """Of a round with `count` guesses, from the rounds that were timed."""
    if count in known:
        return known[count]
    below = max((other for other in known if other < count), default=None)
    above = min((other for other in known if other > count), default=None)
    if below is not None and above is not None:
        share = (count - below) / (above - below)
        return known[below] + share * (known[above] - known[below])
    nearest = below if below is not None else above
    assert nearest is not None
    return known[nearest] * (1 + _COST * count) / (1 + _COST * nearest)
