"""Preference pairs that are learned from together: what is refused of them, and how one that is refused is named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmdoctor.data.preferences import PreferencePair
from llmdoctor.errors import UserError


def checked(pairs: Iterable[PreferencePair]) -> Iterator[PreferencePair]:
    """The pairs as they come.

    Raises:
        UserError: what is no pair, or pairs with labels for several dimensions, told at the first of the second one.
    """
    dimension = ""
    for pair in pairs:
        if not isinstance(pair, PreferencePair):
            raise UserError(f"pairs must be PreferencePairs, as load_preferences gives them, got {pair!r:.80}")
        if pair.dimension and dimension and pair.dimension != dimension:
            found = " and ".join(sorted((dimension, pair.dimension)))
            raise UserError(
                f"the pairs have labels for several dimensions ({found}), which may prefer opposite answers, and one "
                "lesson is for one of them: choose it with --dimension NAME (`dimension` of load_preferences)"
            )
        dimension = dimension or pair.dimension
        yield pair


def named(number: int, pair: PreferencePair) -> str:
    """The pair as errors name it: its number, counted from 1, and the beginning of its last turn."""
    begin = " ".join(str(pair.prompt[-1]["content"]).split())[:60] if pair.prompt else ""
    return f"pair {number} ({begin!r} …)"
