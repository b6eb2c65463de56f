"""All methods on one scale: Bradley-Terry strengths shown as Elo.

Shapes: M methods, P prompts, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmdoctor.evaluation.arena import check_outcomes
from llmdoctor.evaluation.metrics import Floats, percentile_bounds, resampled_counts

ELO_PER_NAT = 400 / np.log(10)
"""400 points are odds of 10 : 1."""

_MAX_ITERATIONS = 10_000


class Rating(NamedTuple):
    """Elo of a method with its bounds; the anchor's own bounds are its Elo."""

    elo: float
    low: float
    high: float


def bradley_terry(
    outcomes: Mapping[tuple[str, str], Mapping[str, Sequence[float]]],
    anchor: str,
    *,
    anchor_elo: float = 1000.0,
    prior: float = 0.5,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Rating]:
    """Elo of every method, best first, from outcomes of pairs of them.

    The strengths θ maximise Π σ(θ_i − θ_j)^{wins of i over j} (choix, iterative Luce spectral ranking); a tie is half a
    win each way. The interval draws prompts, each with all its pairs and seeds.

    Args:
        outcomes: (first, second) -> prompt id -> for each seed 1 (first won), 0.5 or 0. Not every pair has to be there,
            nor every prompt in every pair, but the methods must hang together.
        anchor: the method whose Elo is fixed, so all others are relative to it.
        anchor_elo: that Elo.
        prior: regularisation, wins added each way to every pair that met: they keep a method that never loses
            finite (n wins of n are 400 · log₁₀(1 + n / prior) points) and weigh nothing beside hundreds of comparisons.
        level: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: an unknown anchor, a method against itself, methods without a link to the anchor.
    """
    if prior <= 0:
        raise ValueError(f"prior must be positive, got {prior}")
    names = sorted({name for pair in outcomes for name in pair})
    if anchor not in names:
        raise ValueError(f"anchor {anchor!r} is not among the methods: {', '.join(names)}")
    wins = _wins_by_prompt(outcomes, names)
    total = wins.sum(axis=0)
    met = np.asarray(total + total.T > 0)
    _require_linked(met, names, anchor)

    base = names.index(anchor)
    pseudo = np.where(met, prior, 0.0)
    best = _strengths(total + pseudo)
    drawn = _resampled(wins, pseudo, best, resamples, seed)
    elo = anchor_elo + ELO_PER_NAT * (best - best[base])
    low, high = percentile_bounds(anchor_elo + ELO_PER_NAT * (drawn - drawn[:, [base]]), level)
    return {
        names[index]: Rating(float(elo[index]), float(low[index]), float(high[index]))
        for index in np.argsort(-elo, kind="stable")
    }


def _wins_by_prompt(outcomes: Mapping[tuple[str, str], Mapping[str, Sequence[float]]], names: Sequence[str]) -> Floats:
    """Wins [P, M, M] of the row's method over the column's, summed over seeds."""
    prompts = {prompt: row for row, prompt in enumerate(sorted({p for pair in outcomes.values() for p in pair}))}
    places = {name: place for place, name in enumerate(names)}
    wins = np.zeros((len(prompts), len(names), len(names)))
    for (first, second), by_seed in outcomes.items():
        if first == second:
            raise ValueError(f"method {first!r} cannot play against itself")
        i, j = places[first], places[second]
        for prompt, values in check_outcomes(by_seed, f"outcomes of {first!r} against {second!r}").items():
            wins[prompts[prompt], i, j] += values.sum()
            wins[prompts[prompt], j, i] += values.size - values.sum()
    return wins


def _require_linked(met: npt.NDArray[np.bool_], names: Sequence[str], anchor: str) -> None:
    reached: set[int] = set()
    waiting = {names.index(anchor)}
    while waiting:
        place = waiting.pop()
        reached.add(place)
        waiting |= set(np.flatnonzero(met[place]).tolist()) - reached
    apart = [name for place, name in enumerate(names) if place not in reached]
    if apart:
        raise ValueError(f"no chain of comparisons links {', '.join(apart)} to the anchor {anchor!r}")


def _strengths(wins: Floats, start: Floats | None = None) -> Floats:
    """Bradley-Terry strengths [M] (nats, mean zero) of a table of wins [M, M]."""
    from choix import ilsr_pairwise_dense

    return ilsr_pairwise_dense(wins, initial_params=start, max_iter=_MAX_ITERATIONS)


def _resampled(wins: Floats, pseudo: Floats, best: Floats, resamples: int, seed: int) -> Floats:
    """Strengths [R, M] of bootstrap samples of the prompts."""
    methods = len(best)
    flat = wins.reshape(len(wins), -1)
    tables: Iterable[Floats] = (
        table.reshape(methods, methods)
        for counts in resampled_counts(len(wins), resamples, seed)
        for table in counts @ flat
    )
    return np.array([_strengths(table + pseudo, best) for table in tables])
