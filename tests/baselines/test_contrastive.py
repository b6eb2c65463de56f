"""Contrastive search against a loop without a cache."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.baselines.tools import TEXTS, ask, load, log_probs, same

from llmdoctor.baselines.contrastive import ContrastiveSearch
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Request
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder)


@torch.no_grad()
def naive(
    patient: LoadedModel, prompt: list[int], length: int, penalty: float, top_k: int, stops: frozenset[int]
) -> list[int]:
    """The paper's equation 5 token by token: every candidate's whole text is run anew."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length:
        probabilities, candidates = log_probs(patient, ids).exp().topk(top_k)
        scores = []
        for probability, token in zip(probabilities.tolist(), candidates.tolist(), strict=True):
            hidden = patient.model.get_decoder()(input_ids=torch.tensor([[*ids, token]]), use_cache=False)
            states = hidden.last_hidden_state[0].double()
            cosines = torch.nn.functional.cosine_similarity(states[-1:], states[:-1])
            scores.append((1 - penalty) * probability - penalty * float(cosines.max()))
        ids.append(int(candidates[max(range(top_k), key=scores.__getitem__)]))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(("penalty", "top_k"), [(0.6, 5), (0.3, 3), (1.0, 4)])
def test_it_is_the_loop_without_a_cache(patient: LoadedModel, penalty: float, top_k: int) -> None:
    decoder = ContrastiveSearch(patient, penalty=penalty, top_k=top_k)
    requests = [ask(text) for text in TEXTS]
    greedy = GuidedDecoder(patient).generate(requests)
    done = decoder.generate(requests)
    for request, one in zip(requests, done, strict=True):
        prompt = decoder.encoder.prompt_ids(request.messages)
        assert one.token_ids == naive(patient, prompt, 10, penalty, top_k, decoder.encoder.stop_ids)
        assert one.logps == [0.0] * len(one.token_ids)
        assert (one.patient_forwards, one.guide_forwards) == (top_k * len(one.token_ids), 0)
        for t, token in enumerate(one.token_ids):
            expected = float(log_probs(patient, [*prompt, *one.token_ids[:t]])[token])
            assert one.patient_logps[t] == pytest.approx(expected, abs=1e-3)
    assert [one.token_ids for one in done] != [one.token_ids for one in greedy]


def test_without_penalty_it_is_greedy(patient: LoadedModel) -> None:
    requests = [ask(text, max_new_tokens=20) for text in TEXTS]
    done = ContrastiveSearch(patient, penalty=0.0).generate(requests)
    for one, two in zip(done, GuidedDecoder(patient).generate(requests), strict=True):
        assert (one.token_ids, one.finish_reason, one.text) == (two.token_ids, two.finish_reason, two.text)


def test_a_row_does_not_see_its_batch(patient: LoadedModel) -> None:
    decoder = ContrastiveSearch(patient)
    requests = [
        ask(TEXTS[0], max_new_tokens=2),
        ask(TEXTS[1], max_new_tokens=25),
        ask(TEXTS[2], max_new_tokens=9),
        ask(TEXTS[3], stop=("e", "t"), max_new_tokens=25),
        ask(TEXTS[0], max_new_tokens=0),
        ask(TEXTS[0], max_new_tokens=5, temperature=1.0),
    ]
    alone = [decoder.generate([request])[0] for request in requests]
    assert len({len(one.token_ids) for one in alone}) >= 4
    for one, together in zip(alone, decoder.generate(requests), strict=True):
        same(one, together)


def test_a_broken_model_ends_its_rows(patient: LoadedModel) -> None:
    broken = copy.deepcopy(patient.model)
    decoder = ContrastiveSearch(replace(patient, model=broken))
    with torch.no_grad():
        broken.get_decoder().norm.weight.fill_(torch.nan)
    assert decoder.generate([ask("Hi")])[0].finish_reason == "error"


def test_what_is_refused(patient: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"penalty of contrastive search must be in \[0, 1\], got 1.5"):
        ContrastiveSearch(patient, penalty=1.5)
    with pytest.raises(UserError, match="at least 1 candidate, got top_k 0"):
        ContrastiveSearch(patient, top_k=0)
    with pytest.raises(UserError, match=r"contrastive search has no temperature; leave it at 1.0, got 0.5"):
        ContrastiveSearch(patient).generate([ask("Hi", temperature=0.5)])
    with pytest.raises(UserError, match="contrastive search takes no doctors"):
        ContrastiveSearch(patient).generate([Request.from_text("Hi", alpha=0.5)])
