"""Ablations, signal dynamics and held-out human pairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from tests.bench.tools import PROMPTS, Told, arena_of, cell_files
from tests.tiny import some_pairs

from llmdoctor.baselines.implicit import implicit_rewards
from llmdoctor.bench.ablation import BETAS, VARIANTS, AblationRow, make_ablation, taken_from, variants_of
from llmdoctor.bench.arena import Arena
from llmdoctor.bench.chosen import Chosen
from llmdoctor.bench.held_out import (
    GUIDES,
    DynamicsRow,
    HumanRow,
    _unseen,
    guides_of,
    make_dynamics,
    make_human,
)
from llmdoctor.bench.kit import READOUT, Kit
from llmdoctor.bench.methods import CONTENDERS, DOCTOR, DOCTOR_OF_PAIRS, Contender, guided
from llmdoctor.bench.options import BenchOptions, Task
from llmdoctor.bench.table import at_kl
from llmdoctor.data.preferences import write_pairs
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.models.loading import load_model
from llmdoctor.rewards.readout import fit_readout

OF_THE_ROUNDS = ("no_subtb", "no_branch", "no_flow", "online_dpo")


@pytest.fixture(scope="module")
def made(
    compared: Arena, tiny_folder: Path, bench_sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Arena, Told]:
    """The finished comparison's folder, copied, to go on in."""
    output = tmp_path_factory.mktemp("held") / "out"
    shutil.copytree(compared.output, output)
    return arena_of(tiny_folder, bench_sources, output, seeds=1)


def test_every_variant_at_every_beta(made: tuple[Arena, Told]) -> None:
    arena, told = made
    before = cell_files(arena.output)
    rows = make_ablation(arena)
    assert rows == json.loads((arena.output / "ablation.json").read_text())
    names = [name for name in VARIANTS if name not in OF_THE_ROUNDS]
    assert [(row["variant"], row["beta"]) for row in rows] == [(name, beta) for name in names for beta in BETAS]
    assert all(set(row) == set(get_type_hints(AblationRow)) for row in rows)
    assert all((row["prompts"], row["seeds"]) == (PROMPTS, 1) for row in rows)
    # The whole doctor's answers are the comparison's.
    for row in rows[:2]:
        whole = arena.point(arena.tasks[0], CONTENDERS[DOCTOR], {"beta": row["beta"]})
        assert (row["score"], row["kl"]) == (pytest.approx(whole.score), pytest.approx(whole.kl))
    assert {name: made for name, made in cell_files(arena.output).items() if name in before} == before
    assert not [step for step in told.started if "llmdoctor" in step or step.endswith("training tfpo")]


def test_what_a_part_was_taken_from_meets_the_variant_at_its_kl(made: tuple[Arena, Told]) -> None:
    arena = made[0]
    task = arena.tasks[0]
    rows = make_ablation(arena, ["no_rounds", "pairs_no_flow"])
    assert [(row["variant"], row["of"]) for row in rows[::2]] == [
        ("whole", ""), ("no_rounds", "whole"), ("pairs_no_flow", "no_rounds")
    ]  # fmt: skip
    assert [row["win_plus_half_tie"] for row in rows[:2]] == [None, None]
    for row, form in zip(rows[2:], [DOCTOR, DOCTOR, DOCTOR_OF_PAIRS, DOCTOR_OF_PAIRS], strict=True):
        setting = {"beta": row["beta"]}
        if row["variant"] == "no_rounds":
            texts = arena.point(task, CONTENDERS[DOCTOR_OF_PAIRS], setting)
        else:
            settings = ({"beta": 1.0}, {"beta": 2.0})
            contender = Contender("pairs_no_flow", "", "", settings, guided("pairs_no_flow", "ratio"),
                                  trained=("pairs_no_flow",))  # fmt: skip
            texts = arena.point(task, contender, setting)
        opponent = Chosen([texts])
        ours = at_kl(arena, task, opponent, form)
        won = [value for found in arena.outcomes(task, ours.texts, opponent.texts).values() for value in found]
        assert row["win_plus_half_tie"] == pytest.approx(100 * sum(won) / len(won))
        assert row["ci_low"] <= row["win_plus_half_tie"] <= row["ci_high"]
        assert sum(row["by_seed"]) / len(row["by_seed"]) == pytest.approx(row["win_plus_half_tie"])


def test_some_variants_stand_beside_the_whole(made: tuple[Arena, Told]) -> None:
    rows = make_ablation(made[0], ["no_rounds"])
    assert [row["variant"] for row in rows] == ["whole", "whole", "no_rounds", "no_rounds"]
    in_rounds = make_ablation(made[0], ["no_flow"])
    assert [(row["variant"], row["of"]) for row in in_rounds[2:]] == [("no_flow", "no_pairs")] * 2
    with pytest.raises(UserError, match="no variant of the doctor is named no_flows; there is whole, balanced, no_p"):
        make_ablation(made[0], ["no_flows"])


def test_without_rounds_the_whole_is_the_doctor_of_the_pairs(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    assert variants_of(BenchOptions()) == list(VARIANTS)
    names = ["whole", *(name for name in VARIANTS if name.startswith("pairs_"))]
    assert variants_of(BenchOptions(rounds=0)) == names
    arena, _ = arena_of(tiny_folder, bench_sources, tmp_path, rounds=0)
    assert {taken_from(name, BenchOptions(rounds=0)) for name in names} == {"", "whole"}
    with pytest.raises(UserError, match="without rounds is named no_rounds; there is whole, p"):
        make_ablation(arena, ["no_rounds"])


def test_dynamics_of_every_guide(tiny_folder: Path, bench_sources: Path, made: tuple[Arena, Told]) -> None:
    """12 pairs, all trained on: the held-out tail, one pair in ten, is what is read, by the guides of both seeds."""
    arena, told = arena_of(tiny_folder, bench_sources, made[0].output)
    rows = make_dynamics(arena)
    assert dict(zip(told.started, told.units, strict=True))["a: llmdoctor reads"] == 2, "one pair, two seeds"
    assert told.started.count("a: their base reads") == 1
    records = json.loads((made[0].output / "run.json").read_text())
    assert {"table.json", "elo.json", "frontier.json", "dynamics.json"} <= set(records), "those of before are kept"
    assert records["table.json"]["seeds"] == [0, 1]
    assert records["dynamics.json"]["seeds"] == [0, 1]
    assert rows == json.loads((made[0].output / "dynamics.json").read_text())
    assert [(row["task"], row["method"]) for row in rows] == [("a", method) for method in GUIDES]
    assert all(set(row) == set(get_type_hints(DynamicsRow)) for row in rows)
    assert all((row["pairs"], row["seeds"]) == (1, 2) for row in rows)
    assert all(len(row["mean"]) == len(row["positions"]) == len(row["low"]) == len(row["high"]) for row in rows)


def test_pairs_that_were_not_trained_on(tiny_folder: Path, bench_sources: Path, tmp_path: Path) -> None:
    few, _ = arena_of(tiny_folder, bench_sources, tmp_path, pairs=8)
    rest = _unseen(few.kits["a"])
    assert len(rest) == 4
    assert not {pair.chosen for pair in rest} & {pair.chosen for pair in few.kits["a"].pairs()}
    every, _ = arena_of(tiny_folder, bench_sources, tmp_path)
    assert _unseen(every.kits["a"]) == every.kits["a"].pairs()[-1:]


def test_human_accuracy_is_the_share_of_pairs_preferred_right(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    arena, _ = arena_of(tiny_folder, bench_sources, tmp_path / "out", seeds=1)
    held_out = some_pairs(9, seed=7)
    write_pairs(tmp_path / "held-out.jsonl", held_out)
    sources = (str(bench_sources / "b.jsonl"), str(tmp_path / "held-out.jsonl"))
    rows = make_human(arena, *sources, "harmless", 8)
    assert rows == json.loads((arena.output / "human.json").read_text())
    assert [row["method"] for row in rows] == [*GUIDES, READOUT]
    # Of twelve pairs the last is held out, as from the guides.
    arena_pairs = Kit(Task("human", sources[0], "harmless", ""), arena.options, tmp_path, arena.steps).pairs()
    judge = fit_readout(load_model(str(tiny_folder)), arena_pairs[:11])
    for row in rows:
        assert set(row) == set(get_type_hints(HumanRow))
        assert (row["pairs"], row["train_pairs"], row["seeds"]) == (8, 11, 1)
        if row["method"] == READOUT:
            totals = [
                tuple(
                    judge.score(
                        [p.prompt] * 2, [p.chosen, p.rejected], complete=[p.chosen_complete, p.rejected_complete]
                    )
                )
                for p in held_out[:8]
            ]
        else:
            folder = arena.output / "models/human/seed0" / GUIDES[row["method"]]
            totals = [reward.totals for reward in implicit_rewards(folder, held_out[:8])]
        right = [100.0 * (chosen > rejected) + 50.0 * (chosen == rejected) for chosen, rejected in totals]
        assert row["accuracy"] == pytest.approx(sum(right) / len(right))
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["difference"] == pytest.approx(rows[0]["accuracy"] - row["accuracy"])
    assert (rows[0]["difference"], rows[0]["difference_low"], rows[0]["difference_high"]) == (0, 0, 0)
    record = json.loads((arena.output / "run.json").read_text())["human.json"]
    assert record["options"] == {"patient": str(tiny_folder), "base": "", "pairs": 12, "epochs": 1, "rounds": 1}
    assert record["train"]["source"] == sources[0]
    assert (record["validation"]["source"], record["validation"]["pairs"]) == (sources[1], 8)
    assert record["validation"]["hash"] != record["train"]["hash"]
    assert [(task["name"], task["pairs"], task["faces"]) for task in record["tasks"]] == [
        ("human", sources[0], "harmless")
    ]
    assert not {"prompts", "prompts_hash"} & set(record), "nobody answers a prompt"
    assert make_human(arena, *sources, "harmless", 8, ["dpo"]) == [
        row for row in rows if row["method"] in (DOCTOR, "dpo", READOUT)
    ]
    with pytest.raises(UserError, match="no guide compared here is named args; there is llmdoctor,"):
        make_human(arena, *sources, "harmless", 8, ["args"])
    other: dict[str, Any] = {"train": str(bench_sources / "a.jsonl"), "validation": sources[1]}
    with pytest.raises(FingerprintMismatch):
        make_human(arena, **other, faces="harmless", validation_count=8)


def test_without_rounds_llmdoctor_is_compared_once() -> None:
    assert list(guides_of(BenchOptions(rounds=0))) == ["llmdoctor", "genarm", "dpo"]
    assert guides_of(BenchOptions()) == GUIDES
