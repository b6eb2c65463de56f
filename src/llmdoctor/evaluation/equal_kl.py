"""Comparison at equal KL: a method's answers at just the KL that another one spends.

A method is measured at a few settings of its knob (β, say), and none of them lands on the target. Each prompt and seed
is therefore answered by one of the two settings around it, chosen by lot. That mixture is a policy too, which anybody
could run. Its KL to the patient is at most the mixture of the two KLs, since KL is convex in its first argument: the KL
stated for it is an upper bound, so the comparison never favours the mixed method. As both settings' answers are there,
what is a mean over answers need not wait for the lot (`Mixture.blend`); what is of a set of texts does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from llmdoctor.evaluation.arena import BySeed, by_prompt, require_same_prompts
from llmdoctor.evaluation.metrics import Floats

P = TypeVar("P")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Mixture(Generic[P]):
    """Which of two settings answers each prompt and seed."""

    low: P
    high: P
    """What the caller gave with the two points; the same where one point is all."""
    kl_low: float
    kl_high: float
    """Their mean KLs, nats per sequence."""
    weight: float
    """Share of `high` (0…1): (1 − weight) · kl_low + weight · kl_high is the target unless `clamped`."""
    from_high: dict[str, tuple[bool, ...]]
    """Prompt id -> for each seed, whether `high` answers it."""
    mean_kl: float
    """Mean KL estimate of the answers chosen; off the target by the luck of the lot."""
    clamped: bool
    """The target lies outside what the points reach; the nearest one is taken as it is."""

    def blend(self, low: BySeed, high: BySeed) -> dict[str, list[float]]:
        """Expectation over all lots of values of the same prompts and seeds, from those of the two settings."""
        return {
            prompt: [(1 - self.weight) * below + self.weight * above
                     for below, above in zip(low[prompt], high[prompt], strict=True)]
            for prompt in self.from_high
        }  # fmt: skip

    def take(self, low: Mapping[str, Sequence[V]], high: Mapping[str, Sequence[V]]) -> dict[str, list[V]]:
        """The mixture's values, of the same prompts and seeds, from those of its two settings."""
        return {
            prompt: [(high if up else low)[prompt][index] for index, up in enumerate(chosen)]
            for prompt, chosen in self.from_high.items()
        }


def equal_kl_mixture(kl_target: float, points: Sequence[tuple[BySeed, P]], *, seed: int = 0) -> Mixture[P]:
    """Mix the two neighbouring settings of a method whose mean KLs enclose `kl_target` (nats per sequence).

    KL need not grow with the knob. Going along it from its low-KL end, a point counts only when its mean KL exceeds
    that of all before: where more steering brings no more KL, the milder setting stands.

    The lot has low variance: systematic sampling along the prompts in random order, each with its seeds in random
    order. Every answer comes from the higher point with probability `weight`; the number that do is off its
    expectation by less than one, over all and within each prompt.

    Args:
        kl_target: finite.
        points: KL estimates by prompt and seed, with anything that names the point, in the order of the knob (either
            way round). All have the same prompts and seeds.
        seed: of the lot. It sees no KL and no score.
    """
    if not math.isfinite(kl_target):
        raise ValueError(f"kl_target must be finite, got {kl_target}")
    if not points:
        raise ValueError("at least one point is needed")
    kls = [by_prompt(kl, f"KL estimates at point {index}") for index, (kl, _) in enumerate(points)]
    for index, kl in enumerate(kls):
        require_same_prompts(kls[0], kl, "point 0", f"point {index}")
    means = [_mean(kl) for kl in kls]
    if not all(map(math.isfinite, means)):
        raise ValueError(f"mean KLs must be finite, got {means}")

    low, high = _enclosing(kl_target, means)
    weight = (kl_target - means[low]) / (means[high] - means[low]) if low != high else 0.0
    sizes = {prompt: group.size for prompt, group in sorted(kls[0].items())}
    from_high = _lots(sizes, weight, seed)
    chosen = [np.where(up, kls[high][prompt], kls[low][prompt]) for prompt, up in from_high.items()]
    return Mixture(
        low=points[low][1],
        high=points[high][1],
        kl_low=means[low],
        kl_high=means[high],
        weight=weight,
        from_high=from_high,
        mean_kl=float(np.concatenate(chosen).mean()),
        clamped=low == high and means[low] != kl_target,
    )


def _mean(kl: Mapping[str, Floats]) -> float:
    return float(np.concatenate(list(kl.values())).mean())


def _staircase(means: Sequence[float]) -> list[int]:
    """Points whose mean exceeds that of every point before, read from the end of the knob that has the lower mean."""
    order = range(len(means)) if means[0] <= means[-1] else range(len(means) - 1, -1, -1)
    kept: list[int] = []
    for index in order:
        if not kept or means[index] > means[kept[-1]]:
            kept.append(index)
    return kept


def _enclosing(target: float, means: Sequence[float]) -> tuple[int, int]:
    """The two points around `target`; twice the same one where it meets that, or lies beyond the last on that side."""
    stairs = _staircase(means)
    above = int(np.searchsorted([means[index] for index in stairs], target))
    if above == len(stairs):
        return stairs[-1], stairs[-1]
    if above == 0 or means[stairs[above]] == target:
        return stairs[above], stairs[above]
    return stairs[above - 1], stairs[above]


def _lots(sizes: Mapping[str, int], weight: float, seed: int) -> dict[str, tuple[bool, ...]]:
    rng = np.random.default_rng(seed)
    total = sum(sizes.values())
    ups = np.diff(np.floor(rng.random() + weight * np.arange(total + 1))) > 0
    prompts = list(sizes)
    start = 0
    drawn = {}
    for place in rng.permutation(len(prompts)):
        size = sizes[prompts[place]]
        # Without this, a weight of one third would give one and the same of three seeds to the higher point throughout.
        drawn[prompts[place]] = tuple(rng.permutation(ups[start : start + size]).tolist())
        start += size
    return {prompt: drawn[prompt] for prompt in prompts}
