"""Best-of-n: the choice, its cost, and its KL against the exact one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.baselines.tools import TEXTS, ask, critic_of, load

from llmdoctor.baselines.args import ARGS
from llmdoctor.baselines.best_of_n import BestOfN, best_of_n_kl, choose
from llmdoctor.baselines.cards import CARDS, CARDSOptions
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Completion
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.reward_model import RewardModel


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder)


@pytest.fixture(scope="module")
def critic(tiny_folder: Path) -> RewardModel:
    return critic_of(tiny_folder)


class Recorder:
    """A reward model that remembers what it was asked."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.asked: list[tuple[Any, list[str], list[bool], list[float]]] = []

    def score(
        self, prompts: Sequence[Sequence[Mapping[str, Any]]], texts: Sequence[str], *, complete: Sequence[bool]
    ) -> list[float]:
        rewards = self.model.score(prompts, texts, complete=complete)
        self.asked.append((prompts[0], list(texts), list(complete), rewards))
        return rewards


def test_the_best_of_the_samples_is_kept(patient: LoadedModel, critic: RewardModel) -> None:
    recorder = Recorder(critic)
    requests = [ask(text, temperature=1.0, seed=seed, max_new_tokens=30) for seed, text in enumerate(TEXTS)]
    order: list[int] = []
    decoder = BestOfN(GuidedDecoder(patient), recorder, 5)
    done = decoder.generate(requests, on_done=lambda index, _: order.append(index))
    assert sorted(order) == [0, 1, 2, 3]
    by_prompt = {prompt[0]["content"]: (texts, ends, rewards) for prompt, texts, ends, rewards in recorder.asked}
    for request, best in zip(requests, done, strict=True):
        texts, ends, rewards = by_prompt[request.messages[0]["content"]]
        assert len(set(texts)) == 5, "samples of one request differ"
        assert best.text == texts[int(np.argmax(rewards))]
        assert ends[texts.index(best.text)] == (best.finish_reason == "stop")
        assert best.kl_bound == pytest.approx(math.log(5) - 0.8)
        assert best.guide_forwards == best.patient_forwards >= 5
    assert any(True in ends for _, ends, _ in by_prompt.values())
    again = BestOfN(GuidedDecoder(patient), critic, 5).generate(requests[:1])[0]
    assert again.token_ids == done[0].token_ids


def test_a_request_that_is_given_up_is_not_judged(patient: LoadedModel, critic: RewardModel) -> None:
    """The second one, after some rounds: the first goes on as it would have, the second ends where it was."""
    recorder = Recorder(critic)
    inner = GuidedDecoder(patient)
    inner.encoder.stop_ids = frozenset()
    requests = [ask(text, temperature=1.0, seed=seed, max_new_tokens=12) for seed, text in enumerate(TEXTS[:2])]
    whole = BestOfN(inner, critic, 3).generate(requests)
    rounds: list[int] = []
    heard: dict[int, Completion] = {}

    def cancelled(index: int) -> bool:
        rounds.append(index)
        return index == 1 and rounds.count(1) > 3 * 5

    done = BestOfN(inner, recorder, 3).generate(requests, on_done=heard.__setitem__, cancelled=cancelled)
    assert set(rounds) == {0, 1}
    assert heard == dict(enumerate(done))
    assert (done[0].token_ids, done[0].kl_bound) == (whole[0].token_ids, whole[0].kl_bound)
    assert done[1].finish_reason == "cancelled"
    assert 0 < len(done[1].token_ids) < 12
    assert len(recorder.asked) == 1


def sample(tokens: int, logp: float = -1.0, patient_logp: float = -1.0) -> Completion:
    return Completion(
        "",
        token_ids=list(range(tokens)),
        drawn_logps=[logp] * tokens,
        patient_logps=[patient_logp] * tokens,
        patient_forwards=tokens,
        guide_forwards=10,
    )


def test_choose_counts_all_samples() -> None:
    """Three samples of 2, 4 and 3 tokens, the second and third equally good; log 3 − 2/3 = 0.4319."""
    samples = [sample(2), sample(4, -0.5), sample(3)]
    (best,) = choose([samples], [[0.0, 1.0, 1.0]])
    assert best.token_ids == [0, 1, 2, 3]
    assert best.patient_forwards == 9
    assert best.guide_forwards == 30 + 9
    assert best.kl_bound == pytest.approx(0.43195 + 4 * 0.5, abs=1e-4)
    assert samples[1].kl_bound is None, "the samples stay as they were"


def test_the_bound_is_above_the_exact_kl_and_near_it_where_no_outcome_is_common() -> None:
    """The best of n of a discrete distribution sorted by reward: q_i = C_i^n − C_{i−1}^n, C the running sum."""
    draw = np.random.default_rng(0)
    for n in (1, 2, 4, 16):
        for size, close in ((5, False), (20_000, True)):
            p = draw.dirichlet(np.ones(size))
            running = np.concatenate([[0.0], p.cumsum()])
            q = np.diff(running**n)
            exact = float((q[q > 0] * np.log(q[q > 0] / p[q > 0])).sum())
            assert exact <= best_of_n_kl(n) + 1e-9
            if close:
                assert exact == pytest.approx(best_of_n_kl(n), abs=1e-2)


def test_what_is_refused(patient: LoadedModel, critic: RewardModel) -> None:
    with pytest.raises(UserError, match="at least 1 sample, got n = 0"):
        BestOfN(GuidedDecoder(patient), critic, 0)
    with pytest.raises(UserError, match="the temperature must be above 0"):
        BestOfN(GuidedDecoder(patient), critic, 2).generate([ask("Hi")])
    with pytest.raises(UserError, match="no samples to choose from"):
        choose([[]], [[]])
    with pytest.raises(UserError, match="reward is nan; expected a finite number"):
        choose([[sample(1)]], [[math.nan]])
    inner = CARDS(patient, critic, CARDSOptions(0.0))
    with pytest.raises(UserError, match="whose log-probabilities are known, not a bound"):
        BestOfN(inner, critic, 2).generate([ask("Hi", temperature=1.0, max_new_tokens=2)])


def test_any_decoder_makes_samples(patient: LoadedModel, critic: RewardModel) -> None:
    inner = ARGS(patient, critic, top_k=4)
    best = BestOfN(inner, critic, 3).generate([ask("Hi", temperature=1.0, max_new_tokens=4)])[0]
    assert best.kl_bound == pytest.approx(best_of_n_kl(3) + sum(best.logps) - sum(best.patient_logps))
    assert best.guide_forwards == 4 * best.patient_forwards + best.patient_forwards
    assert BestOfN(inner, critic, 1).generate([ask("Hi", max_new_tokens=0)])[0].finish_reason == "length"
