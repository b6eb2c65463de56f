"""The GPU's benchmark, rehearsed on a CPU: it must run before somebody has a GPU to run it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu

from llmdoctor.decoding.pace import Pace
from llmdoctor.decoding.tree import Tree
from llmdoctor.models.layers import weights_read


def test_a_rehearsal_measures_everything_but_memory(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--tiny", "--tokenizer", str(tiny_folder), "--output", str(output)])
    printed = capsys.readouterr().out.splitlines()
    assert "timings only" in printed[0]
    found = json.loads(output.read_text(encoding="utf-8"))
    rows = found.pop("rows")
    assert json.loads(printed[-1]) == found
    assert (found["benchmark"], found["tiny"], found["skipped"]) == ("gpu", True, {})
    assert list(found["patients"]) == ["tiny-qwen", "tiny-llama"]
    assert len(rows) == 2 * 2 * 13
    for patient in found["patients"].values():
        for name in ("patient_vs_transformers", "cost_ratio", "guided_vs_patient", "guided_vs_logits_processor"):
            assert set(patient[name]) == {"1", "4"}
        for name in (
            "speculative_vs_patient", "speculative_vs_guided", "speculation", "speculative_small_vs_patient",
            "speculative_small_vs_guided_small", "speculation_small",
        ):  # fmt: skip
            assert set(patient[name]) == {"0.5", "0.7", "0.8"}
        assert patient["memory_ratio"] is None
        # More than the tokenizer's: tokens that it does not know are decoded, too.
        assert patient["vocabulary"] == 512


def test_a_cut_leaves_what_was_done(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second patient is cut; the first one's rows are there, and say where they were measured."""
    own, output = gpu.measure, tmp_path / "gpu.json"

    def cut(kit: Any, name: str, *args: Any) -> Any:
        if name == "tiny-llama":
            raise KeyboardInterrupt
        return own(kit, name, *args)

    monkeypatch.setattr(gpu, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--tiny", "--tokenizer", str(tiny_folder), "--output", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert {row["patient"] for row in found["rows"]} == {"tiny-qwen"}
    assert found.keys() >= {"machine", "commit", "tiny", "patients"}


@pytest.mark.parametrize("by", ["draft", "doctors"])
def test_guesses_hold_as_often_as_they_are_told(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """1 200 tokens in four rows; at 0 none of the first candidates holds, at 1 all do."""
    # Left to the clock, a busy machine guesses so seldom that chance decides.
    monkeypatch.setattr(Pace, "choose", lambda self, rows: Tree((0, 1), (0, 0)))
    kit = gpu.Kit(torch.device("cpu"), gpu.load_tokenizer(str(tiny_folder)))
    patient = kit.model(gpu.shapes(tiny=True)["tiny-llama"], "patient")
    small = kit.model(gpu.small_shape(gpu.shapes(tiny=True)["tiny-llama"]), "small")
    guessing: Any = (kit.apart(small), "doctors") if by == "doctors" else (kit.beside(patient), kit.draft(patient))
    script = [[(7 * place + row) % 300 for place in range(300)] for row in range(4)]
    for asked, low, high in ((0.0, 0.0, 0.0), (0.7, 0.63, 0.77), (1.0, 1.0, 1.0)):
        done: list[gpu.Completion] = []
        work, decoder = gpu.scripted(patient, *guessing, script, asked, 300, done)
        work()
        assert decoder.acceptance is not None
        assert low <= decoder.acceptance <= high
        assert [made.token_ids for made in done] == script


def test_a_patient_that_does_not_fit_is_skipped(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 1000)
    gpu.main(["--device", "cpu", "--tiny", "--tokenizer", str(tiny_folder), "--patients", "tiny-llama"])
    printed = capsys.readouterr().out
    assert "tiny-llama: skipped: it needs about 0 GiB, and 0 are free" in printed
    assert list(json.loads(printed.splitlines()[-1])["skipped"]) == ["tiny-llama"]


def test_without_room_for_a_second_patient_there_is_no_logits_processor(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = gpu.shapes(tiny=True)["tiny-llama"]
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 1.6 * gpu.weight_bytes(config))
    gpu.main(["--device", "cpu", "--tiny", "--tokenizer", str(tiny_folder), "--patients", "tiny-llama"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["patients"]["tiny-llama"]
    assert found["guided_vs_logits_processor"] is None
    assert found["guided_small_vs_logits_processor"] is not None


@pytest.mark.parametrize(("name", "billions"), [("1.5b", 1.54), ("7b", 7.62), ("13b", 13.02)])
def test_shapes_are_those_of_the_models(name: str, billions: float) -> None:
    """Parameters as their cards say; the small doctor reads at most a tenth of the weights."""
    config = gpu.shapes(tiny=False)[name]
    assert gpu.weight_bytes(config) == pytest.approx(2e9 * billions, rel=0.005)
    with torch.device("meta"):
        patient, small = (
            gpu.AutoModelForCausalLM.from_config(shape) for shape in (config, gpu.small_shape(config))
        )  # fmt: skip
    assert weights_read(small) < weights_read(patient) / 10


@pytest.mark.parametrize("given", [["--device", "cpu"], ["--device", "mps", "--tiny"], []])
def test_without_a_gpu_it_says_so_in_one_line(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refused:
        gpu.main(given)
    assert isinstance(refused.value.code, str)
    assert "--device cpu --tiny" in refused.value.code
    assert "\n" not in refused.value.code


def test_unknown_patients_are_refused() -> None:
    with pytest.raises(SystemExit, match="no patient is called 8b; known: tiny-qwen, tiny-llama"):
        gpu.main(["--device", "cpu", "--tiny", "--patients", "tiny-qwen,8b"])
