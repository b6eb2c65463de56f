"""The benchmark of decoding on tiny models: its last line holds what is promised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.decoding import engine, quartiles
from tests.tiny import fresh_doctor, load, save_tiny, shaken

from llmdoctor.decoding.request import Completion
from llmdoctor.models.draft import DraftModel, save_draft
from llmdoctor.models.loading import load_model

PROMISED = {
    "patient_vs_transformers", "guided_vs_patient", "speculative_vs_patient", "speculative_vs_guided", "cost_ratio",
    "guided_vs_logits_processor",
}  # fmt: skip
OF_SMALL = {
    "small_cost_ratio",
    "small_vs_patient",
    "small_speculative_vs_patient",
    "small_speculative_vs_small",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A patient whose context has room for the prompts, byte by byte; a draft for it; a doctor on its own base."""
    root = tmp_path_factory.mktemp("decoding")
    for name, seed in (("patient", 0), ("base", 1)):
        save_tiny(root / name, tiny_tokenizer, context=2048, seed=seed)
    patient = load(root / "patient")
    save_draft(DraftModel.from_layers(patient.model, [1], torch.arange(300)), patient, {}, root / "draft")
    shaken(fresh_doctor(load(root / "base"))).save_pretrained(root / "doctor")
    return root


def test_every_turn_is_another_batch_and_they_come_round(folder: Path) -> None:
    done: list[Completion] = []
    work = engine(load_model(str(folder / "patient")), [], 2, 5, done=done, prompts=5)
    for turn in range(3):
        work(turn)
    first, second, third = (done[start : start + 2] for start in (0, 2, 4))
    assert [one.token_ids for one in first] == [one.token_ids for one in third]
    assert [one.token_ids for one in first] != [one.token_ids for one in second]
    assert all(len(one.token_ids) == 5 for one in done)
    work(length=3)
    assert [one.token_ids for one in done[6:]] == [one.token_ids[:3] for one in first]


def test_quartiles_are_of_the_rounds_own_ratios() -> None:
    assert quartiles([1.0, 2.0, 4.0, 1.0, 2.0], [5.0, 8.0, 12.0, 2.0, 2.0]) == [2.0, 4.0]


def test_the_last_line_holds_what_is_promised(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "decoding.json"
    given = {"patient": folder / "patient", "draft": folder / "draft", "small": folder / "doctor", "output": output}
    command = [sys.executable, "-m", "benchmarks.decoding", "--quick"]
    command += [word for name, path in given.items() for word in (f"--{name}", str(path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    rows = found.pop("rows")
    assert json.loads(done.stdout.splitlines()[-1]) == found
    sizes = {str(row["batch"]) for row in rows}
    assert len(sizes) == 2
    for name in PROMISED | OF_SMALL:
        assert set(found[name]) == sizes, name
        assert all(value > 0 for value in found[name].values())
        assert all(low <= found[name][size] <= high for size, (low, high) in found["quartiles"][name].items())
    assert 0 <= found["acceptance"] <= 1
    assert found["memory_ratio"] > 0.5
    assert 0 <= found["acceptance_small"] <= 1
    assert {row["way"] for row in rows} >= {"guided", "speculative", "small", "small_speculative"}
