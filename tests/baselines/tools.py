"""What the tests of the decoders share: a patient, a reward model of other weights, requests, and the slow ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import fresh_doctor, load, shaken
from torch import Tensor

from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.reward_model import RewardModel, base_classifier

TEXTS = ["Hi", "the cat sat on the mat and the dog ran", "zebra? é 7", "how are you today, and " * 3]


def other(folder: Path, seed: int = 1) -> LoadedModel:
    """A model of the same vocabulary that is not quite the patient."""
    return shaken(fresh_doctor(load(folder)), seed=seed).merged()


def critic_of(folder: Path, scale: float = 3.0) -> RewardModel:
    """A reward model whose rewards differ by about `scale`."""
    base = other(folder, seed=5)
    model = base_classifier(base, seed=3)
    # Hidden states are of unit size in every dimension, so a weight of length `scale` gives rewards of that spread.
    model.score.weight.mul_(scale / model.score.weight.norm())
    return RewardModel(model, base.tokenizer, "critic", dict(base.fingerprint))


def ask(text: str, **sampling: Any) -> Request:
    return Request.from_text(text, sampling=SamplingParams(**{"max_new_tokens": 10, "temperature": 0.0, **sampling}))


def same(one: Completion, other: Completion) -> None:
    assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
    assert one.logps == pytest.approx(other.logps, abs=1e-3)
    assert one.patient_logps == pytest.approx(other.patient_logps, abs=1e-3)
    assert one.drawn_logps == pytest.approx(other.drawn_logps, abs=1e-3)
    assert (one.patient_forwards, one.guide_forwards) == (other.patient_forwards, other.guide_forwards)
    assert (one.kl_bound is None) == (other.kl_bound is None)
    if one.kl_bound is not None:
        assert one.kl_bound == pytest.approx(other.kl_bound, abs=1e-3)


@torch.no_grad()
def log_probs(loaded: LoadedModel, ids: list[int]) -> Tensor:
    """[V] log-probabilities of the next token, from a whole forward pass."""
    return loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)


def chi_square(drawn: list[int], expected: Tensor) -> tuple[float, int]:
    """Pearson's statistic of draws against probabilities [V], rare tokens in one class; and its degrees of freedom."""
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double()
    wanted = len(drawn) * expected / expected.sum()
    assert counts[wanted == 0].sum() == 0
    common = wanted >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([wanted[common], wanted[~common].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    return float(((observed - wanted).square() / wanted).sum()), len(wanted) - 1
