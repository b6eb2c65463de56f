"""The benchmark of a small doctor on tiny models: who is compared with whom, and what a second run does anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import weak_to_strong
from tests.bench.tools import float32
from tests.tiny import load, save_tiny

from llmdoctor.bench.options import BenchOptions
from llmdoctor.data.prompts import load_prompts
from llmdoctor.models.doctor import DoctorConfig
from llmdoctor.shrink.make import RECORD_NAME, ShrinkOptions, shrink

SMALL = BenchOptions(pairs=32, max_new_tokens=8, epochs=1, rounds=1, batch_size=128)


def changed(options: BenchOptions) -> dict[str, Any]:
    """What a run was asked for that a smoke run leaves as it is."""
    return {name: getattr(options, name) for name in ("patient", "base", "seeds", "prompt_count")}


@pytest.fixture(autouse=True, scope="module")
def _float32() -> Iterator[None]:
    with float32():
        yield


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Four layers, and a context with room for the pairs under their faces, byte by byte."""
    folder = tmp_path_factory.mktemp("weak") / "patient"
    return save_tiny(folder, tiny_tokenizer, context=4096, layers=4, tied=True)


@pytest.fixture(scope="module")
def base(patient: Path) -> Path:
    options = ShrinkOptions(layers=2, tokens=200, epochs=1, max_new_tokens=8, held_out=2)
    shrink(load(patient), load_prompts("builtin:prompts/train", limit=40), patient.parent / "base", options=options)
    return patient.parent / "base"


def test_the_weak_doctor_meets_the_strong_at_its_kl(
    patient: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    words = ["--quick", "--patient", str(patient), "--base", str(base), "--work", str(tmp_path / "work")]
    weak_to_strong.main([*words, "--prompts", "6", "--output", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))
    rows = found.pop("rows")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    named = [(row["size"], row["method"], row["setting"].get("beta")) for row in rows]
    assert named == [
        ("strong", "patient", None), ("strong", "dpo", 0.5), ("strong", "dpo", 1.0),
        ("strong", "genarm", 0.5), ("strong", "genarm", 1.0),
        *[("weak", "llmdoctor_rounds", beta) for beta in (1.0, 2.0, 3.0, 4.0)],
        ("weak", "llmdoctor_rounds_onset", 2.0), ("weak", "llmdoctor_rounds_onset", 4.0),
        ("weak", "llmdoctor_pairs", 1.0), ("weak", "llmdoctor_pairs", 2.0), ("weak", "dpo", 0.5), ("weak", "dpo", 1.0),
    ]  # fmt: skip
    for pair, row in zip(found["comparisons"], rows[1:5], strict=True):
        assert (pair["opponent"], pair["setting"]) == (row["method"], row["setting"])
        assert (pair["kl"], pair["score"]) == pytest.approx((row["kl"], row["score"]))
        assert pair["prompts"] == 6
        assert pair["ci_low"] <= pair["win_plus_half_tie"] <= pair["ci_high"]
    assert found["base"]["weights_read"]["small"] < found["base"]["weights_read"]["patient"]
    trained = {
        (folder, path.parent.name, DoctorConfig.load(path.parent).base)
        for folder in ("sentiment@base", "sentiment")
        for path in (tmp_path / "work/models" / folder / "seed0").glob("*/doctor.json")
    }
    assert trained == {
        *(("sentiment@base", name, str(base)) for name in ("tfpo", "no_rounds", "dpo")),
        *(("sentiment", name, str(patient)) for name in ("dpo", "genarm")),
    }
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.jsonl.gz")}
    weak_to_strong.main([*words, "--prompts", "6"])
    assert {path: path.stat().st_mtime_ns for path in before} == before, "answers that are there are made anew"


def test_shards_make_their_seeds_and_the_run_after_them_compares(
    patient: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A smoke run has one seed.
    monkeypatch.setattr(weak_to_strong.BenchOptions, "quick", lambda options: replace(SMALL, **changed(options)))
    words = ["--quick", "--patient", str(patient), "--base", str(base), "--work", str(tmp_path), "--prompts", "4"]
    words += ["--seeds", "2", "--weak", "", "--strong", "dpo"]

    def answers() -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl.gz") if "any" not in path.parts}

    weak_to_strong.main([*words, "--shard", "2/2"])
    assert "weak_to_strong" not in capsys.readouterr().out
    expected = {f"raw/sentiment@base/llmdoctor_rounds/beta={beta}-seed1.jsonl.gz" for beta in (1, 2, 3, 4)}
    expected |= {f"raw/sentiment/dpo/beta={beta}-seed1.jsonl.gz" for beta in (0.5, 1)}
    assert answers() == expected
    weak_to_strong.main([*words, "--shard", "1/2"])
    made = answers()
    assert made == expected | {name.replace("seed1", "seed0") for name in expected}
    weak_to_strong.main(words)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answers(), found["seeds"], len(found["comparisons"])) == (made, 2, 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--strong", "dpo,cards"], "no method is called 'cards'; there are dpo, genarm"),
        (["--shard", "3/2"], "a shard is one of 1/2 … 2/2, got 3/2"),
    ],
)
def test_an_argument_that_it_does_not_know_is_told(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        weak_to_strong.main(["--base", str(tmp_path), "--work", str(tmp_path), *words])
    assert told in capsys.readouterr().err


def test_a_base_that_was_not_shrunk_is_told(patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--patient", str(patient), "--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit) as ended:
        weak_to_strong.main([*words, "--base", str(patient)])
    assert ended.value.code == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"{patient / RECORD_NAME} is missing or broken")
    assert told[-1].endswith(f"make it with: llmdoctor shrink -o {patient}")


def test_an_interruption_ends_in_a_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weak_to_strong, "measure", interrupted)
    with pytest.raises(SystemExit) as ended:
        weak_to_strong.main(["--base", str(base), "--work", str(tmp_path)])
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"interrupted; what is done is in {tmp_path}")
