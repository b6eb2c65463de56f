"""Every method of the arena on the real model, with a handful of prompts."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest

from llmdoctor.bench.ablation import make_ablation
from llmdoctor.bench.arena import Arena
from llmdoctor.bench.methods import BEST_OF_N, CONTENDERS, DOCTOR, PATIENT, SAMPLES
from llmdoctor.bench.options import CONTROLLED_TASKS, BenchOptions
from llmdoctor.bench.pareto import FIRST_SHARES, STRENGTHS, make_pareto
from llmdoctor.bench.points import Point
from llmdoctor.bench.table import make_frontier, make_table
from llmdoctor.cli.progress import Progress
from llmdoctor.cli.training_callback import quiet_training

pytestmark = pytest.mark.model

PROMPTS, TOKENS = 4, 12
OPTIONS = BenchOptions(
    prompt_count=PROMPTS, pairs=16, seeds=1, max_new_tokens=TOKENS, epochs=3, rounds=1, rollout_tokens=2,
    transfer_q_prompts=2, batch_size=32,
)  # fmt: skip
LOUDEST = {name: contender.settings[-1] for name, contender in CONTENDERS.items()}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("arena"), OPTIONS, Progress(), CONTROLLED_TASKS[:1], quick=True)
    with quiet_training(verbose=False):
        make_table(made, everything=True)
        make_frontier(made, everything=True)
    return made


def point(arena: Arena, name: str) -> Point:
    return arena.point(arena.tasks[0], CONTENDERS[name], LOUDEST[name])


def read(arena: Arena, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((arena.output / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", CONTENDERS)
def test_answers_are_text_of_the_length_asked_for(arena: Arena, name: str) -> None:
    prompts = 2 if CONTENDERS[name].few_prompts else PROMPTS
    for setting in CONTENDERS[name].settings:
        made = arena.point(arena.tasks[0], CONTENDERS[name], setting)
        assert len(made.answers) == prompts
        for (answer,) in made.answers.values():
            assert 0 < answer.tokens <= TOKENS
            assert answer.finish in ("stop", "length")
            assert answer.tokens == TOKENS or answer.finish == "stop"
            assert answer.text.strip()
            assert math.isfinite(answer.kl)
            assert math.isfinite(answer.patient_logp)
            assert answer.patient_logp < 0
            assert answer.patient_forwards > 0
        letters = [letter for (answer,) in made.answers.values() for letter in answer.text if not letter.isspace()]
        assert sum(map(str.isalpha, letters)) > 0.5 * len(letters)


@pytest.mark.parametrize("name", CONTENDERS)
def test_cost_is_what_the_method_spends(arena: Arena, name: str) -> None:
    """A decoder of the patient alone runs nothing else; the others do. What is drawn from the patient costs no KL."""
    figures = point(arena, name).figures()
    alone = name in (PATIENT, "greedy", "temperature", "top_k", "top_p", "contrastive")
    assert (figures["guide_forwards_per_token"] == 0) == alone
    assert 1 < figures["perplexity"] < 1e4
    assert 0.5 < figures["distinct_4"] <= 1
    assert -1 <= figures["score"] <= 1
    if name == PATIENT:
        assert figures["kl"] == pytest.approx(0, abs=0.05 * TOKENS)
    elif name == BEST_OF_N:
        assert figures["kl"] == pytest.approx(math.log(SAMPLES) - (SAMPLES - 1) / SAMPLES, abs=1e-3)
    elif name == "greedy":
        assert figures["kl"] > 0


def test_greedy_is_the_likeliest_and_the_patient_is_not(arena: Arena) -> None:
    assert point(arena, "greedy").perplexity < point(arena, "top_p").perplexity + 1
    assert point(arena, "greedy").perplexity < point(arena, PATIENT).perplexity


def test_guides_move_the_patient(arena: Arena) -> None:
    """Three epochs of 16 pairs are little, yet at its largest β every guide has changed some answer."""
    own = point(arena, PATIENT).answers
    for name in (
        DOCTOR,
        "llmdoctor_rounds",
        "llmdoctor_onset",
        "llmdoctor_alpha",
        "llmdoctor_product",
        "genarm",
        "faces",
        "dpo",
    ):
        texts = {prompt: row[0].text for prompt, row in point(arena, name).answers.items()}
        assert any(texts[prompt] != own[prompt][0].text for prompt in texts), name


def test_the_contrast_of_faces_needs_no_training_to_cheer(arena: Arena) -> None:
    assert point(arena, "faces").score > point(arena, PATIENT).score - 0.5


def test_tables_hold_every_method(arena: Arena) -> None:
    rows = read(arena, "table.json")
    assert {row["method"] for row in rows} == set(CONTENDERS) - {DOCTOR}
    for row in rows:
        assert row["win"] + row["tie"] + row["loss"] == row["prompts"]
        assert row["ci_low"] <= row["win_plus_half_tie"] <= row["ci_high"]
    frontier = read(arena, "frontier.json")
    assert {row["method"] for row in frontier} == set(CONTENDERS)
    assert all(row["tokens_per_second"] > 0 for row in frontier)


def test_marks_read_as_the_answer(arena: Arena) -> None:
    """The tokens of a marked answer, put together, are its text (and perhaps the end-of-turn token)."""
    for (answer,) in point(arena, DOCTOR).answers.values():
        assert len(answer.marks) == answer.tokens
        assert "".join(text for text, _ in answer.marks).startswith(answer.text[:10])


@pytest.fixture(scope="module")
def both(arena: Arena, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    """Going on with the second task, in a copy."""
    output = tmp_path_factory.mktemp("both") / "arena"
    shutil.copytree(arena.output, output)
    return Arena(output, OPTIONS, Progress(), quick=True)


def test_two_objectives_at_once(both: Arena) -> None:
    """Two doctors mixed, a soup of two policies, and the mixture of both: answers of theirs, each measured twice."""
    with quiet_training(verbose=False):
        result = make_pareto(both, {method: values[:1] for method, values in STRENGTHS.items()})
    assert set(result["hypervolume"]) == set(STRENGTHS)
    assert len(result["points"]) == len(STRENGTHS) * len(FIRST_SHARES)
    assert result["reference"][0] == pytest.approx(both.patient(both.tasks[0]).score)
    for point in result["points"]:
        assert all(map(math.isfinite, point["scores"]))
        assert math.isfinite(point["kl"])
    texts = {path.parent.name: path.read_bytes() for path in (both.output / "raw/sentiment+readability").rglob("*.gz")}
    assert len(set(texts.values())) == len(STRENGTHS)


def test_a_part_taken_away(both: Arena) -> None:
    alone = Arena(both.output, OPTIONS, Progress(), CONTROLLED_TASKS[:1], quick=True)
    with quiet_training(verbose=False):
        rows = make_ablation(alone, ["pairs_no_flow"])
    assert [row["variant"] for row in rows] == ["whole", "whole", "pairs_no_flow", "pairs_no_flow"]
    assert all(math.isfinite(row["score"]) and math.isfinite(row["kl"]) for row in rows)
