"""Scorers: named functions from texts to numbers, behind one registry.

Every built-in scorer works offline, is deterministic, and returns values from −1 (worst) to 1 (best). A user's own
scorer needs no registration: `package.module:function` names any function from a sequence of texts to their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llmdoctor.errors import UserError, first_line
from llmdoctor.evaluation.metrics import words
from llmdoctor.evaluation.own_code import own_function

ScoreFunction = Callable[[Sequence[str]], Sequence[float]]

_FLESCH_CENTRE = 50.0
_FLESCH_WIDTH = 40.0
_BREVITY_HALF_WORDS = 50


@dataclass(frozen=True, slots=True)
class Scorer:
    """A scoring function with what a reader must know to read its numbers.

    `higher_is` finishes the sentence "higher is …"; `scale` is the range of values, for display.
    """

    name: str
    function: ScoreFunction
    higher_is: str
    scale: str = "−1…1"

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Score each text. Raises UserError unless the function gives one finite number a text."""
        try:
            scores = [float(score) for score in self.function(texts)]
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"scorer {self.name!r} failed on {len(texts)} texts ({type(error).__name__}: {first_line(error)}); "
                "--debug shows where"
            ) from error
        if len(scores) != len(texts):
            raise UserError(f"scorer {self.name!r} returned {len(scores)} scores for {len(texts)} texts")
        bad = next((index for index, score in enumerate(scores) if not math.isfinite(score)), None)
        if bad is not None:
            raise UserError(f"scorer {self.name!r} returned {scores[bad]} for text {bad + 1}: {texts[bad][:80]!r}")
        return scores


_REGISTRY: dict[str, Scorer] = {}


def register_scorer(name: str, *, higher_is: str, scale: str = "−1…1") -> Callable[[ScoreFunction], ScoreFunction]:
    """Decorate a function from texts to scores to make it known as `name`; a taken name raises ValueError."""

    def register(function: ScoreFunction) -> ScoreFunction:
        if name in _REGISTRY:
            raise ValueError(f"a scorer named {name!r} exists already")
        if not name or ":" in name:
            raise ValueError(f"a scorer's name must be non-empty and without ':', got {name!r}")
        _REGISTRY[name] = Scorer(name, function, higher_is, scale)
        return function

    return register


def get_scorer(name: str) -> Scorer:
    """The scorer called `name`, or the user's own named as `package.module:function`."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    if ":" in name:
        return _imported_scorer(name)
    known = ", ".join(sorted(_REGISTRY))
    raise UserError(f"unknown scorer {name!r}; known: {known}; or your own as package.module:function")


def _imported_scorer(path: str) -> Scorer:
    found = own_function(path, "scorer")
    return found if isinstance(found, Scorer) else Scorer(path, found, higher_is="better")


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@register_scorer("vader", higher_is="more positive in sentiment")
def vader(texts: Sequence[str]) -> list[float]:
    """VADER's compound sentiment; 0 for a text with no word of its lexicon."""
    return [float(_vader().polarity_scores(text)["compound"]) for text in texts]


@cache
def _textstat() -> Any:
    from textstat.textstat import textstatistics

    counter = textstatistics()
    # Under "en_US" textstat downloads a pronouncing dictionary on first use, and fails without a network. The
    # hyphenated tag keeps the English formula but counts syllables with the hyphenation patterns that pyphen ships.
    counter.set_lang("en-US")
    return counter


@register_scorer("flesch", higher_is="easier to read (English)")
def flesch(texts: Sequence[str]) -> list[float]:
    """Flesch reading ease F as tanh((F − 50) / 40): college prose (30) −0.46, plain English (65) 0.36, easy (90) 0.76.

    The map is monotone, so it ranks texts as F does, and bounds the outliers that very short texts give. A text
    without a letter scores −1.
    """
    return [
        math.tanh((_textstat().flesch_reading_ease(text) - _FLESCH_CENTRE) / _FLESCH_WIDTH)
        if any(character.isalpha() for character in text)
        else -1.0
        for text in texts
    ]


@register_scorer("brevity", higher_is="shorter")
def brevity(texts: Sequence[str]) -> list[float]:
    """2^(1 − w/50) − 1 for w words, as `metrics.words` counts them: 0 at 50 words, −0.5 at 100, towards −1.

    A text without words would win with 1, so it scores −1: saying nothing is not being brief.
    """
    lengths = [len(words(text)) for text in texts]
    return [2 ** (1 - length / _BREVITY_HALF_WORDS) - 1 if length else -1.0 for length in lengths]


@cache
def _profanity_filter() -> Any:
    from glin_profanity import Filter

    return Filter()


@register_scorer("nontoxic", higher_is="fewer vulgar words and slurs (English)")
def nontoxic(texts: Sequence[str]) -> list[float]:
    """2^(1 − h) − 1 for h flagged places: 1 for none, 0 for one, −0.5 for two, towards −1.

    A word list that sees through disguises (`sh1t`), not a judge: it misses hostility in polite words and flags a few
    harmless uses.
    """
    return [2.0 ** (1 - _flagged_places(text)) - 1 for text in texts]


def _flagged_places(text: str) -> int:
    # One place may be reported both as written and with its disguise undone.
    return len({match["index"] for match in _profanity_filter().check_profanity(text).get("matches", [])})
