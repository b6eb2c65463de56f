"""Mixing two doctors: weights for a soup; and distributions, which is MOD."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import fresh_doctor, naive_logps, shaken, tensors

from llmdoctor.baselines.merging import reward_soup
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import load_guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.errors import UserError
from llmdoctor.models.doctor import Doctor
from llmdoctor.models.loading import LoadedModel, load_model


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(str(folder), dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def doctors(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two doctors as good as trained; the second also on other modules than the first."""
    folders = [tmp_path_factory.mktemp("doctors") / name for name in ("one", "two")]
    for seed, folder in enumerate(folders, start=1):
        lora = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "up_proj"][: seed + 1]}
        doctor = Doctor.from_base(load(tiny_folder), lora=lora, dimension=folder.name, seed=seed)
        shaken(doctor, seed).save_pretrained(folder)
    return folders


def merged(folder: Path, base: LoadedModel) -> dict[str, torch.Tensor]:
    return tensors(Doctor.from_pretrained(folder, base=base).merged().model)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.3, 0.7)])
def test_a_soup_is_the_weighted_mean_of_the_merged_models(
    tiny_folder: Path, doctors: list[Path], weights: tuple[float, float]
) -> None:
    soup = reward_soup(doctors, weights, load(tiny_folder))
    parts = [merged(folder, load(tiny_folder)) for folder in doctors]
    ours = tensors(soup.model)
    assert ours.keys() == parts[0].keys() == parts[1].keys()
    assert any(not parts[0][name].equal(parts[1][name]) for name in ours)
    for name, value in ours.items():
        expected = sum(weight * part[name].double() for weight, part in zip(weights, parts, strict=True))
        assert torch.allclose(value.double(), expected, rtol=0, atol=1e-6), name


def test_in_bfloat16_it_is_rounded_once(tiny_folder: Path, doctors: list[Path]) -> None:
    """The sum is made in float32: each weight is the nearest bfloat16 to base + Σ w_i δ_i."""
    base = tensors(load(tiny_folder, "bfloat16").model)
    exact = [merged(folder, load(tiny_folder)) for folder in doctors]
    plain = tensors(load(tiny_folder).model)
    soup = tensors(reward_soup(doctors, (0.25, 0.75), load(tiny_folder, "bfloat16")).model)
    for name, value in soup.items():
        delta = 0.25 * (exact[0][name] - plain[name]) + 0.75 * (exact[1][name] - plain[name])
        expected = base[name].float() + delta
        assert value.dtype == torch.bfloat16
        assert ((value.float() - expected).abs() <= expected.abs() * 2**-8 + 1e-5).all(), name


def test_a_soup_is_a_plain_model_of_its_own(tiny_folder: Path, doctors: list[Path]) -> None:
    """It decodes as a patient, and no two soups share a fingerprint."""
    soup = reward_soup(doctors, (0.5, 0.5), load(tiny_folder))
    other = reward_soup(doctors, (0.4, 0.6), load(tiny_folder))
    assert len({soup.fingerprint["model"], other.fingerprint["model"], load(tiny_folder).fingerprint["model"]}) == 3
    assert not hasattr(soup.model, "peft_config")
    assert not any("lora" in name for name in tensors(soup.model))
    assert not any(parameter.requires_grad for parameter in soup.model.parameters())
    request = Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=4))
    done = GuidedDecoder(soup).generate([request])[0]
    prompt = GuidedDecoder(soup).encoder.prompt_ids(request.messages)
    assert torch.tensor(done.logps) == pytest.approx(naive_logps(soup.model, prompt, done.token_ids), abs=1e-4)


def test_mod_draws_from_the_normalised_geometric_mixture(tiny_folder: Path, doctors: list[Path]) -> None:
    """As the comparison has it: ratio guides on the patient itself, whose weights sum to 1.

    π_dec = Π π_i^w_i / Σ_v Π π_i(v)^w_i, in float64 from whole forward passes.
    """
    weights = {"one": 0.3, "two": 0.7}
    patient = load(tiny_folder)
    guides = [load_guide(folder, patient) for folder in doctors]
    sampling = SamplingParams(max_new_tokens=8, seed=3)
    request = Request.from_text("Hello, how are you", sampling=sampling, betas=weights)
    done = GuidedDecoder(patient, guides).generate([request])[0]
    prompt = GuidedDecoder(patient).encoder.prompt_ids(request.messages)
    ids = torch.tensor([[*prompt, *done.token_ids]])
    with torch.no_grad():
        plain = [Doctor.from_pretrained(folder, base=load(tiny_folder)).merged().model for folder in doctors]
        logits = [model(input_ids=ids).logits[0].double() for model in plain]
    mixed = sum(w * one.log_softmax(-1) for w, one in zip(weights.values(), logits, strict=True)).log_softmax(-1)
    expected = [float(mixed[len(prompt) - 1 + t, token]) for t, token in enumerate(done.token_ids)]
    assert done.logps == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("weights", [(0.5, 0.6), (-0.5, 1.5), (float("nan"), 1.0), ()])
def test_weights_that_are_no_mixture(tiny_folder: Path, doctors: list[Path], weights: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="mixture weights must not be negative and must sum to 1, got"):
        reward_soup(doctors, weights, load(tiny_folder))


def test_bad_soups(tiny_folder: Path, doctors: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 doctors need as many weights, got 1"):
        reward_soup(doctors, (1.0,), load(tiny_folder))
    fresh_doctor(load(tiny_folder), lora=False).save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="was trained whole; a soup is made of doctors with LoRA"):
        reward_soup([doctors[0], tmp_path / "whole"], (0.5, 0.5), load(tiny_folder))
    base = load(tiny_folder)
    base.fingerprint = {**base.fingerprint, "model": "another"}
    with pytest.raises(UserError, match=r"but the base at hand is .* \(weights another\)"):
        reward_soup(doctors, (0.5, 0.5), base)
    with pytest.raises(UserError, match="is not a doctor"):
        reward_soup([doctors[0], tmp_path], (0.5, 0.5), load(tiny_folder))
    used = load(tiny_folder)
    fresh_doctor(used)
    with pytest.raises(UserError, match="carries an adapter already"):
        reward_soup(doctors, (0.5, 0.5), used)
