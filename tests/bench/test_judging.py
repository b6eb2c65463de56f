"""Judges of a task by their names: scorers, reward models, chat models that compare."""

from __future__ import annotations

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.bench.tools import PROMPTS, SEEDS, arena_of, tasks_of
from tests.chat_server import Judging, Say, serving

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.asking import Asking
from llmdoctor.bench.judging import JudgeOptions, TaskJudge, finite_rewards
from llmdoctor.bench.methods import CONTENDERS, DOCTOR, PATIENT
from llmdoctor.bench.table import best_point, make_frontier, make_table
from llmdoctor.errors import UserError
from llmdoctor.evaluation.chat_endpoint import ChatEndpoint
from llmdoctor.evaluation.ranking import bradley_terry

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
        lambda model, **how: ChatEndpoint(model, **{**how, "retries": 0, "concurrency": 1}),
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
    own = compared.kits["a"].reward_model(0).score(HI * 2, texts, complete=True)
    assert judge.scores(HI * 2, texts, ["", ""]) == pytest.approx(own, abs=1e-4)
    assert judge.outcomes(HI, texts[:1], texts[1:]) == [1.0 if own[0] > own[1] else 0.0]


def test_a_reward_model_with_a_broken_score_is_told_in_one_line(compared: Arena, tmp_path: Path) -> None:
    """Before anything is decoded: one answer is scored when the judge is made."""
    folder = tmp_path / "broken"
    shutil.copytree(compared.output / "models/a/seed0/reward_model", folder)
    path = folder / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.score.weight"] *= float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="computes numbers that are not finite; its weights are broken") as caught:
        TaskJudge(f"reward:{folder}", tmp_path)
    assert str(caught.value).startswith(f"{folder} ")
    assert "\n" not in str(caught.value)


def test_rewards_must_be_finite() -> None:
    assert finite_rewards("reward:x", [1.0, -2.0]) == [1.0, -2.0]
    with pytest.raises(UserError, match="reward:x gave the reward inf to 2 of 3 answers"):
        finite_rewards("reward:x", [1.0, float("inf"), float("nan")])


def test_a_reward_model_judges_a_comparison(
    compared: Arena, tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    spec = f"reward:{compared.output / 'models/a/seed1/reward_model'}"
    arena, _ = arena_of(tiny_folder, bench_sources, tmp_path, tasks=tasks_of(bench_sources, spec)[:1], seeds=1)
    rows = make_table(arena, ["greedy"])
    model = compared.kits["a"].reward_model(1)
    greedy = arena.cells.get(arena.tasks[0], CONTENDERS["greedy"], {}, 0).answers
    prompts, texts = [prompt.messages for prompt in arena.prompts], [answer.text for answer in greedy]
    rewards = model.score(prompts, texts, complete=True)
    assert rewards != model.score(prompts, texts)
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


def test_the_questions_are_told_before_they_are_asked(tiny_folder: Path, bench_sources: Path, tmp_path: Path) -> None:
    """First those of all scores, then those of the rows; Elo needs no more. A rerun tells that nothing is open.

    Two methods beside LLMdoctor with two rows each, of which one mixes two settings' answers, both orders, 6 prompts, 2
    seeds: 2 · 3 · 2 · 12 = 144 later at most.
    """
    told: list[tuple[Asking, int]] = []
    with serving(Judging()) as server:
        tasks = tasks_of(bench_sources, f"chat:wise@{server.url}")[:1]
        arena, _ = arena_of(tiny_folder, bench_sources, tmp_path / "out", tasks=tasks)
        arena.consent = lambda asking: told.append((asking, len(server.bodies)))
        make_table(arena, ["greedy", "top_k"])
        (scores, before), (rows, between) = told
        assert (before, between) == (0, scores.estimate.uncached)
        assert len(server.bodies) == scores.estimate.uncached + rows.estimate.uncached
        assert (scores.judge, scores.later, rows.later) == (tasks[0].judge, 144, 0)
        assert rows.estimate.uncached <= scores.later
        assert scores.estimate.price is None
        report = arena.judge(arena.tasks[0]).report()
        assert report is not None
        assert report.asked == len(server.bodies)
        again, _ = arena_of(tiny_folder, bench_sources, tmp_path / "out", tasks=tasks)
        again.consent = arena.consent
        make_table(again, ["greedy", "top_k"])
        make_frontier(again, ["greedy"])
        assert [asking.estimate.uncached for asking, _ in told[2:]] == [0, 0, 0]
        assert [asking.later for asking, _ in told[2:]] == [144, 0, 0]


def test_without_consent_nothing_is_asked_and_the_answers_are_kept(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    def no(asking: Asking) -> None:
        raise UserError("too dear")

    with serving(Judging()) as server:
        tasks = tasks_of(bench_sources, f"chat:wise@{server.url}")[:1]
        for make in (make_table, make_frontier):
            arena, _ = arena_of(tiny_folder, bench_sources, tmp_path / "out", tasks=tasks, seeds=1)
            arena.consent = no
            with pytest.raises(UserError, match="too dear"):
                make(arena, ["greedy"])
        assert server.bodies == []
    assert (tmp_path / "out/raw/any/greedy/only-seed0.jsonl.gz").is_file()


def test_elo_of_a_chat_judge_rests_on_matches_with_llmdoctor_and_the_patient(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 methods 5 of the 6 pairs: greedy and top-k do not meet. All are rated."""
    seen: list[set[frozenset[str]]] = []

    def spy(outcomes: Any, anchor: str) -> Any:
        seen.append({frozenset(pair) for pair in outcomes})
        return bradley_terry(outcomes, anchor)

    monkeypatch.setattr("llmdoctor.bench.table.bradley_terry", spy)
    with serving(Judging()) as server:
        tasks = tasks_of(bench_sources, f"chat:wise@{server.url}")[:1]
        arena, _ = arena_of(tiny_folder, bench_sources, tmp_path / "out", tasks=tasks, seeds=1)
        make_table(arena, ["greedy", "top_k"])
    others = {frozenset((centre, name)) for centre in (DOCTOR, PATIENT) for name in ("greedy", "top_k")}
    assert seen == [others | {frozenset((DOCTOR, PATIENT))}]
    rated = json.loads((tmp_path / "out/elo.json").read_text())
    assert {row["method"] for row in rated} == {DOCTOR, PATIENT, "greedy", "top_k"}
    record = json.loads((tmp_path / "out/run.json").read_text())["elo.json"]
    assert record["judge_fingerprints"] == {"a": arena.judge(arena.tasks[0]).fingerprint}


def test_how_a_chat_judge_is_asked(tmp_path: Path) -> None:
    """Its own question, 4 requests a second, two at once; 2 questions of at most 512 tokens at $2 a million."""
    (tmp_path / "own.txt").write_text(
        "{prompt} <answer_A>\n{first}\n</answer_A> <answer_B>\n{second}\n</answer_B> Who?"
    )
    options = JudgeOptions(1.0, 2.0, str(tmp_path / "own.txt"), 240, 2)
    with serving(Judging()) as server:
        judge = TaskJudge(f"chat:wise@{server.url}", tmp_path, options)
        estimate = judge.estimate(HI * 2, ["a", "one"], ["a", "three"])
        assert estimate is not None
        assert (estimate.requests, estimate.uncached, estimate.output_tokens) == (2, 2, 2 * 512)
        assert estimate.price == pytest.approx((estimate.input_tokens * 1 + 2 * 512 * 2) / 1e6)
        assert judge.outcomes(HI * 2, ["a", "one"], ["a", "three"]) == [0.5, 0.0]
        assert all(question.endswith("Who?") for question in server.questions)
        assert server.most_at_once <= 2
        assert server.times[1] - server.times[0] >= 0.1
        report = judge.report()
        assert report is not None
        # The server counts 100 tokens read and 10 written a reply.
        assert report.cost == pytest.approx((200 * 1 + 20 * 2) / 1e6)


@pytest.mark.parametrize("model", ["@cf/meta/wise", "wise@20240620", "a@b@c"])
def test_models_may_have_an_at_in_their_names(tmp_path: Path, model: str) -> None:
    with serving(Judging()) as server:
        judge = TaskJudge(f"chat:{model}@{server.url}", tmp_path)
        assert judge.outcomes(HI, ["one"], ["three"]) == [0.0]
        assert {body["model"] for body in server.bodies} == {model}


def test_parameters_key_and_patience_of_a_chat_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reasoning model wants; other parameters are other questions, also to the replies that are kept."""
    monkeypatch.setenv("MY_KEY", "secret")
    params = '{"temperature": null, "max_tokens": null, "max_completion_tokens": 4096}'
    options = JudgeOptions(judge_params=params, judge_key_env="MY_KEY", judge_timeout=0.5)
    with serving(Judging(Say(delay=2.0))) as server:
        judge = TaskJudge(f"chat:wise@{server.url}", tmp_path, options)
        # The first reply is waited for in vain, and asked for again.
        assert judge.outcomes(HI, ["one"], ["three"]) == [0.0]
        report = judge.report()
        assert report is not None
        assert report.retried == 1
        own = {"model", "messages", "seed", "max_completion_tokens"}
        assert all(body.keys() == own and body["max_completion_tokens"] == 4096 for body in server.bodies)
        assert set(server.keys) == {"Bearer secret"}
        plain = TaskJudge(f"chat:wise@{server.url}", tmp_path)
        assert plain.fingerprint != judge.fingerprint
        estimate = plain.estimate(HI, ["one"], ["three"])
        assert estimate is not None
        assert estimate.uncached == 2


@pytest.mark.parametrize("limit", ['"many"', "[1]", "0", "true"])
def test_a_limit_of_replies_that_cannot_be_is_told_before_anything_is_decoded(tmp_path: Path, limit: str) -> None:
    options = JudgeOptions(judge_params=f'{{"max_tokens": {limit}}}')
    with pytest.raises(UserError, match="the parameter max_tokens must be a whole number of at least 1, got "):
        TaskJudge("chat:wise@http://127.0.0.1:9/v1", tmp_path, options)


def test_tasks_share_judges_and_options_are_the_chat_judges(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    """One judge of two tasks is made once; a scorer beside a chat judge takes none of its options."""
    a, b = tasks_of(bench_sources, "chat:wise@http://127.0.0.1:9/v1")
    arena, _ = arena_of(tiny_folder, bench_sources, tmp_path, tasks=[a, b, replace(a, name="c")])
    arena.judge_options = JudgeOptions(judge_rpm=10.0)
    judges = [arena.judge(task) for task in arena.tasks]
    assert judges[0] is judges[2] is not judges[1]
    assert arena.judges == judges[:2]
    arena, _ = arena_of(tiny_folder, bench_sources, tmp_path, tasks=[b])
    arena.judge_options = JudgeOptions(judge_rpm=10.0)
    with pytest.raises(UserError, match="judge_rpm: only for a chat judge, the judge is 'brevity'"):
        arena.judge(b)


def test_a_step_is_shown_while_a_chat_judge_is_asked(tiny_folder: Path, bench_sources: Path, tmp_path: Path) -> None:
    """Every comparison of the answers counts; a rerun, which asks nothing, shows none."""
    with serving(Judging()) as server:
        tasks = tasks_of(bench_sources, f"chat:wise@{server.url}")[:1]
        for asks in (True, False):
            arena, steps = arena_of(tiny_folder, bench_sources, tmp_path / "out", tasks=tasks, seeds=1)
            make_table(arena, ["greedy"])
            shown = [units for step, units in zip(steps.started, steps.units, strict=True) if "asking chat:" in step]
            assert bool(shown) == asks
            assert set(shown) <= {PROMPTS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge_timeout": 0.0}, "judge_timeout must be a finite number greater than 0, got 0.0"),
        ({"judge_params": "{temperature: 1}"}, "judge_params must be a JSON object"),
        ({"judge_params": "[1]"}, "judge_params must be a JSON object"),
        ({"judge_params": '{"temperature": NaN}'}, "judge_params must be a JSON object"),
        ({"judge_price_in": 1.0}, "needs both judge_price_in and judge_price_out"),
        ({"judge_price_in": -1.0, "judge_price_out": 1.0}, "must be a finite number of at least 0, got -1.0"),
        ({"judge_rpm": 0.0}, "judge_rpm must be greater than 0, got 0.0"),
        ({"judge_concurrency": 0}, "judge_concurrency must be at least 1, got 0"),
    ],
    ids=str,
)
def test_options_of_a_chat_judge_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        JudgeOptions(**options)


def test_options_of_a_chat_judge_for_another_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="judge_rpm, judge_concurrency: only for a chat judge, the judge is 'vader'"):
        TaskJudge("vader", tmp_path, JudgeOptions(judge_rpm=5.0, judge_concurrency=2))
    assert TaskJudge("vader", tmp_path).estimate(HI, ["a"], ["b"]) is None
    assert TaskJudge("vader", tmp_path).report() is None


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
        assert all("asking chat:wise" in step for step in told.started)
        assert server.bodies
        assert not before & {body["messages"][-1]["content"] for body in server.bodies}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("beauty", "unknown scorer 'beauty'; known: "),
        ("chat:", "a chat judge is named chat:MODEL or chat:MODEL@URL"),
        ("chat:@http://127.0.0.1:1/v1", "a chat judge is named chat:MODEL or chat:MODEL@URL"),
        ("chat:wise@ftp://there", "base_url must look like https"),
        ("chat:wise@localhost:8000/v1", "base_url must look like https"),
        ("chat:wise", "the environment variable OPENAI_API_KEY is not set"),
        ("reward:./no-such-model", "no-such-model"),
        ("os:getcwd", "scorer 'os:getcwd' failed on 1 texts (TypeError: "),
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
