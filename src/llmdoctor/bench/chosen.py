"""A method's answers that take part in a comparison, which may be of several of its settings.

Shapes of mappings: by prompt id, one value a seed.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from llmdoctor.bench.cells import Answer
from llmdoctor.bench.points import Point, distinct_4
from llmdoctor.evaluation.arena import Matchup, matchup_from_outcomes
from llmdoctor.evaluation.equal_kl import Mixture, equal_kl_mixture

if TYPE_CHECKING:
    from llmdoctor.bench.arena import Arena
    from llmdoctor.bench.options import Task

V = TypeVar("V")


class Chosen:
    """Answers that may come from several settings of one method.

    Attributes:
        answers, scores: by prompt, one value a seed.
        points: the settings they are from.
        clamped: the KL asked for lies beyond what the method was measured at.
        keeps_text: they pass the gate.
    """

    def __init__(self, parts: Sequence[Point], *, clamped: bool = False, keeps_text: bool = True) -> None:
        self.points = list(parts)
        self.answers: dict[str, list[Answer]] = {prompt: row for part in parts for prompt, row in part.answers.items()}
        self.scores = {prompt: row for part in parts for prompt, row in part.scores.items()}
        self.clamped = clamped
        self.keeps_text = keeps_text

    @property
    def texts(self) -> dict[str, list[str]]:
        """By prompt, one a seed."""
        return {prompt: [answer.text for answer in row] for prompt, row in self.answers.items()}

    @property
    def score(self) -> float:
        """Mean score."""
        return _mean(self.scores)

    @property
    def kl(self) -> float:
        """Mean KL in nats."""
        return _mean({prompt: [answer.kl for answer in row] for prompt, row in self.answers.items()})

    @property
    def distinct_4(self) -> float:
        """As a `Point`'s."""
        return distinct_4(self.answers)

    @property
    def seeds(self) -> int:
        """How many repetitions."""
        return len(next(iter(self.answers.values())))

    @property
    def versions(self) -> list[dict[str, list[str]]]:
        """Texts that meet another method's: more than one where an answer may be either's."""
        return [self.texts]

    def against(self, arena: Arena, task: Task, other: Chosen) -> Contest:
        """How these answers do against the other's, which are of the same prompts and seeds."""
        return Contest(arena.outcomes(task, self.texts, other.texts))

    def only(self, prompts: Collection[str], seeds: int | None = None) -> Chosen:
        """The same for some of the prompts, and the first so many seeds."""
        part = copy.copy(self)
        part.answers = {prompt: self.answers[prompt][:seeds] for prompt in prompts}
        part.scores = {prompt: self.scores[prompt][:seeds] for prompt in prompts}
        return part

    @property
    def settings(self) -> list[dict[str, float]]:
        """Each once."""
        found: list[dict[str, float]] = []
        for point in self.points:
            if dict(point.setting) not in found:
                found.append(dict(point.setting))
        return found


class Mixed(Chosen):
    """Each seed's answers by lot from two settings, so that they spend a given KL.

    Scores, outcomes and the KL itself are their expectations over all lots, which anybody who draws one comes near;
    the answers, of which distinct n-grams are counted, are those of one.
    """

    def __init__(self, mixtures: Sequence[Mixture[Point]]) -> None:
        self.mixtures = list(mixtures)
        super().__init__(
            [point for mixture in mixtures for point in (mixture.low, mixture.high)],
            clamped=any(mixture.clamped for mixture in mixtures),
        )
        self._sides = tuple(
            of_seeds([seed_of(getattr(mixture, side).answers, seed) for seed, mixture in enumerate(mixtures)])
            for side in ("low", "high")
        )
        self.answers = of_seeds([
            mixture.take(*(seed_of(side, seed) for side in self._sides)) for seed, mixture in enumerate(mixtures)
        ])  # fmt: skip
        self.scores = of_seeds([
            mixture.blend(seed_of(mixture.low.scores, seed), seed_of(mixture.high.scores, seed))
            for seed, mixture in enumerate(mixtures)
        ])  # fmt: skip

    @property
    def kl(self) -> float:
        """Mean KL in nats, an upper bound (`evaluation.equal_kl`)."""
        kls = [(1 - mixture.weight) * mixture.kl_low + mixture.weight * mixture.kl_high for mixture in self.mixtures]
        return sum(kls) / len(kls)

    @property
    def versions(self) -> list[dict[str, list[str]]]:
        """As of any answers: first all from the milder settings, then, unless none is, from the others."""
        sides = self._sides if any(mixture.weight for mixture in self.mixtures) else self._sides[:1]
        return [{prompt: [answer.text for answer in row] for prompt, row in side.items()} for side in sides]

    def against(self, arena: Arena, task: Task, other: Chosen) -> Contest:
        """As of any answers."""
        found = [arena.outcomes(task, texts, other.texts) for texts in self.versions]
        even = [{prompt: [float(value == 0.5) for value in row] for prompt, row in side.items()} for side in found]
        return Contest(self._blend(found), self._blend(even))

    def _blend(self, sides: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
        return of_seeds([
            mixture.blend(seed_of(sides[0], seed), seed_of(sides[-1], seed))
            for seed, mixture in enumerate(self.mixtures)
        ])  # fmt: skip

    def only(self, prompts: Collection[str], seeds: int | None = None) -> Chosen:
        """Not to be had: with other prompts it would be another KL."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Contest:
    """How one method's answers did against another's.

    Attributes:
        outcomes: by prompt and seed, 1 where the first wins, ½ a tie, 0 where the second does, or the expectation.
        ties: with expectations, how probable a tie is.
    """

    outcomes: Mapping[str, Sequence[float]]
    ties: Mapping[str, Sequence[float]] | None = None

    @property
    def by_seed(self) -> list[float]:
        """Percent won by each seed's answers."""
        return [100 * sum(seed) / len(seed) for seed in zip(*self.outcomes.values(), strict=True)]

    def matchup(self) -> Matchup:
        """All of them together."""
        return matchup_from_outcomes(self.outcomes, self.ties)


def seed_of(values: Mapping[str, Sequence[V]], seed: int) -> dict[str, list[V]]:
    """One seed's, as values of one seed."""
    return {prompt: [row[seed]] for prompt, row in values.items()}


def of_seeds(seeds: Sequence[Mapping[str, Sequence[V]]]) -> dict[str, list[V]]:
    """Values of one seed each, as one."""
    return {prompt: [value for seed in seeds for value in seed[prompt]] for prompt in seeds[0]}


def mixed_at_kl(points: Sequence[Point], opponent: Chosen) -> Mixed:
    """A method, given at several settings in the order of its knob, at the KL that the opponent spends.

    Seed by seed: models that were trained with different seeds spend different KLs at the same setting. The opponent
    has answered some or all of its prompts, with as many seeds or fewer.
    """
    parts = [point.only(list(opponent.scores), opponent.seeds) for point in points]
    kls = {prompt: [answer.kl for answer in row] for prompt, row in opponent.answers.items()}
    return Mixed([
        equal_kl_mixture(_mean(seed_of(kls, seed)), [(seed_of(part.kls, seed), part) for part in parts], seed=seed)
        for seed in range(opponent.seeds)
    ])  # fmt: skip


def _mean(values: Mapping[str, Sequence[float]]) -> float:
    flat = [value for row in values.values() for value in row]
    return sum(flat) / len(flat)
