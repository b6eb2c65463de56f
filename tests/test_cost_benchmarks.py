"""The benchmarks of what training costs (subtb, train, rewards), run as a whole on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks import rewards, subtb, train


@pytest.fixture
def result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a benchmark; its file, which the last line it printed repeats without the rows."""

    def run(main: Callable[[Sequence[str]], None], *arguments: str) -> dict[str, Any]:
        output = tmp_path / "new" / "result.json"
        main(["--quick", "--output", str(output), *arguments])
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert printed == {key: value for key, value in found.items() if key != "rows"}
        assert found["quick"] is True
        return found

    return run


def test_subtb(result: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    seconds = subtb.seconds
    monkeypatch.setattr(subtb, "seconds", lambda loss, walk, budget: asked.append(budget) or seconds(loss, walk, 0.0))
    found = result(subtb.main)
    assert asked == 10 * [0.5], "four lengths for each λ, and both loops"
    assert [row["subtb_lambda"] for row in found["rows"]] == [1.0, 0.9]
    assert found["relative_error"] <= 1e-5
    assert found["growth_1k_32k"] == max(row["seconds"]["32768"] / row["seconds"]["1024"] for row in found["rows"])
    assert found["speedup_128_each"] > found["speedup_128"] > 100


def test_rewards(result: Callable[..., dict[str, Any]], tiny_folder: Path) -> None:
    found = result(rewards.main, "--model", str(tiny_folder))
    spent = found["seconds"]
    assert found["pairs"] == 16
    assert found["floor_ratio"] == spent["floor"] / spent["ours"]
    assert found["naive_ratio"] == spent["naive"] / spent["ours"]


def test_train(result: Callable[..., dict[str, Any]], tiny_folder: Path) -> None:
    """Three contenders as processes; the headline is the worse one of the two ways to run DPO."""
    pytest.importorskip("trl")
    found = result(train.main, "--model", str(tiny_folder))
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == [train.TFPO, train.PRECOMPUTED, train.SHIPPED]
    assert all(len(row["steps"]) == 3 and row["peak_gb"] >= row["loaded_gb"] for row in rows.values())
    ratios = {
        way: rows[way]["step_seconds"] / rows[train.TFPO]["step_seconds"] for way in (train.PRECOMPUTED, train.SHIPPED)
    }
    assert {way: each["examples_ratio_step"] for way, each in found["against"].items()} == ratios
    assert found["examples_ratio"] == min(ratios.values())
    assert found["memory_ratio"] == max(each["memory_ratio"] for each in found["against"].values())
