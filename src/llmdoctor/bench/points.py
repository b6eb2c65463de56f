"""A method at one setting: its answers over prompts and seeds, and the figures made of them.

Values are kept as the arena takes them, by prompt with one value a seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from llmdoctor.bench.cells import Answer
from llmdoctor.bench.methods import Contender, Setting
from llmdoctor.evaluation.arena import score_interval
from llmdoctor.evaluation.diversity import diversity_within, self_bleu
from llmdoctor.evaluation.embedders import Embedder
from llmdoctor.evaluation.metrics import distinct_n

SELF_BLEU_REFERENCES = 32


class Figures(TypedDict):
    """One row of `frontier.json`.

    `self_bleu_within` and `pairwise_distance` (1 − cosine, where an embedder is given) compare the answers to one
    prompt, one a seed; None where there is one seed only.
    """

    task: str
    method: str
    setting: dict[str, float]
    score: float
    score_low: float
    score_high: float
    kl: float
    kl_low: float
    kl_high: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    distinct_4: float
    self_bleu: float
    self_bleu_within: float | None
    pairwise_distance: float | None
    perplexity: float
    tokens_per_second: float
    patient_forwards_per_token: float
    guide_forwards_per_token: float
    prompts: int
    seeds: int


Answers = Mapping[str, Sequence[Answer]]
"""By prompt, one answer a seed."""


def perplexity(answers: Answers) -> float:
    """Under the patient."""
    flat = [answer for row in answers.values() for answer in row]
    return math.exp(-sum(answer.patient_logp for answer in flat) / max(1, sum(answer.tokens for answer in flat)))


def distinct_4(answers: Answers) -> float:
    """Mean over seeds of the share of distinct 4-grams in that seed's answers; fewer answers have a higher one."""
    by_seed = list(zip(*answers.values(), strict=True))
    return _mean([distinct_n([answer.text for answer in row], 4) for row in by_seed])


@dataclass(frozen=True)
class Point:
    """Answers of a method at one setting.

    Attributes:
        answers: prompt id -> one answer a seed.
        scores: the judge's, likewise.
        seconds: that decoding took, all seeds.
    """

    task: str
    contender: Contender
    setting: Setting
    answers: dict[str, list[Answer]]
    scores: dict[str, list[float]]
    seconds: float

    @property
    def kls(self) -> dict[str, list[float]]:
        """KL estimates in nats a sequence."""
        return {prompt: [answer.kl for answer in row] for prompt, row in self.answers.items()}

    @property
    def score(self) -> float:
        """Mean score."""
        return _mean([value for row in self.scores.values() for value in row])

    @property
    def kl(self) -> float:
        """Mean KL."""
        return _mean([value for row in self.kls.values() for value in row])

    @property
    def distinct_4(self) -> float:
        """As `distinct_4`."""
        return distinct_4(self.answers)

    @property
    def perplexity(self) -> float:
        """As `perplexity`."""
        return perplexity(self.answers)

    def only(self, prompts: Sequence[str], seeds: int | None = None) -> Point:
        """The same for some of the prompts, and the first so many seeds."""
        answers = {prompt: self.answers[prompt][:seeds] for prompt in prompts}
        scores = {prompt: self.scores[prompt][:seeds] for prompt in prompts}
        share = sum(map(len, answers.values())) / sum(map(len, self.answers.values()))
        return Point(self.task, self.contender, self.setting, answers, scores, self.seconds * share)

    def figures(self, embedder: Embedder | None = None) -> Figures:
        """All that a frontier plots; the embedder, if any, measures how far apart the answers to a prompt are."""
        score, kl = score_interval(self.scores), score_interval(self.kls)
        flat = [answer for row in self.answers.values() for answer in row]
        tokens = max(1, sum(answer.tokens for answer in flat))
        samples = [[answer.text for answer in row] for row in self.answers.values()]
        within, distance = diversity_within(samples, embedder)
        return {
            "task": self.task,
            "method": self.contender.name,
            "setting": dict(self.setting),
            "score": score.mean,
            "score_low": score.low,
            "score_high": score.high,
            "kl": kl.mean,
            "kl_low": kl.low,
            "kl_high": kl.high,
            "distinct_1": self._over_seeds(lambda texts: distinct_n(texts, 1)),
            "distinct_2": self._over_seeds(lambda texts: distinct_n(texts, 2)),
            "distinct_3": self._over_seeds(lambda texts: distinct_n(texts, 3)),
            "distinct_4": self.distinct_4,
            "self_bleu": self._over_seeds(lambda texts: self_bleu(texts, references=SELF_BLEU_REFERENCES)),
            "self_bleu_within": within,
            "pairwise_distance": distance,
            "perplexity": self.perplexity,
            "tokens_per_second": tokens / self.seconds,
            "patient_forwards_per_token": sum(answer.patient_forwards for answer in flat) / tokens,
            "guide_forwards_per_token": sum(answer.guide_forwards for answer in flat) / tokens,
            "prompts": len(self.answers),
            "seeds": self.seeds,
        }

    @property
    def seeds(self) -> int:
        """How many repetitions."""
        return len(next(iter(self.answers.values())))

    def _over_seeds(self, measure: Any) -> float:
        return _mean([measure([row[seed].text for row in self.answers.values()]) for seed in range(self.seeds)])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
