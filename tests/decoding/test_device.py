"""How often decoding waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.decoding.test_speculation import requests
from tests.tiny import fresh_doctor, load, shaken
from torch import Tensor

from llmdoctor.decoding.controls import Controls
from llmdoctor.decoding.device import fetched, sent
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import load_guide
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.models.draft import DraftModel

ASKS = {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero}


class Far(Tensor):
    """As if on a device: whatever is made of it is there, too, and questions to it are counted."""

    asked = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Far.asked += func in ASKS
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What lanes give out is far."""
    for name in ("step_states", "prefill_states", "grow"):
        own = getattr(Lane, name)

        def away(lane: Lane, *args: Any, own: Any = own) -> Tensor:
            states: Tensor = own(lane, *args)
            return states.as_subclass(Far)  # type: ignore[no-any-return]

        monkeypatch.setattr(Lane, name, away)
    Far.asked = 0
    return iter(())


def test_questions_are_counted() -> None:
    before = Far.asked
    made = torch.ones(3).as_subclass(Far) * 2
    assert isinstance(made, Far)
    assert bool(made.sum() == 6)
    assert made.tolist() == [2.0] * 3
    assert Far.asked == before + 2


@pytest.mark.parametrize("sampling", [
    SamplingParams(), SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
])  # fmt: skip
def test_a_guided_token_waits_twice(far: None, tiny_folder: Path, tmp_path: Path, sampling: SamplingParams) -> None:
    """Once to see that all scores are finite, once for the token and its log-probabilities."""
    patient = load(tiny_folder)
    shaken(fresh_doctor(load(tiny_folder))).save_pretrained(tmp_path / "doctor")
    decoder = GuidedDecoder(patient, [load_guide(tmp_path / "doctor", patient, name="it")])
    decoder.encoder.stop_ids = frozenset()
    asked = []
    for length in (4, 20):
        longer = SamplingParams(**{**vars(sampling), "max_new_tokens": length})
        Far.asked = 0
        texts = ["Hi", "the cat sat"]
        decoder.generate([Request.from_text(text, alpha=0.5, betas={"it": 1.0}, sampling=longer) for text in texts])
        asked.append(Far.asked)
    assert asked[1] - asked[0] == 2 * (20 - 4)


def test_answers_are_the_same_far_away(far: None, tiny_folder: Path) -> None:
    """With guesses and every setting; the numbers cross as they are."""
    patient = load(tiny_folder)
    draft = DraftModel.from_layers(patient.model, [1], torch.arange(100)).requires_grad_(False).eval()
    decoder = GuidedDecoder(patient, max_batch_size=6, draft=draft)
    done = decoder.generate(requests())
    assert Far.asked
    plain = GuidedDecoder(load(tiny_folder), max_batch_size=6).generate(requests())
    assert [one.token_ids for one in done] == [one.token_ids for one in plain]


def test_settings_stay_on_the_host(tiny_folder: Path) -> None:
    patient = load(tiny_folder)
    row = GuidedDecoder(patient)._open(0, Request.from_text("Hi", sampling=SamplingParams(repetition_penalty=1.2)))
    controls = Controls([row, row], ["it"], torch.device("meta"), 300).of([0]).at([3])
    settings = {name: value.device.type for name, value in vars(controls).items() if isinstance(value, Tensor)}
    assert settings.pop("seen") == "meta"
    assert set(settings.values()) == {"cpu"}
    assert settings.keys() >= {"alpha", "betas", "greedy", "temperature"}


def test_what_is_sent_and_fetched_is_the_same() -> None:
    device = torch.device("cpu")
    assert sent([1, 2], device).dtype == torch.int64
    assert sent(torch.tensor([True, False]), device).tolist() == [True, False]
    assert sent([1, 2], device, torch.int32).dtype == torch.int32
    assert fetched(torch.tensor([151_935, 3]), torch.tensor([-0.1, 2.0])) == [
        [151_935.0, 3.0],
        [pytest.approx(-0.1), 2.0],
    ]
