"""The benchmark of throughput on a tiny model: what it counts, what it leaves out, and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from benchmarks import throughput
from benchmarks.decoding import asked
from tests.tiny import load, save_tiny

from llmdoctor.models.draft import DraftModel, save_draft


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A patient whose context has room for the prompts, byte by byte."""
    return save_tiny(tmp_path_factory.mktemp("throughput") / "patient", tiny_tokenizer, context=2048)


@pytest.fixture(scope="module")
def draft(folder: Path) -> Path:
    patient = load(folder)
    path = folder.parent / "draft"
    save_draft(DraftModel.from_layers(patient.model, [1], torch.arange(300)), patient, {}, path)
    return path


def test_all_ways_over_size_and_length_with_a_picture(
    folder: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "throughput.json", tmp_path / "throughput.svg"
    common = ["--quick", "--patient", str(folder), "--draft", str(draft)]
    throughput.main([*common, "--output", str(output), "--plot", str(plot)])
    found = json.loads(output.read_text(encoding="utf-8"))
    rows = found.pop("rows")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    ways = ["patient", "guided", "speculative"]
    assert [(row["over"], row["batch"], row["length"]) for row in rows[::3]] == [
        ("batch", 1, 16), ("batch", 4, 16), ("length", 1, 32), ("length", 1, 64),
    ]  # fmt: skip
    assert [row["way"] for row in rows] == 4 * ways
    assert set(found["tokens_per_second_by_length"]) == set(ways)
    assert set(found["guesses_per_pass_by_batch"]["speculative"]) == {"1", "4"}
    assert all(0 <= row["acceptance"] <= 1 for row in rows if row.get("acceptance") is not None)
    svg = plot.read_text(encoding="utf-8")
    ElementTree.fromstring(svg)
    assert all(name in svg for name in ("guided, guessing ahead", "guesses a pass", "new tokens a row"))
    again = tmp_path / "again.svg"
    throughput.main(["--redraw", str(output), "--plot", str(again)])
    assert again.read_text(encoding="utf-8") == svg


def test_without_a_draft_its_curves_are_left_out_and_it_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    throughput.main(["--quick", "--patient", str(folder), "--plot", "throughput.svg"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("no draft model")
    found = json.loads(printed[-1])
    assert found["draft"] is None
    assert set(found["tokens_per_second_by_batch"]) == {"patient", "guided"}
    svg = Path("throughput.svg").read_text(encoding="utf-8")
    assert "No draft model" in svg
    assert "guessing ahead" not in svg


def test_a_run_that_was_cut_goes_on_after_what_it_had_finished(
    folder: Path, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, part = tmp_path / "throughput.json", tmp_path / "throughput.json.part"
    common = ["--quick", "--patient", str(folder), "--draft", str(draft), "--output", str(output)]

    def cut(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(throughput, "by_length", cut)
        with pytest.raises(KeyboardInterrupt):
            throughput.main(common)
    assert not output.exists()
    before = json.loads(part.read_text(encoding="utf-8"))["rows"]
    with monkeypatch.context() as patched:
        patched.setattr(throughput, "by_batch", cut)
        capsys.readouterr()
        throughput.main(common)
    assert capsys.readouterr().out.startswith("going on after the 6 figures in ")
    assert json.loads(output.read_text(encoding="utf-8"))["rows"][:6] == before
    assert not part.exists()
    part.write_text(json.dumps({"recipe": {"commit": "another"}, "rows": before}), encoding="utf-8")
    throughput.main(common)
    assert json.loads(output.read_text(encoding="utf-8"))["rows"][:6] != before


def test_lengths_beyond_the_context_are_left_out(folder: Path) -> None:
    """Of 2,048 tokens the prompt takes some; 1,024 and a quarter more still fit, 2,048 do not."""
    sizes = throughput.Sizes(lengths=(512, 1024, 2048))
    assert throughput.fitting(load(folder), 1, sizes) == [512, 1024]


def test_an_answer_counts_what_was_written_since(folder: Path) -> None:
    decoder = throughput.WatchedDecoder(load(folder), [])
    answer = throughput.Answer(decoder.passes(asked([], 3, 40)))
    _, first = answer.write(3)
    _, more = answer.write(3 * 20)
    assert (first.tokens, more.tokens) == (3, 57)
    assert more.figures() == {"acceptance": None, "guesses_per_pass": 0.0, "tokens_per_pass": 1.0}
