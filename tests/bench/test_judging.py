"""Judges of a task by their names: scorers, reward models, chat models that compare."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from tests.bench.tools import PROMPTS, SEEDS, arena_of, tasks_of
from tests.chat_server import Judging, Say, serving

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.judging import TaskJudge
from llmdoctor.bench.methods import CONTENDERS, PATIENT
from llmdoctor.bench.table import best_point, make_frontier, make_table
from llmdoctor.errors import UserError
from llmdoctor.evaluation.chat_endpoint import ChatEndpoint

HI = [[{"role": "user", "content": "Hi"}]]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that is asked once only: the default waits a minute in all."""
    monkeypatch.setattr(
        "llmdoctor.evaluation.chat_endpoint.ChatEndpoint",
        lambda model, url: ChatEndpoint(model, url, retries=0, concurrency=1),
    )


def test_a_scorer_scores_and_compares(tmp_path: Path) -> None:
    judge = TaskJudge("brevity", tmp_path)
    short, long = judge.scores(HI * 2, ["one", "one two three"], ["", ""])
    assert short > long
    assert judge.outcomes(HI * 3, ["one", "one two", "a"], ["one two", "one", "b"]) == [1.0, 0.0, 0.5]


def test_a_reward_model_scores_and_compares(compared: Arena) -> None:
    """One trained by the arena, as anybody's: its own numbers, and the larger of two wins."""
    folder = compared.output / "models/a/seed0/reward_model"
    judge = TaskJudge(f"reward:{folder}", compared.output)
    texts = ["the cat sat", "a dog"]
    own = compared.kits["a"].reward_model(0).score(HI * 2, texts)
    assert judge.scores(HI * 2, texts, ["", ""]) == pytest.approx(own, abs=1e-4)
    assert judge.outcomes(HI, texts[:1], texts[1:]) == [1.0 if own[0] > own[1] else 0.0]


def test_a_reward_model_judges_a_comparison(
    compared: Arena, tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    spec = f"reward:{compared.output / 'models/a/seed1/reward_model'}"
    arena, _ = arena_of(tiny_folder, bench_sources, tmp_path, tasks=tasks_of(bench_sources, spec)[:1], seeds=1)
    rows = make_table(arena, ["greedy"])
    model = compared.kits["a"].reward_model(1)
    greedy = arena.cells.get(arena.tasks[0], CONTENDERS["greedy"], {}, 0).answers
    rewards = model.score([prompt.messages for prompt in arena.prompts], [answer.text for answer in greedy])
    (row,) = [row for row in rows if (row["method"], row["at"]) == ("greedy", "best")]
    assert row["score"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-3)


def test_a_chat_judge_scores_by_outcomes_against_the_patient(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    """Honest and for longer answers: a score is 1, ½ or 0, the patient's own is ½, and a rerun asks nothing."""
    with serving(Judging()) as server:
        tasks = tasks_of(bench_sources, f"chat:wise@{server.url}")[:1]
        arena, _ = arena_of(tiny_folder, bench_sources, tmp_path / "out", tasks=tasks)
        rows = make_table(arena, ["greedy"])
        task = arena.tasks[0]
        own, greedy = arena.patient(task), arena.point(task, CONTENDERS["greedy"], {})
        assert own.score == 0.5
        for prompt in arena.prompts:
            for seed in range(SEEDS):
                one, two = greedy.answers[prompt.id][seed].text, own.answers[prompt.id][seed].text
                expected = 0.5 if len(one) == len(two) else float(len(one) > len(two))
                assert greedy.scores[prompt.id][seed] == expected
        doctor = best_point(arena, task, CONTENDERS["llmdoctor"])
        (row,) = [row for row in rows if (row["method"], row["at"]) == (PATIENT, "best")]
        longer = [
            len(doctor.texts[prompt.id][seed]) - len(own.answers[prompt.id][seed].text)
            for prompt in arena.prompts
            for seed in range(SEEDS)
        ]
        assert (row["win"], row["loss"]) == (sum(gap > 0 for gap in longer), sum(gap < 0 for gap in longer))
        asked = len(server.bodies)
        again, _ = arena_of(tiny_folder, bench_sources, tmp_path / "out", tasks=tasks)
        assert make_table(again, ["greedy"]) == rows
        make_frontier(again, ["greedy"])
        assert len(server.bodies) == asked
    assert (tmp_path / "out" / "judge.sqlite").is_file()


@pytest.mark.usefixtures("impatient")
def test_a_chat_judge_that_goes_down_leaves_what_it_said(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    """It answers five questions and then 500s; the next run, with the server well again, asks only the rest."""
    output = tmp_path / "out"
    five = [Say(json.dumps({"verdict": "tie"}))] * 5
    with serving(Judging(*five, answer=lambda _: Say("overloaded", status=500))) as server:
        tasks = tasks_of(bench_sources, f"chat:wise@{server.url}")[:1]
        arena, _ = arena_of(tiny_folder, bench_sources, output, tasks=tasks)
        with pytest.raises(UserError, match=r"status 500.*answered and kept in .*judge\.sqlite: run again") as caught:
            make_table(arena, ["greedy"])
        assert "\n" not in str(caught.value)
        assert len(sqlite3.connect(output / "judge.sqlite").execute("select * from replies").fetchall()) == 5
        server.answer = lambda _: Say(json.dumps({"verdict": "tie"}))
        before = {body["messages"][-1]["content"] for body in server.bodies[:5]}
        server.bodies.clear()
        again, told = arena_of(tiny_folder, bench_sources, output, tasks=tasks)
        make_table(again, ["greedy"])
        assert told.started == []
        assert server.bodies
        assert not before & {body["messages"][-1]["content"] for body in server.bodies}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("beauty", "unknown scorer 'beauty'; known: "),
        ("chat:", "a chat judge is named chat:MODEL or chat:MODEL@URL"),
        ("chat:@http://127.0.0.1:1/v1", "a chat judge is named chat:MODEL or chat:MODEL@URL"),
        ("chat:wise@ftp://there", "base_url must look like https"),
        ("chat:wise", "the environment variable OPENAI_API_KEY is not set"),
        ("reward:./no-such-model", "no-such-model"),
    ],
)
def test_a_judge_that_cannot_be_is_told_before_anything_is_decoded(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path, spec: str, message: str
) -> None:
    for make in (make_table, make_frontier):
        tasks = tasks_of(bench_sources, spec)[:1]
        arena, told = arena_of(tiny_folder, bench_sources, tmp_path / "out", tasks=tasks)
        with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
            make(arena, ["greedy"])
        assert "\n" not in str(caught.value)
        assert told.started == []
        assert not (tmp_path / "out" / "raw").exists()


def test_scores_are_by_prompt_and_seed(compared: Arena) -> None:
    point = compared.point(compared.tasks[0], CONTENDERS["top_k"], {})
    judge = compared.judge(compared.tasks[0])
    assert len(point.scores) == PROMPTS
    for prompt, scores in point.scores.items():
        texts = [answer.text for answer in point.answers[prompt]]
        assert scores == judge.scores(HI * SEEDS, texts, texts)
