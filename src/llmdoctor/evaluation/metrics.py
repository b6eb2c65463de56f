"""Figures of an evaluation, as pure functions of numbers and texts.

Intervals are percentile bootstraps with a fixed seed, so the same input always gives the same interval.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Scripts that are written without spaces: Thai and Lao, Burmese, Khmer, kana, Chinese characters.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\uff66-\uff9f"
_UNSPACED += r"\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Vowels and tones that are written onto a letter of theirs; `re` does not count them as letters.
_MARKS = "".join(chr(code) for code in range(0x0E00, 0x3100) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
_LETTER = rf"[^\W{_UNSPACED}]"
_WORD = re.compile(rf"(?=\w)[{_UNSPACED}][{_MARKS}]*|{_LETTER}+(?:['’]{_LETTER}+)*")
# Bounds the index matrix of one bootstrap block (about 16 MB), whatever the number of values.
_BLOCK_ENTRIES = 2_000_000


class Interval(NamedTuple):
    """A mean and its confidence bounds, in the unit of the values it was made from."""

    mean: float
    low: float
    high: float


def flat_floats(values: Sequence[float] | npt.NDArray[np.floating[Any]], what: str) -> Floats:
    """`values` as a float64 vector; ValueError, naming `what`, when empty, not flat, or NaN."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{what} must be a non-empty flat sequence, got shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError(f"{what} contains NaN")
    return array


def _paired(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    one, two = flat_floats(first, "first"), flat_floats(second, "second")
    if one.size != two.size:
        raise ValueError(f"paired values must have equal length, got {one.size} and {two.size}")
    return one, two


def words(text: str) -> list[str]:
    """Words of `text` in lower case: runs of letters and digits with inner apostrophes, no punctuation.

    Where a script puts no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each of its characters,
    with the marks on it, is a word of its own: a whole sentence would be one otherwise.
    """
    return _WORD.findall(text.lower())


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share (0…1) of distinct n-grams among all n-grams of `words` of the whole set.

    No n-gram crosses from one text into the next. 1.0: nothing is ever said twice. The figure falls as a set grows, so
    compare sets of equal size. 0.0 when no text has n words.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    total = 0
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        tokens = words(text)
        grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
        total += len(grams)
        seen.update(grams)
    return len(seen) / total if total else 0.0


def _drawn(size: int, resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Blocks [b, size] of indices drawn with replacement, `resamples` rows in all."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ENTRIES // size)
    for start in range(0, resamples, block):
        yield rng.integers(size, size=(min(block, resamples - start), size))


def resampled_counts(size: int, resamples: int, seed: int = 0) -> Iterator[Floats]:
    """How often each of `size` units is in each bootstrap sample: blocks [b, size], `resamples` rows in all.

    For statistics that are linear in the counts; the draws are those of `bootstrap_ci` with the same seed.
    """
    for drawn in _drawn(size, resamples, seed):
        rows = len(drawn)
        places = (drawn + size * np.arange(rows)[:, None]).ravel()
        yield np.bincount(places, minlength=rows * size).reshape(rows, size).astype(np.float64)


def percentile_bounds(samples: Floats, level: float) -> Floats:
    """Lower and upper bound [2, …] of the middle `level` of bootstrap samples [R, …]."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    bounds: Floats = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return bounds


def bootstrap_ci(
    values: Sequence[float] | Floats, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `values` with its percentile bootstrap interval at `level`."""
    array = flat_floats(values, "values")
    means = np.concatenate([array[drawn].mean(axis=1) for drawn in _drawn(array.size, resamples, seed)])
    low, high = percentile_bounds(means, level)
    return Interval(float(array.mean()), float(low), float(high))


def cluster_bootstrap_ci(
    groups: Sequence[Sequence[float] | Floats], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of all values of `groups`, with an interval that draws whole groups.

    For values that belong together, such as the seeds of one prompt: they are drawn together, because three answers to
    one prompt tell less than answers to three prompts. With one value a group it is `bootstrap_ci`.
    """
    if not len(groups):
        raise ValueError("groups must not be empty")
    arrays = [flat_floats(group, f"group {index}") for index, group in enumerate(groups)]
    sums = np.array([array.sum() for array in arrays])
    sizes = np.array([array.size for array in arrays], dtype=np.float64)
    means = np.concatenate([(c @ sums) / (c @ sizes) for c in resampled_counts(len(arrays), resamples, seed)])
    low, high = percentile_bounds(means, level)
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high))


@dataclass(frozen=True, slots=True)
class WinTieLoss:
    """How often a candidate beat, equalled and lost to a baseline on the same prompts (counts)."""

    win: int
    tie: int
    loss: int

    @classmethod
    def from_scores(
        cls, candidate: Sequence[float] | Floats, baseline: Sequence[float] | Floats, margin: float = 0.0
    ) -> WinTieLoss:
        """Compare prompt by prompt; a difference of at most `margin` either way is a tie."""
        if margin < 0:
            raise ValueError(f"margin must not be negative, got {margin}")
        one, two = _paired(candidate, baseline)
        win = int(np.sum(one - two > margin))
        loss = int(np.sum(two - one > margin))
        return cls(win=win, tie=one.size - win - loss, loss=loss)

    @property
    def total(self) -> int:
        """Number of prompts compared."""
        return self.win + self.tie + self.loss

    @property
    def win_plus_half_tie(self) -> float:
        """100 · (win + ½ tie) / total, in percent; 50 means neither is better."""
        if self.total == 0:
            raise ValueError("nothing was compared")
        return 100 * (self.win + self.tie / 2) / self.total

    def interval(self, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
        """`win_plus_half_tie` with its bootstrap interval over prompts, in percent."""
        outcomes = np.repeat([100.0, 50.0, 0.0], [self.win, self.tie, self.loss])
        return bootstrap_ci(outcomes, level, resamples, seed)


def perplexity(logps: Sequence[Sequence[float]]) -> float:
    """exp of minus the mean log-prob over all tokens of all sequences (natural logarithm).

    `logps[i]` are the log-probs of sequence i's tokens; long sequences weigh more than short ones. Infinite when a
    token has probability 0.
    """
    flat = flat_floats([logp for sequence in logps for logp in sequence], "logps")
    with np.errstate(over="ignore"):
        return float(np.exp(-flat.mean()))


def sequence_kl(
    policy_logps: Sequence[Sequence[float]],
    patient_logps: Sequence[Sequence[float]],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Estimate of KL(policy ‖ patient) in nats per sequence, with its interval.

    Both arguments hold, per sequence sampled *from the policy*, the log-prob of each of its tokens: under the policy
    and under the patient. The estimate is the mean of Σ_t (log π_policy − log π_patient).
    """
    if [len(row) for row in policy_logps] != [len(row) for row in patient_logps]:
        raise ValueError("policy_logps and patient_logps must hold the same tokens of the same sequences")
    sums = [sum(policy) - sum(patient) for policy, patient in zip(policy_logps, patient_logps, strict=True)]
    return bootstrap_ci(sums, level, resamples, seed)


def _average_ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def rank_correlation(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> float:
    """Spearman's ρ (−1…1) with tied values sharing their average rank; NaN when either side is constant."""
    one, two = _paired(first, second)
    x, y = _average_ranks(one), _average_ranks(two)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(np.clip((x @ y) / scale, -1.0, 1.0)) if scale > 0 else float("nan")
