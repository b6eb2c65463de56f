"""Signal dynamics: how early in a response a guide tells chosen from rejected.

Shapes: L tokens of one response, U positions, R pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmdoctor.evaluation.metrics import Floats, flat_floats, percentile_bounds, resampled_counts

Responses: TypeAlias = Sequence[Sequence[float] | NDArray[np.floating[Any]]]
"""Token rewards [L] of each response."""


@dataclass(frozen=True, slots=True)
class Dynamics:
    """Normalised gap between chosen and rejected along the response, mean over pairs, with a band."""

    positions: tuple[float, ...]
    """Relative position u: 0 before the first token, 1 after the last."""
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Pointwise bounds from drawing pairs. The scale stays fixed, so the band holds no doubt about it."""
    scale: float
    """Mean absolute final gap in nats, by which all gaps were divided so that guides can share a plot; mean over
    trainings where there are several, each of which was divided by its own."""
    pairs: int
    trainings: int


def signal_dynamics(
    chosen: Responses,
    rejected: Responses,
    bins: int = 20,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Dynamics:
    """Gap of the implicit reward of the prefixes of held-out pairs at `bins` + 1 relative positions.

    With c(u) the sum of a response's token rewards up to position u (straight lines between tokens), a pair's gap is
    c_chosen(u) − c_rejected(u), and every gap is divided by the mean over pairs of |gap(1)|. A guide that is always
    right ends at 1, one that guesses near 0; a straight line is a signal spread evenly, an early rise one that guides
    from the first tokens on.

    Args:
        chosen: per pair, token rewards log π / π_ref [L] of the chosen response, in nats.
        rejected: the same of the rejected response, of any length.
        bins: steps between the positions.
        level: of the band.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: no pairs, an empty response, NaN, or every final gap zero, which leaves nothing to divide by.
    """
    return pooled_dynamics([(chosen, rejected)], bins, level=level, resamples=resamples, seed=seed)


def pooled_dynamics(
    trainings: Sequence[tuple[Responses, Responses]],
    bins: int = 20,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Dynamics:
    """`signal_dynamics` of several trainings of a guide on the same pairs.

    Each training's gaps are divided by that training's own scale; the curve is the mean over them, and the band draws
    pairs, each with the gaps of all trainings, so it does not say how another training would do.

    Args:
        trainings: `chosen` and `rejected` of each, the pairs in the same order.
        bins: steps between the positions.
        level: of the band.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: as `signal_dynamics`, no training, or trainings of different numbers of pairs.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not trainings:
        raise ValueError("expected at least one training, got none")
    positions = np.arange(bins + 1) / bins
    found = [_normalised_gaps(chosen, rejected, positions) for chosen, rejected in trainings]
    pairs = len(found[0][0])
    if any(len(one) != pairs for one, _ in found):
        raise ValueError(f"expected the same pairs of every training, got {[len(one) for one, _ in found]}")
    gaps = np.mean([one for one, _ in found], axis=0)
    means = np.concatenate([counts @ gaps / pairs for counts in resampled_counts(pairs, resamples, seed)])
    low, high = percentile_bounds(means, level)
    return Dynamics(
        positions=tuple(positions.tolist()),
        mean=tuple(gaps.mean(axis=0).tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        scale=float(np.mean([scale for _, scale in found])),
        pairs=pairs,
        trainings=len(found),
    )


def _normalised_gaps(chosen: Responses, rejected: Responses, positions: Floats) -> tuple[Floats, float]:
    """Gaps of the pairs at relative positions [R, U], divided by the mean absolute last one, and that mean."""
    if not len(chosen) or len(chosen) != len(rejected):
        raise ValueError(f"expected as many chosen as rejected responses, got {len(chosen)} and {len(rejected)}")
    gaps = _prefix_sums(chosen, positions, "chosen") - _prefix_sums(rejected, positions, "rejected")
    scale = float(np.abs(gaps[:, -1]).mean())
    if not 0 < scale < np.inf:
        raise ValueError(f"the mean absolute final gap is {scale}: there is no scale to normalise by")
    return gaps / scale, scale


def _prefix_sums(responses: Responses, positions: Floats, side: str) -> Floats:
    """Cumulative rewards [R, U] of the responses at relative positions [U]."""
    curves = []
    for index, response in enumerate(responses):
        rewards = flat_floats(response, f"{side} response {index}")
        steps = np.arange(rewards.size + 1) / rewards.size
        curves.append(np.interp(positions, steps, np.concatenate([[0.0], np.cumsum(rewards)])))
    return np.array(curves)
