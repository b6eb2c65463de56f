"""One method against another on the same prompts.

Values are kept by prompt id, each prompt with one value a seed. Intervals draw prompts, and with each all its seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from llmdoctor.evaluation.metrics import Floats, Interval, cluster_bootstrap_ci, flat_floats

BySeed = Mapping[str, Sequence[float]]
"""Prompt id -> one value a seed."""

_FEWEST_OTHERS = 10
"""Prompts that were not won, or not lost, from which on a bootstrap knows of them."""

_FEWEST_PROMPTS = 6
"""Five wins of five still have p = 2 · ½⁵ = 0.06 in a two-sided sign test."""


@dataclass(frozen=True, slots=True)
class Matchup:
    """How a first method did against a second."""

    win: int
    tie: int
    loss: int
    """Counts over prompts and seeds; where outcomes are expectations, the whole numbers nearest to theirs."""
    prompts: int
    win_plus_half_tie: float
    ci_low: float
    ci_high: float
    """Percent, with its interval over prompts, each with all its seeds."""
    sign_test_p: float
    """Two-sided, exact. A prompt is one sign, whatever its seeds: who won more of them; an even prompt drops out."""
    prompts_needed: int | None
    """See `prompts_needed`."""


def matchup(
    first: BySeed,
    second: BySeed,
    *,
    margin: float = 0.0,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Matchup:
    """Compare scores of the same prompts and seeds, paired by position.

    Args:
        first: scores by prompt.
        second: the same prompts, with the same number of seeds each.
        margin: a difference of at most so much either way is a tie.
        level: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    if margin < 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    one, two = by_prompt(first, "first"), by_prompt(second, "second")
    require_same_prompts(one, two, "first", "second")
    gaps = {prompt: scores - two[prompt] for prompt, scores in one.items()}
    outcomes = {prompt: 0.5 + 0.5 * np.sign(gap) * (np.abs(gap) > margin) for prompt, gap in gaps.items()}
    return matchup_from_outcomes(outcomes, level=level, resamples=resamples, seed=seed)


def matchup_from_outcomes(
    outcomes: Mapping[str, Sequence[float] | Floats],
    ties: Mapping[str, Sequence[float] | Floats] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Matchup:
    """Sum up outcomes by prompt: 1 the first method won, 0.5 a tie, 0 it lost.

    Expectations of such outcomes lie between; then `ties` says for each how probable a tie is.
    """
    groups = check_outcomes(outcomes)
    flat = np.concatenate(list(groups.values()))
    even = flat == 0.5 if ties is None else np.concatenate([np.asarray(ties[prompt], float) for prompt in groups])
    win, loss = round(float(np.sum(flat - even / 2))), round(float(np.sum(1 - flat - even / 2)))
    interval = _interval(groups, level, resamples, seed)
    return Matchup(
        win=win,
        tie=flat.size - win - loss,
        loss=loss,
        prompts=len(groups),
        win_plus_half_tie=interval.mean,
        ci_low=interval.low,
        ci_high=interval.high,
        sign_test_p=_sign_test(groups),
        prompts_needed=prompts_needed(groups),
    )


def score_interval(scores: BySeed, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean score over prompts and seeds with its cluster bootstrap interval."""
    return cluster_bootstrap_ci(list(by_prompt(scores, "scores").values()), level, resamples, seed)


def prompts_needed(
    outcomes: Mapping[str, Sequence[float] | Floats], power: float = 0.8, significance: float = 0.05
) -> int | None:
    """Prompts, of as many seeds each, that a study needs to tell the observed effect from an even match.

    Normal approximation n = ((z_{1−significance/2} + z_power) · s / (m − ½))², with m the mean outcome and s the
    standard deviation of the prompts' means (of the ratio's residuals where prompts differ in seeds). At least 6, below
    which no outcome is significant at 5 %. None where there is no effect, or one prompt only, hence no spread. The
    observed effect is taken for the true one, so it is a plan for the next study and no verdict on this one.
    """
    groups = check_outcomes(outcomes)
    sizes = np.array([group.size for group in groups.values()], dtype=np.float64)
    sums = np.array([group.sum() for group in groups.values()])
    mean = sums.sum() / sizes.sum()
    if len(groups) < 2 or mean == 0.5:
        return None
    spread = np.std((sums - mean * sizes) / sizes.mean(), ddof=1)
    normal = NormalDist()
    z = normal.inv_cdf(1 - significance / 2) + normal.inv_cdf(power)
    return max(_FEWEST_PROMPTS, math.ceil((z * spread / (mean - 0.5)) ** 2))


def by_prompt(values: Mapping[str, Sequence[float] | Floats], what: str) -> dict[str, Floats]:
    """The values as vectors; ValueError, naming `what` and the prompt, when there are none or one is NaN."""
    if not values:
        raise ValueError(f"{what} holds no prompt")
    return {prompt: flat_floats(group, f"{what} of prompt {prompt!r}") for prompt, group in values.items()}


def check_outcomes(outcomes: Mapping[str, Sequence[float] | Floats], what: str = "outcomes") -> dict[str, Floats]:
    """Outcomes as vectors; ValueError, naming the prompt, unless each is from 0 to 1."""
    groups = by_prompt(outcomes, what)
    for prompt, group in groups.items():
        if group.min() < 0 or group.max() > 1:
            raise ValueError(f"{what} of prompt {prompt!r} must be from 0 to 1, got {group.tolist()}")
    return groups


def require_same_prompts(one: Mapping[str, Floats], two: Mapping[str, Floats], first: str, second: str) -> None:
    """ValueError, naming one prompt, unless both have the same prompts with the same number of seeds."""
    for prompt in (*one, *two):
        if prompt not in one or prompt not in two:
            raise ValueError(f"prompt {prompt!r} is only in {first if prompt in one else second}")
        if one[prompt].size != two[prompt].size:
            raise ValueError(
                f"prompt {prompt!r} has {one[prompt].size} seeds in {first} and {two[prompt].size} in {second}"
            )


def _interval(groups: Mapping[str, Floats], level: float, resamples: int, seed: int) -> Interval:
    """Percent won, with a bootstrap interval over prompts, or Wilson's (1927) where hardly any is not won, or lost."""
    found = cluster_bootstrap_ci([100 * group for group in groups.values()], level, resamples, seed)
    means = np.array([group.mean() for group in groups.values()])
    # Most samples of a bootstrap miss what a handful of prompts say, and none has what none says.
    if min(np.sum(means < 1), np.sum(means > 0)) >= _FEWEST_OTHERS:
        return found
    z, count, mean = NormalDist().inv_cdf((1 + level) / 2), len(groups), found.mean / 100
    middle = mean + z * z / (2 * count)
    half = z * math.sqrt(max(0.0, mean * (1 - mean)) / count + (z / (2 * count)) ** 2)
    low, high = ((middle + side) / (1 + z * z / count) for side in (-half, half))
    return Interval(found.mean, 100 * max(0.0, low), 100 * min(1.0, high))


def _sign_test(groups: Mapping[str, Floats]) -> float:
    from scipy.stats import binomtest

    means = np.array([group.mean() for group in groups.values()])
    wins, losses = int(np.sum(means > 0.5)), int(np.sum(means < 0.5))
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
