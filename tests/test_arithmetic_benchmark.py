"""The benchmark beside `model_arithmetic`, without a checkout: what it says that our decoder draws from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.arithmetic import drawn_from, texts
from tests.tiny import fresh_doctor, load, save_tiny, shaken

from llmdoctor.decoding.adapter import Adapter
from llmdoctor.decoding.guides import Guide
from llmdoctor.models.doctor import ADAPTER_FOLDER, Doctor
from llmdoctor.models.loading import LoadedModel


@pytest.fixture(scope="module")
def patient_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A context that has room for the shipped prompts, byte by byte."""
    folder = tmp_path_factory.mktemp("arithmetic") / "patient"
    save_tiny(folder, tiny_tokenizer, context=2048)
    return folder


@pytest.fixture(scope="module")
def doctor_folder(patient_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic") / "doctor"
    shaken(fresh_doctor(load(patient_folder))).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: LoadedModel, ids: list[int]) -> torch.Tensor:
    """[V] after `ids`: the whole sequence in float32, one row, no cache; added up and normalised in float64."""
    found: torch.Tensor = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    return found


@pytest.mark.parametrize("apart", [True, False])
def test_what_is_drawn_from_is_the_product(patient_folder: Path, doctor_folder: Path, apart: bool) -> None:
    """softmax(z_patient + z_doctor) along forced tokens; the doctor as a model apart, and in the patient's pass."""
    patient = load(patient_folder)
    merged = Doctor.from_pretrained(doctor_folder, base=load(patient_folder)).merged()
    adapter = Adapter.load(doctor_folder / ADAPTER_FOLDER, patient.model)
    guide = Guide("it", merged) if apart else Guide("it", patient, adapter=adapter)
    width = patient.model.get_output_embeddings().weight.shape[0]
    tokens = torch.randint(3, width, (4, 3), generator=torch.Generator().manual_seed(0))
    found, prompts = drawn_from(patient, guide, tokens)
    assert found.shape == (4, 3, width)
    for row, prompt in enumerate(prompts):
        for place in range(4):
            ids = [*prompt, *tokens[:place, row].tolist()]
            expected = (logits(patient, ids) + logits(merged, ids)).softmax(-1)
            torch.testing.assert_close(found[place, row].double(), expected, rtol=1e-4, atol=1e-6)
            # The patient alone says something else, so that leaving the doctor out would be seen.
            assert (expected - logits(patient, ids).softmax(-1)).abs().max() > 1e-3


def test_texts_are_the_prompts(patient_folder: Path) -> None:
    """Behind the first token, which their decoder puts there itself, they are the ids that ours reads."""
    patient = load(patient_folder)
    _, prompts = drawn_from(patient, Guide("it", load(patient_folder)), torch.ones(1, 2, dtype=torch.long))
    first, encode = patient.tokenizer.bos_token_id, patient.tokenizer.encode
    assert [[first, *encode(text, add_special_tokens=False)] for text in texts(patient, 2)] == prompts


def test_a_checkout_that_is_none_is_told(tmp_path: Path) -> None:
    """The other process' reason stands above, and the end says what failed."""
    command = [sys.executable, "-m", "benchmarks.arithmetic", "--quick", "--source", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "their decoder failed at 'about', for the reason above" in done.stderr
