"""The sum of the hours of a full arena."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import arena_hours


def cell(path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.write(json.dumps({"seconds": seconds}) + "\n{}\n")


def test_quickest_cells_and_mean_trainings_times_how_many_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy serves both tasks; best-of-n judges the patient's answers once for every n; what is unknown is named."""
    raw, models = tmp_path / "raw", tmp_path / "models"
    for seed, seconds in ((0, 40.0), (1, 31.0)):
        cell(raw / f"any/greedy/only-seed{seed}.jsonl.gz", seconds)
    cell(raw / "any/patient/only-seed0.jsonl.gz", 200.0)
    cell(raw / "sentiment/best_of_n/n=8-seed0.jsonl.gz", 260.0)
    for weight, seconds in ((1, 100.0), (3, 150.0)):
        cell(raw / f"readability/args_stochastic/weight={weight}-seed2.jsonl.gz", seconds)
    cell(raw / "sentiment/pairs_no_flow/beta=2-seed0.jsonl.gz", 7.0)
    cell(raw / "sentiment+readability/mod/any-seed0.jsonl.gz", 9.0)
    for seed, seconds in ((0, 100.0), (1, 140.0)):
        path = models / "sentiment" / f"seed{seed}" / "dpo.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"seconds": seconds, "threads": 2}))
    arena_hours.main(["--folder", str(tmp_path), "--output", str(tmp_path / "hours.json")])
    found: dict[str, Any] = json.loads((tmp_path / "hours.json").read_text())
    known = {(row["part"], row["what"]): row["seconds"] for row in found["rows"] if row["seconds"] is not None}
    assert known == {
        ("table", "greedy"): 3 * 31.0,
        ("table", "patient"): 3 * 200.0,
        ("table", "best_of_n"): 6 * 60.0,
        ("table", "args_stochastic"): 6 * 250.0,
        ("pareto", "mod"): 30 * 9.0,
        ("ablation", "pairs_no_flow"): 6 * 7.0,
        ("training", "dpo"): 6 * 240.0,
    }
    assert found["core_hours"] == pytest.approx(sum(known.values()) / 3600)
    assert {"llmdoctor", "tfpo", "transfer_q"} <= set(found["unknown"])
    assert not {"llmdoctor_best", "no_subtb", "online_dpo"} & {row["what"] for row in found["rows"]}
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == {key: value for key, value in found.items() if key != "rows"}
    assert "training: 0.40 core-hours" in printed
