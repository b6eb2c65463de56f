"""Transfer-Q against continuations and scores made one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.baselines.tools import TEXTS, ask, critic_of, load, log_probs, other, same

from llmdoctor.baselines.args import ARGS
from llmdoctor.baselines.transfer_q import TransferQ
from llmdoctor.decoding import reward_lane
from llmdoctor.decoding.request import Request
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.reward_model import RewardModel


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder)


@pytest.fixture(scope="module")
def aligned(tiny_folder: Path) -> LoadedModel:
    return other(tiny_folder, seed=7)


@pytest.fixture(scope="module")
def critic(tiny_folder: Path) -> RewardModel:
    return critic_of(tiny_folder)


def greedy_end(model: LoadedModel, prompt: list[int], start: list[int], limit: int, stops: frozenset[int]) -> list[int]:
    path = list(start)
    while len(path) < limit and path[-1] not in stops:
        path.append(int(log_probs(model, [*prompt, *path]).argmax()))
    return path


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rollout_tokens", [None, 2])
def test_every_value_is_the_reward_of_the_continuation(
    patient: LoadedModel, aligned: LoadedModel, critic: RewardModel, temperature: float, rollout_tokens: int | None
) -> None:
    decoder = TransferQ(
        patient,
        aligned,
        critic,
        strength=0.8,
        top_k=4,
        rollout_tokens=rollout_tokens,
        rollout_temperature=0.0,
    )
    requests = [ask(text, temperature=temperature, seed=2, max_new_tokens=6) for text in TEXTS[:3]]
    changed = 0
    for request, done in zip(requests, decoder.generate(requests), strict=True):
        prompt = decoder.encoder.prompt_ids(request.messages)
        forwards = 0
        for t, token in enumerate(done.token_ids):
            before = done.token_ids[:t]
            logps, candidates = log_probs(patient, [*prompt, *before]).topk(4)
            limit = 6 if rollout_tokens is None else min(6, t + 1 + rollout_tokens)
            paths = [
                greedy_end(aligned, prompt, [*before, v], limit, decoder.encoder.stop_ids) for v in candidates.tolist()
            ]
            forwards += 2 + 2 * sum(len(path) - t for path in paths)
            scores = logps + 0.8 * torch.tensor(critic.score_ids([prompt] * 4, paths), dtype=torch.float64)
            if temperature == 0:
                assert token == int(candidates[scores.argmax()])
                assert done.logps[t] == 0.0
            else:
                expected = float(scores.log_softmax(-1)[candidates.tolist().index(token)])
                assert done.logps[t] == pytest.approx(expected, abs=5e-3)
            assert done.patient_logps[t] == pytest.approx(float(logps[candidates.tolist().index(token)]), abs=1e-3)
            changed += token != int(candidates[0])
        assert (done.patient_forwards, done.guide_forwards) == (len(done.token_ids), forwards)
    assert changed >= 2


def test_without_continuations_it_is_args(patient: LoadedModel, aligned: LoadedModel, critic: RewardModel) -> None:
    requests = [ask(text, temperature=t, seed=4) for text in TEXTS for t in (0.0, 1.0)]
    bare = TransferQ(patient, aligned, critic, strength=1.2, top_k=5, rollout_tokens=0)
    for one, two in zip(
        bare.generate(requests), ARGS(patient, critic, weight=1.2, top_k=5).generate(requests), strict=True
    ):
        assert one.token_ids == two.token_ids
        assert one.logps == pytest.approx(two.logps, abs=1e-3)


def test_a_row_does_not_see_its_batch(patient: LoadedModel, aligned: LoadedModel, critic: RewardModel) -> None:
    """With drawn continuations, which come from the row's own random numbers."""
    decoder = TransferQ(patient, aligned, critic, top_k=3, max_batch_size=4)
    requests = [
        ask(TEXTS[0], temperature=1.0, seed=1, max_new_tokens=3),
        ask(TEXTS[1], temperature=1.0, seed=2, max_new_tokens=9),
        ask(TEXTS[2], temperature=0.0, seed=3, max_new_tokens=6),
        ask(TEXTS[3], temperature=1.0, seed=4, stop=("e", "t"), max_new_tokens=12),
        ask(TEXTS[0], max_new_tokens=0),
    ]
    alone = [decoder.generate([request])[0] for request in requests]
    for one, together in zip(alone, decoder.generate(requests), strict=True):
        same(one, together)


def test_a_large_tree_is_read_piece_by_piece(
    patient: LoadedModel, aligned: LoadedModel, critic: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = TransferQ(patient, aligned, critic, top_k=3, rollout_temperature=0.0)
    requests = [ask(text, temperature=1.0, seed=5, max_new_tokens=8) for text in TEXTS[:2]]
    whole = decoder.generate(requests)
    monkeypatch.setattr(reward_lane, "_TREE_PIECE", 4)
    for one, other_one in zip(whole, decoder.generate(requests), strict=True):
        same(one, other_one)


def test_a_full_context(patient: LoadedModel, aligned: LoadedModel, critic: RewardModel) -> None:
    """Neither the answer nor a continuation passes the end of the context."""
    decoder = TransferQ(patient, aligned, critic, top_k=2, rollout_temperature=0.0)
    length = len(decoder.encoder.prompt_ids(ask("").messages))
    text = "7" * (512 - length - 3)
    assert len(decoder.encoder.prompt_ids(ask(text).messages)) == 509
    done = decoder.generate([ask(text, max_new_tokens=50)])[0]
    assert done.finish_reason in ("context", "stop")
    assert len(done.token_ids) <= 3


def test_what_is_refused(patient: LoadedModel, aligned: LoadedModel, critic: RewardModel) -> None:
    with pytest.raises(UserError, match="at least 1 candidate, got top_k 0"):
        TransferQ(patient, aligned, critic, top_k=0)
    with pytest.raises(UserError, match="rollout_tokens must be at least 0, or None to continue to the end, got -1"):
        TransferQ(patient, aligned, critic, rollout_tokens=-1)
    with pytest.raises(UserError, match="rollout_temperature must be at least 0, got -1"):
        TransferQ(patient, aligned, critic, rollout_temperature=-1)
    with pytest.raises(UserError, match="Transfer-Q takes no doctors"):
        TransferQ(patient, aligned, critic).generate([Request.from_text("Hi", betas={"kind": 1.0})])
    with pytest.raises(UserError, match="Transfer-Q has no top_k; leave it at 0, got 5"):
        TransferQ(patient, aligned, critic).generate([ask("Hi", top_k=5)])
