"""Best-of-n: naive rejection sampling with a reward model.

Sources: Stiennon et al., "Learning to summarize from human feedback" (2020, arXiv 2009.01325) for the method; Beirami
et al., "Theoretical guarantees on the best-of-n alignment policy" (2024, arXiv 2401.01879) for its KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from llmdoctor.decoding.request import Completion, Decoder, Request, listed
from llmdoctor.errors import UserError


class Rewarder(Protocol):
    """Whatever scores whole answers as `RewardModel` does."""

    def score(
        self, prompts: Sequence[Sequence[Mapping[str, Any]]], texts: Sequence[str], *, complete: Sequence[bool]
    ) -> Sequence[float]:
        """One number for each prompt and answer; `complete` says which answers end there."""
        ...


class BestOfN:
    """n samples of a decoder, of which the one with the highest reward is kept.

    `kl_bound` of a completion is `best_of_n_kl(n)`, the distance to the inner decoder, plus the inner decoder's own
    estimate for the sample that was kept (0 for the patient itself without warpers).

    Args:
        inner: makes the samples.
        reward_model: judges them.
        n: samples a request.

    Raises:
        UserError: no sample.
    """

    def __init__(self, inner: Decoder, reward_model: Rewarder, n: int) -> None:
        if n < 1:
            raise UserError(f"best-of-n needs at least 1 sample, got n = {n}")
        self.inner = inner
        self.reward_model = reward_model
        self.n = n

    def generate(
        self,
        requests: Iterable[Request],
        *,
        on_done: Callable[[int, Completion], None] | None = None,
        cancelled: Callable[[int], bool] | None = None,
    ) -> list[Completion]:
        """The best of n samples of each request; sample i of a request has a seed made of the request's and i.

        Args:
            requests: as the inner decoder takes them.
            on_done: called with a request's index and its completion as soon as it is chosen.
            cancelled: as of `GuidedDecoder.generate`, which the inner decoder must then be. A request that is given up
                before all its samples are done is not judged: it ends as the longest sample that was cut.

        Raises:
            UserError: temperature 0, where all samples are one.
        """
        asked = listed(requests)
        for request in asked:
            if request.sampling.temperature == 0 and self.n > 1:
                raise UserError("best-of-n draws samples, so the temperature must be above 0")
        found: dict[int, dict[int, Completion]] = {}
        best: dict[int, Completion] = {}

        def arrived(index: int, completion: Completion) -> None:
            which, place = divmod(index, self.n)
            found.setdefault(which, {})[place] = completion
            if len(found[which]) == self.n:
                samples = [sample for _, sample in sorted(found.pop(which).items())]
                best[which] = self._judge(asked[which], samples)
                if on_done:
                    on_done(which, best[which])

        copies = [sample for request in asked for sample in _copies(request, self.n)]
        if cancelled is None:
            self.inner.generate(copies, on_done=arrived)
        else:
            decoder: Any = self.inner
            decoder.generate(copies, on_done=arrived, cancelled=lambda index: cancelled(index // self.n))
        return [best[which] for which in range(len(asked))]

    def _judge(self, request: Request, samples: list[Completion]) -> Completion:
        if cut := [sample for sample in samples if sample.finish_reason == "cancelled"]:
            return max(cut, key=lambda sample: len(sample.token_ids))
        # One that a model broke off is no answer.
        samples = [sample for sample in samples if sample.finish_reason != "error"] or samples
        # A stop string cuts an answer as a length limit does; only the end of turn completes it. With stop strings
        # nobody says which of them it was.
        ends = [sample.finish_reason == "stop" and not request.sampling.stop for sample in samples]
        rewards = self.reward_model.score(
            [request.messages] * len(samples), [sample.text for sample in samples], complete=ends
        )
        return choose([samples], [rewards])[0]


def choose(samples: Sequence[Sequence[Completion]], rewards: Sequence[Sequence[float]]) -> list[Completion]:
    """The sample with the highest reward of each request (the first of equals), as a best-of-n completion.

    Args:
        samples: of each request, its n samples.
        rewards: of each sample.

    Returns:
        Copies with `kl_bound`, and with the forwards of all n samples and of a reward model that read them.

    Raises:
        UserError: a request without samples, a reward that is not a number, or samples whose KL is only a bound.
    """
    chosen = []
    for own, scores in zip(samples, rewards, strict=True):
        if not own:
            raise UserError("a request has no samples to choose from")
        if bad := [score for score in scores if not math.isfinite(score)]:
            raise UserError(f"a sample's reward is {bad[0]}; expected a finite number")
        if any(sample.kl_bound is not None for sample in own):
            raise UserError("best-of-n needs samples of a decoder whose log-probabilities are known, not a bound")
        best = max(zip(scores, range(len(own)), strict=True), key=lambda pair: (pair[0], -pair[1]))[1]
        chosen.append(
            replace(
                own[best],
                kl_bound=best_of_n_kl(len(own)) + own[best].kl,
                patient_forwards=sum(sample.patient_forwards for sample in own),
                guide_forwards=sum(sample.guide_forwards + len(sample.token_ids) for sample in own),
            )
        )
    return chosen


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1)/n: nats that best-of-n is at most away from what it samples (arXiv 2401.01879, theorem 1)."""
    return math.log(n) - (n - 1) / n


def _copies(request: Request, n: int) -> list[Request]:
    copies = []
    for place in range(n):
        seed = np.random.SeedSequence((request.sampling.seed % (1 << 64), place)).generate_state(1, np.uint64)
        copies.append(replace(request, sampling=replace(request.sampling, seed=int(seed[0]))))
    return copies
