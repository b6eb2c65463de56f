"""ARGS against a brute-force scoring of all candidates."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.baselines.tools import TEXTS, ask, chi_square, critic_of, load, log_probs, other, same
from torch import Tensor

from llmdoctor.baselines.args import ARGS
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Request
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.reward_model import RewardModel


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder)


@pytest.fixture(scope="module")
def critic(tiny_folder: Path) -> RewardModel:
    return critic_of(tiny_folder)


def brute(
    patient: LoadedModel, critic: RewardModel, prompt: list[int], answer: list[int], weight: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Candidates [K] and their scores [K] in float64, every candidate's whole text scored from scratch."""
    logps, candidates = log_probs(patient, [*prompt, *answer]).topk(top_k)
    rewards = critic.score_ids([prompt] * top_k, [[*answer, token] for token in candidates.tolist()])
    return candidates, logps + weight * torch.tensor(rewards, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_every_choice_is_the_brute_force_one(patient: LoadedModel, critic: RewardModel, temperature: float) -> None:
    decoder = ARGS(patient, critic, weight=1.5, top_k=6)
    requests = [ask(text, temperature=temperature, seed=3) for text in TEXTS]
    changed = 0
    for request, done in zip(requests, decoder.generate(requests), strict=True):
        prompt = decoder.encoder.prompt_ids(request.messages)
        for t, token in enumerate(done.token_ids):
            candidates, scores = brute(patient, critic, prompt, done.token_ids[:t], 1.5, 6)
            own = log_probs(patient, [*prompt, *done.token_ids[:t]])
            assert done.patient_logps[t] == pytest.approx(float(own[token]), abs=1e-3)
            if temperature == 0:
                assert token == int(candidates[scores.argmax()])
                assert done.logps[t] == 0.0
            else:
                place = candidates.tolist().index(token)
                expected = (scores / temperature).log_softmax(-1)[place]
                assert done.logps[t] == pytest.approx(float(expected), abs=5e-3)
            changed += token != int(own.argmax())
        assert (done.patient_forwards, done.guide_forwards) == (len(done.token_ids), 6 * len(done.token_ids))
        assert done.kl_bound is None
    assert changed >= 5, "the reward model should have had its way now and then"


def test_draws_follow_the_distribution(patient: LoadedModel, critic: RewardModel) -> None:
    decoder = ARGS(patient, critic, weight=1.0, top_k=8, max_batch_size=500)
    done = decoder.generate([ask("Hi", max_new_tokens=1, temperature=1.0, seed=seed) for seed in range(2000)])
    prompt = decoder.encoder.prompt_ids(ask("Hi").messages)
    candidates, scores = brute(patient, critic, prompt, [], 1.0, 8)
    expected = torch.zeros(300, dtype=torch.float64).scatter(0, candidates, scores.softmax(-1))
    statistic, freedom = chi_square([one.token_ids[0] for one in done], expected)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def mixed() -> list[Request]:
    return [
        ask(TEXTS[0], max_new_tokens=3),
        ask(TEXTS[1], temperature=1.0, seed=1, max_new_tokens=25),
        ask(TEXTS[2], temperature=0.7, seed=2, max_new_tokens=7),
        ask(TEXTS[3], stop=("e", "t"), max_new_tokens=25),
        ask(TEXTS[0], max_new_tokens=0),
        ask(TEXTS[0], temperature=1.0, seed=4, max_new_tokens=1),
    ]


def test_a_row_does_not_see_its_batch(patient: LoadedModel, critic: RewardModel) -> None:
    decoder = ARGS(patient, critic)
    alone = [decoder.generate([request])[0] for request in mixed()]
    order: list[int] = []
    for one, together in zip(alone, decoder.generate(mixed(), on_done=lambda i, _: order.append(i)), strict=True):
        same(one, together)
    assert sorted(order) == list(range(6))
    assert {one.finish_reason for one in alone} >= {"stop", "length"}


def test_without_weight_greedy_is_the_patients(patient: LoadedModel, critic: RewardModel) -> None:
    requests = [ask(text, max_new_tokens=20) for text in TEXTS]
    for one, two in zip(
        ARGS(patient, critic, weight=0.0).generate(requests), GuidedDecoder(patient).generate(requests), strict=True
    ):
        assert (one.token_ids, one.finish_reason) == (two.token_ids, two.finish_reason)


def test_a_broken_model_ends_its_rows(patient: LoadedModel, critic: RewardModel) -> None:
    broken = copy.deepcopy(critic.model)
    bad = RewardModel(broken, critic.tokenizer, "bad", critic.fingerprint)
    with torch.no_grad():
        broken.score.weight.fill_(torch.nan)
    done = ARGS(patient, bad).generate([ask("Hi")])[0]
    assert (done.finish_reason, done.token_ids, done.logps) == ("error", [], [])


def test_what_is_refused(patient: LoadedModel, critic: RewardModel, tiny_folder: Path) -> None:
    decoder = ARGS(patient, critic)
    with pytest.raises(UserError, match="ARGS takes no doctors"):
        decoder.generate([Request.from_text("Hi", betas={"kind": 1.0})])
    with pytest.raises(UserError, match=r"ARGS has no top_p; leave it at 1.0, got 0.5"):
        decoder.generate([ask("Hi", top_p=0.5)])
    with pytest.raises(UserError, match="the context of 512 leaves no room"):
        decoder.generate([ask("zebra " * 400)])
    with pytest.raises(UserError, match="needs at least 1 candidate, got top_k 0"):
        ARGS(patient, critic, top_k=0)
    with pytest.raises(UserError, match="max_batch_size must be at least 1, got 0"):
        ARGS(patient, critic, max_batch_size=0)
    strange: Any = replace(other(tiny_folder), fingerprint={"tokenizer": "another"})
    with pytest.raises(UserError, match="must share the vocabulary"):
        ARGS(strange, critic)
    assert decoder.generate([]) == []
