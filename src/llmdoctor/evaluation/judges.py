"""Judges: which of two answers to one prompt is better, and how often a judge agrees with human labels."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmdoctor.data.formats import Message, PreferencePair
from llmdoctor.errors import UserError
from llmdoctor.evaluation.metrics import Interval, bootstrap_ci
from llmdoctor.evaluation.scorers import ScoreFunction, Scorer

Progress = Callable[[int], None]

WIN, TIE, LOSS = 1.0, 0.5, 0.0

# Enough for a reward model to batch by length, few enough for progress to move.
_COMPARISONS_PER_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of two answers, in the first answer's view: 1.0 it wins, 0.5 tie, 0.0 it loses."""

    outcome: float
    orders: tuple[float, ...]
    """The raw outcome of each presentation order; one entry from a judge that reads each answer by itself."""
    consistent: bool
    """All orders say the same. An inconsistent comparison is a tie."""
    answered: bool = True
    """False: in some order the judge refused or gave no verdict that could be read, which counts there as a tie."""

    @classmethod
    def from_orders(cls, *orders: float, answered: bool = True) -> Verdict:
        """The verdict on which all orders agree, or else a tie."""
        consistent = len(set(orders)) == 1
        return cls(orders[0] if consistent and answered else TIE, orders, consistent, answered)


class Judge(Protocol):
    """Compares pairs of answers."""

    name: str

    def compare(
        self,
        prompts: Sequence[Sequence[Message]],
        first: Sequence[str],
        second: Sequence[str],
        *,
        progress: Progress | None = None,
    ) -> list[Verdict]:
        """One verdict a prompt: is `first[i]` or `second[i]` the better answer to `prompts[i]`?

        `progress` is called with the number of comparisons just finished.
        """
        ...


class ScoreJudge:
    """The answer with the higher score wins; the prompt is not read.

    Args:
        scorer: a `Scorer`, or any function from texts to one finite number each.
        margin: a difference of at most so much, in the scorer's unit, is a tie.
        name: the scorer's if None.
    """

    def __init__(self, scorer: Scorer | ScoreFunction, *, margin: float = 0.0, name: str | None = None) -> None:
        own_name = str(name or getattr(scorer, "name", None) or getattr(scorer, "__name__", "scorer"))
        self._scorer = scorer if isinstance(scorer, Scorer) else Scorer(own_name, scorer, higher_is="better")
        self._margin = _checked_margin(margin)
        self.name = own_name

    def compare(
        self,
        prompts: Sequence[Sequence[Message]],
        first: Sequence[str],
        second: Sequence[str],
        *,
        progress: Progress | None = None,
    ) -> list[Verdict]:
        """See `Judge.compare`. UserError for a scorer that does not give one finite number a text."""
        return _compare_scores(lambda _, texts: self._scorer(texts), self._margin, prompts, first, second, progress)


class RewardModel(Protocol):
    """What scores an answer in view of its prompt."""

    def score(self, prompts: Sequence[Sequence[Message]], texts: Sequence[str]) -> list[float]:
        """One number a text, higher is better."""
        ...


class RewardJudge:
    """The answer with the higher reward wins.

    Args:
        model: gives the rewards.
        margin: a difference of at most so much reward is a tie.
        name: the model's own if None, `reward` if it has none.
    """

    def __init__(self, model: RewardModel, *, margin: float = 0.0, name: str | None = None) -> None:
        self._model = model
        self._margin = _checked_margin(margin)
        self.name = str(name or getattr(model, "name", None) or "reward")

    def compare(
        self,
        prompts: Sequence[Sequence[Message]],
        first: Sequence[str],
        second: Sequence[str],
        *,
        progress: Progress | None = None,
    ) -> list[Verdict]:
        """See `Judge.compare`. UserError for a model that does not give one finite number a text."""
        return _compare_scores(self._scores, self._margin, prompts, first, second, progress)

    def _scores(self, prompts: Sequence[Sequence[Message]], texts: Sequence[str]) -> list[float]:
        scores = [float(score) for score in self._model.score(prompts, texts)]
        if len(scores) != len(texts):
            raise UserError(f"reward model {self.name!r} returned {len(scores)} scores for {len(texts)} texts")
        bad = next((index for index, score in enumerate(scores) if not math.isfinite(score)), None)
        if bad is not None:
            raise UserError(f"reward model {self.name!r} returned {scores[bad]} for the text {texts[bad][:80]!r}")
        return scores


@dataclass(frozen=True, slots=True)
class JudgeAgreement:
    """How a judge fares on human-labelled pairs.

    Attributes:
        agreement: percent of pairs on which it prefers the chosen answer, a tie counting half; 50 is chance.
        interval: the same with its 95 % bootstrap interval over pairs.
        ties: pairs on which it prefers neither, for whatever reason.
        unanswered: those among them on which it refused or could not be read.
        position_consistency: percent of the answered pairs with the same outcome in both presentation orders; None for
            a judge that reads each answer by itself, or that answered nothing.
        pairs: how many were judged.
    """

    agreement: float
    interval: Interval
    ties: int
    unanswered: int
    position_consistency: float | None
    pairs: int


def judge_agreement(
    judge: Judge, pairs: Iterable[PreferencePair], *, seed: int = 0, progress: Progress | None = None
) -> JudgeAgreement:
    """Share of human-labelled `pairs` on which `judge` prefers the chosen answer.

    Which of the two is presented first is drawn by `seed` for every pair, so no judge can gain from position. UserError
    for no pairs.
    """
    labelled = list(pairs)
    if not labelled:
        raise UserError("there are no labelled pairs to compare the judge with")
    draw = random.Random(seed)
    chosen_first = [draw.random() < 0.5 for _ in labelled]
    sides = [
        (pair.chosen, pair.rejected) if ahead else (pair.rejected, pair.chosen)
        for pair, ahead in zip(labelled, chosen_first, strict=True)
    ]
    verdicts = judge.compare(
        [pair.prompt for pair in labelled],
        [first for first, _ in sides],
        [second for _, second in sides],
        progress=progress,
    )
    agreed = [
        verdict.outcome if ahead else 1 - verdict.outcome for verdict, ahead in zip(verdicts, chosen_first, strict=True)
    ]
    interval = bootstrap_ci([100 * share for share in agreed])
    both_orders = [verdict.consistent for verdict in verdicts if verdict.answered and len(verdict.orders) > 1]
    return JudgeAgreement(
        agreement=interval.mean,
        interval=interval,
        ties=sum(verdict.outcome == TIE for verdict in verdicts),
        unanswered=sum(not verdict.answered for verdict in verdicts),
        position_consistency=100 * sum(both_orders) / len(both_orders) if both_orders else None,
        pairs=len(labelled),
    )


def check_lengths(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> None:
    """ValueError unless there is one answer of each side for every prompt."""
    if not len(prompts) == len(first) == len(second):
        raise ValueError(
            f"expected two answers a prompt, got {len(prompts)} prompts, {len(first)} and {len(second)} answers"
        )


def _compare_scores(
    scores: Callable[[Sequence[Sequence[Message]], Sequence[str]], Sequence[float]],
    margin: float,
    prompts: Sequence[Sequence[Message]],
    first: Sequence[str],
    second: Sequence[str],
    progress: Progress | None,
) -> list[Verdict]:
    check_lengths(prompts, first, second)
    verdicts: list[Verdict] = []
    for start in range(0, len(prompts), _COMPARISONS_PER_BLOCK):
        block = slice(start, start + _COMPARISONS_PER_BLOCK)
        asked = list(prompts[block])
        found = scores([*asked, *asked], [*first[block], *second[block]])
        gaps = [one - two for one, two in zip(found[: len(asked)], found[len(asked) :], strict=True)]
        verdicts.extend(Verdict.from_orders(WIN if gap > margin else LOSS if gap < -margin else TIE) for gap in gaps)
        if progress:
            progress(len(asked))
    return verdicts


def _checked_margin(margin: float) -> float:
    if not 0 <= margin < math.inf:
        raise UserError(f"a judge's margin must be a finite number of at least 0, got {margin}")
    return margin
