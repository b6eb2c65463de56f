"""What an answer says of its distance to the patient, against whole forward passes and warpers written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import fresh_doctor, shaken
from torch import Tensor

from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.models.loading import LoadedModel, load_model

TEXTS = ["Hi", "the cat sat on the mat and the dog ran", "zebra? é 7"]
WARPERS: list[dict[str, float]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.5},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
]


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def doctor(tiny_folder: Path) -> LoadedModel:
    return shaken(fresh_doctor(load_model(str(tiny_folder), dtype="float32", device="cpu")), seed=1).merged()


@torch.no_grad()
def logits(loaded: LoadedModel, ids: list[int]) -> Tensor:
    """[V] float64: scores of the next token, from a whole forward pass."""
    return loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def warped(scores: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """log of the distribution that is drawn from, [V], token by token as the warpers are defined."""
    chances = (scores / temperature).softmax(-1)
    order = chances.argsort(descending=True).tolist()
    kept: list[int] = order[:top_k] if top_k else order
    total, before, nucleus = sum(float(chances[token]) for token in kept), 0.0, []
    for token in kept:
        if before < top_p:
            nucleus.append(token)
        before += float(chances[token]) / total
    likely = [token for token in nucleus if chances[token] >= min_p * chances[order[0]]]
    mask = torch.full_like(chances, -math.inf)
    mask[likely] = 0.0
    return (chances.log() + mask).log_softmax(-1)


@pytest.mark.parametrize("beta", [0.0, 1.5])
@pytest.mark.parametrize("sampling", WARPERS, ids=str)
def test_kl_is_of_what_was_drawn_from(
    patient: LoadedModel, doctor: LoadedModel, sampling: dict[str, Any], beta: float
) -> None:
    """Σ_t log q(y_t) − log π(y_t), where q is the mixture after warpers: without warpers and guide exactly 0."""
    decoder = GuidedDecoder(patient, [Guide("kind", doctor)])
    requests = [
        Request.from_text(text, betas={"kind": beta}, sampling=SamplingParams(max_new_tokens=8, seed=3, **sampling))
        for text in TEXTS
    ]
    for request, done in zip(requests, decoder.generate(requests), strict=True):
        ids = decoder.encoder.prompt_ids(request.messages)
        drawn, own = [], []
        for token in done.token_ids:
            theirs = logits(patient, ids)
            mixture = theirs.log_softmax(-1) + beta * logits(doctor, ids).log_softmax(-1)
            drawn.append(float(warped(mixture, **sampling)[token]))
            own.append(float(theirs.log_softmax(-1)[token]))
            ids = [*ids, token]
        assert done.drawn_logps == pytest.approx(drawn, abs=1e-3)
        assert done.patient_logps == pytest.approx(own, abs=1e-3)
        assert done.kl == pytest.approx(sum(drawn) - sum(own), abs=5e-3)
        if not sampling and not beta:
            assert done.kl == 0.0


@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_greedy_is_as_far_away_as_its_answer_is_unlikely(
    patient: LoadedModel, doctor: LoadedModel, beta: float
) -> None:
    """A greedy answer is certain, log q = 0, so its KL is −log π(y)."""
    decoder = GuidedDecoder(patient, [Guide("kind", doctor)])
    sampling = SamplingParams(max_new_tokens=8, temperature=0.0)
    requests = [Request.from_text(text, betas={"kind": beta}, sampling=sampling) for text in TEXTS]
    for done in decoder.generate(requests):
        assert done.drawn_logps == [0.0] * len(done.token_ids)
        assert done.kl == pytest.approx(-sum(done.patient_logps))
        assert done.kl > 0


@pytest.mark.parametrize("sampling", [{"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_the_mean_over_answers_is_the_kl(patient: LoadedModel, sampling: dict[str, Any]) -> None:
    """Of one-token answers the KL is a sum over the vocabulary, Σ q log q/π; the mean of 2,000 estimates is near it."""
    decoder = GuidedDecoder(patient, max_batch_size=500)
    requests = [
        Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=1, seed=seed, **sampling))
        for seed in range(2000)
    ]
    found = torch.tensor([done.kl for done in decoder.generate(requests)])
    theirs = logits(patient, decoder.encoder.prompt_ids(requests[0].messages))
    chosen = warped(theirs, **sampling)
    gaps = (chosen - theirs.log_softmax(-1)).where(chosen > -math.inf, torch.tensor(0.0, dtype=torch.float64))
    exact = float((chosen.exp() * gaps).sum())
    assert float(found.mean()) == pytest.approx(exact, abs=4 * float(found.std()) / len(found) ** 0.5 + 1e-4)
