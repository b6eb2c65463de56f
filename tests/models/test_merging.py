"""Several doctors as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import load, shaken, tensors

from llmdoctor.decoding.adapter import Adapter
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import load_guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.errors import UserError
from llmdoctor.models.doctor import Doctor, DoctorConfig
from llmdoctor.models.merging import is_merged_from, merge_doctors


def saved(base: Path, folder: Path, seed: int, dimension: str, **lora: Any) -> Path:
    """A doctor as good as trained."""
    doctor = Doctor.from_base(load(base), lora=lora, dimension=dimension, seed=seed)
    shaken(doctor, seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Doctors of different ranks, scales and layers."""
    folder = tmp_path_factory.mktemp("parts")
    return [
        saved(tiny_folder, folder / "one", 1, "kind", r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
        saved(tiny_folder, folder / "two", 2, "brief", r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"],
              use_rslora=True),
    ]  # fmt: skip


def weights_of(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    return tensors(Doctor.from_pretrained(folder, base=load(base)).merged().model)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (1.0, -1.0), (0.0, 1.0)])
def test_it_adds_up_what_the_parts_changed(
    tiny_folder: Path, parts: list[Path], tmp_path: Path, weights: Sequence[float]
) -> None:
    ours = weights_of(tiny_folder, merge_doctors(parts, weights, tmp_path / "both"))
    plain = tensors(load(tiny_folder).model)
    changes = [weights_of(tiny_folder, folder) for folder in parts]
    changed = 0
    for name, value in ours.items():
        expected = plain[name].double()
        for weight, change in zip(weights, changes, strict=True):
            expected = expected + weight * (change[name].double() - plain[name].double())
        assert torch.allclose(value.double(), expected, rtol=0, atol=1e-6), name
        changed += not torch.allclose(value, plain[name], rtol=0, atol=1e-6)
    assert changed


def test_it_guides_in_the_patients_own_pass(tiny_folder: Path, parts: list[Path], tmp_path: Path) -> None:
    both = merge_doctors(parts, (1.0, 1.0), tmp_path / "both")
    patient = load(tiny_folder)
    adapter = Adapter.load(both / "adapter", patient.model)
    assert adapter is not None
    guide = load_guide(both, patient, name="both", form="product")
    request = Request(
        ({"role": "user", "content": "the cat"},), alpha=0.0, betas={"both": 1.0},
        sampling=SamplingParams(max_new_tokens=12, temperature=0.0),
    )  # fmt: skip
    (guided,) = GuidedDecoder(patient, [guide]).generate([request])
    alone = GuidedDecoder(Doctor.from_pretrained(both, base=load(tiny_folder)).merged())
    (expected,) = alone.generate([Request(request.messages, sampling=request.sampling)])
    assert guided.token_ids == expected.token_ids


def test_it_is_known_by_what_it_is_made_of(tiny_folder: Path, parts: list[Path], tmp_path: Path) -> None:
    both = tmp_path / "both"
    assert not is_merged_from(both, parts, (1.0, 0.5))
    merge_doctors(parts, (1.0, 0.5), both)
    assert is_merged_from(both, parts, (1, 0.5))
    assert not is_merged_from(both, parts, (1.0, 1.0))
    assert not is_merged_from(both, parts[::-1], (1.0, 0.5))
    assert not is_merged_from(parts[0], parts, (1.0, 0.5))


def test_it_says_what_it_is_made_of(tiny_folder: Path, parts: list[Path], tmp_path: Path) -> None:
    config = DoctorConfig.load(merge_doctors(parts, (1.0, 0.5), tmp_path / "both"))
    assert config.dimension == "kind+brief"
    assert [(part["weight"], part["dimension"]) for part in config.training["merged"]] == [(1, "kind"), (0.5, "brief")]
    card = (tmp_path / "both" / "README.md").read_text(encoding="utf-8")
    assert "the adapters of 2 doctors" in card
    assert "| dimension | kind | brief |" in card
    assert "| weight | 1 | 0.5 |" in card
    named = merge_doctors(parts, (1.0, 0.5), tmp_path / "named", dimension="calm")
    assert DoctorConfig.load(named).dimension == "calm"


def test_merging_again_with_one_of_them_is_still_exact(tiny_folder: Path, parts: list[Path], tmp_path: Path) -> None:
    both = merge_doctors(parts, (1.0, 1.0), tmp_path / "both")
    back = weights_of(tiny_folder, merge_doctors([both, parts[1]], (1.0, -1.0), tmp_path / "back"))
    for name, value in weights_of(tiny_folder, parts[0]).items():
        assert torch.allclose(back[name], value, rtol=0, atol=1e-5), name


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (1, (1.0,), "at least two doctors, got 1"),
        (2, (1.0,), "2 doctors need as many weights, got 1"),
        (2, (1.0, float("nan")), "weights must be finite and not all 0, got 1.0, nan"),
        (2, (0.0, 0.0), "not all 0"),
    ],
)
def test_what_does_not_add_up(
    parts: list[Path], tmp_path: Path, count: int, weights: Sequence[float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        merge_doctors(parts[:count], weights, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_other_bases_and_other_adapters_are_refused(tiny_folder: Path, parts: list[Path], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    Doctor.from_base(load(tiny_folder), lora=None).save_pretrained(whole)
    with pytest.raises(UserError, match="was trained whole"):
        merge_doctors([parts[0], whole], (1.0, 1.0), tmp_path / "both")
    dora = saved(tiny_folder, tmp_path / "dora", 3, "kind", r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UserError, match="more than plain LoRA"):
        merge_doctors([parts[0], dora], (1.0, 1.0), tmp_path / "both")
    other = saved(tiny_folder, tmp_path / "other", 4, "kind", r=2, target_modules=["q_proj"])
    path = other / "doctor.json"
    config = json.loads(path.read_text())
    config["base_fingerprint"]["model"] = "another"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="only doctors on one base can be merged"):
        merge_doctors([parts[0], other], (1.0, 1.0), tmp_path / "both")
    assert not (tmp_path / "both").exists()
