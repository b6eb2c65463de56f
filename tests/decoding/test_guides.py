"""A doctor's folder as a guide, and whom it may guide."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import OTHER_CORPUS, byte_level, fresh_doctor, load, save_tiny, shaken
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide, lanes_of, load_guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder)


def ask(text: str, betas: dict[str, float]) -> Request:
    return Request.from_text(text, betas=betas, sampling=SamplingParams(max_new_tokens=12, temperature=0.0))


def test_load_guide(tiny_folder: Path, tmp_path: Path, patient: LoadedModel) -> None:
    doctor = shaken(fresh_doctor(load(tiny_folder), dimension="kind"))
    doctor.save_pretrained(tmp_path / "doctor")
    options = {"dtype": "float32", "device": "cpu"}
    guide = load_guide(tmp_path / "doctor", patient, **options)
    assert (guide.name, guide.reference) == ("kind", "patient")
    direct = Guide("kind", doctor.merged(), "patient")
    request = ask("Hi", betas={"kind": 1.5})
    loaded, given = (GuidedDecoder(patient, [g]).generate([request])[0] for g in (guide, direct))
    assert loaded.token_ids == given.token_ids
    assert loaded.logps == pytest.approx(given.logps, abs=1e-4)
    assert load_guide(tmp_path / "doctor", patient, name="k", form="product", **options).name == "k"
    assert load_guide(tmp_path / "doctor", patient, form="product", **options).reference is None
    bigger = replace(patient, fingerprint={**patient.fingerprint, "model": "another"})
    reference = load_guide(tmp_path / "doctor", bigger, **options).reference
    assert isinstance(reference, LoadedModel)
    assert reference.fingerprint == patient.fingerprint
    with pytest.raises(UserError, match="form must be one of ratio, product, got 'sum'"):
        load_guide(tmp_path / "doctor", patient, form="sum", **options)


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "whole"])
def test_a_quantised_patient_is_not_the_base_that_a_doctor_was_trained_on(
    tiny_folder: Path, tmp_path: Path, lora: bool
) -> None:
    """Else the ratio would also say what was lost when its weights were rounded."""
    shaken(fresh_doctor(load(tiny_folder), dimension="kind", lora=lora)).save_pretrained(tmp_path / "doctor")
    exact, rounded = load(tiny_folder), load(tiny_folder)
    for parameter in rounded.model.parameters():
        parameter.data.mul_(1.05)
    rounded.model.is_quantized = True
    patient = LoadedModel.of(rounded.model, rounded.tokenizer, tiny_folder)
    options = {"dtype": "float32", "device": "cpu"}
    guide = load_guide(tmp_path / "doctor", patient, **options)
    assert isinstance(guide.reference, LoadedModel)
    assert guide.reference.model is not patient.model
    request = replace(ask("Hi", betas={"kind": 1.5}), alpha=1e-6)
    beside, alone = (
        GuidedDecoder(one, [load_guide(tmp_path / "doctor", one, **options)]).generate([request])[0]
        for one in (patient, exact)
    )
    assert beside.logps == pytest.approx(alone.logps, abs=1e-3), "what the doctor says is the same beside both"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_loaded_works_as_the_patient_does(tiny_folder: Path, tmp_path: Path, dtype: str) -> None:
    """One of the two is not what auto means here; what is asked for is heard."""
    shaken(fresh_doctor(load(tiny_folder), dimension="kind")).save_pretrained(tmp_path / "doctor")
    patient = load_model(tiny_folder, dtype=dtype, device="cpu")
    patient.fingerprint["model"] = "another"
    assert str(load_guide(tmp_path / "doctor", patient).model.model.dtype) == f"torch.{dtype}"
    assert load_guide(tmp_path / "doctor", patient, dtype=torch.float16).model.model.dtype == torch.float16


def test_a_whole_doctors_reference_is_what_it_was_trained_on(
    tiny_folder: Path, tmp_path: Path, patient: LoadedModel
) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    shaken(fresh_doctor(load(base), lora=False)).save_pretrained(tmp_path / "doctor")
    other = replace(patient, fingerprint={**patient.fingerprint, "model": "another"})
    options = {"dtype": "float32", "device": "cpu"}
    assert isinstance(load_guide(tmp_path / "doctor", other, **options).reference, LoadedModel)
    shutil.copytree(save_tiny(tmp_path / "x", patient.tokenizer, seed=9), base, dirs_exist_ok=True)
    with pytest.raises(UserError, match="give it the base it was trained on"):
        load_guide(tmp_path / "doctor", other, **options)
    load_guide(tmp_path / "doctor", other, form="product", **options)


def test_another_vocabulary_is_translated(
    tiny_folder: Path, tmp_path: Path, patient: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Its reference is its own base; rewards of a patient of yet another tokenizer are worth a warning."""
    other = save_tiny(tmp_path / "other", byte_level(320, OTHER_CORPUS), seed=4)
    doctor = fresh_doctor(load(other), dimension="kind")
    doctor.doctor_config.rewards_fingerprint = {"tokenizer": patient.fingerprint["tokenizer"]}
    doctor.save_pretrained(tmp_path / "doctor")
    options = {"dtype": "float32", "device": "cpu"}
    guide = load_guide(tmp_path / "doctor", patient, **options)
    assert isinstance(guide.reference, LoadedModel)
    assert guide.reference.fingerprint == guide.model.fingerprint == load(other).fingerprint
    assert not caplog.records
    lanes, guides, references = lanes_of(patient, [guide, Guide("own", patient, "patient")])
    assert guides == [(1, 0), (0, 0)]
    assert references == [(2, 0), (0, 0)]
    assert [lane.translation is None for lane in lanes] == [True, False, False]
    stranger = replace(patient, fingerprint={**patient.fingerprint, "tokenizer": "feedbeef"})
    load_guide(tmp_path / "doctor", stranger, **options)
    assert [record.getMessage() for record in caplog.records] == [
        f"the doctor {tmp_path / 'doctor'} was trained on the rewards of a patient with another tokenizer "
        f"({patient.fingerprint['tokenizer']}) than {patient.spec} has (feedbeef)"
    ]


def test_a_vocabulary_that_cannot_be_translated(tmp_path: Path, patient: LoadedModel) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    words = load(save_tiny(tmp_path / "words", tokenizer, extra_rows=8))
    with pytest.raises(UserError, match="cannot be read as bytes"):
        GuidedDecoder(patient, [Guide("words", words)])
