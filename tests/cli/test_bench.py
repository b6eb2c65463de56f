"""`llmdoctor bench` on the tiny model: every subcommand, and mistakes of the user's."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.bench.tools import cell_files, float32, sources
from tests.chat_server import Judging, Say, serving
from tests.cli.harness import Cli
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmdoctor.bench.asking import Asking
from llmdoctor.bench.record import _LEARNING
from llmdoctor.cli.bench import _SizeOfLearning, _tasks
from llmdoctor.cli.bench_judge import AskUser
from llmdoctor.evaluation.chat_endpoint import ChatEndpoint
from llmdoctor.evaluation.judge_report import CostEstimate

SMOKE = "This is a smoke run: its figures mean nothing."
PRINTED_BY_LIBRARIES = (
    "train_loss",
    "eval_loss",
    "Caching reference",
    "Generating train split",
    "Warning",
    "examples/s",
)


@pytest.fixture(autouse=True, scope="module")
def _float32() -> Iterator[None]:
    with float32():
        yield


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and prompts as files."""
    return sources(tmp_path_factory.mktemp("own"))


@pytest.fixture
def size(tiny_folder: Path, own: Path) -> tuple[object, ...]:
    """Options of a run far smaller than a smoke run; those of what learns, of what answers and of Transfer-Q*."""
    return (
        "--patient", tiny_folder, "--pairs", 12, "--seeds", 1, "--epochs", 1,
        "--prompts", own / "prompts.txt", "--max-new-tokens", 4,
        "--rollout-tokens", 1, "--transfer-q-prompts", 2,
    )  # fmt: skip


LEARNS, ANSWERS = slice(8), slice(12)
"""The part of `size` that commands take which only learn, and that of those without Transfer-Q*."""


class Terminal(io.StringIO):
    """A standard input at which somebody types."""

    def isatty(self) -> bool:
        return True


def own_task(own: Path, judge: str = "vader") -> tuple[object, ...]:
    return ("--pairs-from", own / "a.jsonl", "--faces", "positive", "--judge", judge)


def two_tasks(own: Path) -> tuple[object, ...]:
    """Without a judge."""
    return (
        *("--pairs-from", own / "a.jsonl", "--faces", "positive"),
        *("--pairs-from", own / "b.jsonl", "--faces", "readable"),
    )


def refused(cli: Cli, *arguments: object) -> str:
    """The one line that a command is refused with."""
    ended = cli("bench", *arguments)
    assert ended.status == 2, ended.out + ended.err
    assert "Traceback" not in ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("llmdoctor: error: ")]
    assert lines == ended.err.splitlines()[-1:], ended.err
    return lines[0]


def test_a_smoke_run_of_every_subcommand(good: Cli, size: tuple[object, ...], own: Path, tmp_path: Path) -> None:
    """All in one folder: each says that it is a smoke run, writes its file, and is quiet about its libraries."""
    output = tmp_path / "out"
    human = ("--train", own / "a.jsonl", "--validation", own / "b.jsonl")
    commands: dict[str, tuple[object, ...]] = {
        "table": ("--task", "sentiment", "--method", "best_of_n"),
        "frontier": ("--task", "sentiment", "--method", "best_of_n"),
        "pareto": (),
        "ablation": ("--task", "sentiment"),
        "dynamics": ("--task", "sentiment"),
        "human": human,
    }
    for name, more in commands.items():
        part = {"dynamics": LEARNS, "human": LEARNS, "pareto": ANSWERS, "ablation": ANSWERS}.get(name, slice(None))
        ended = good("bench", name, "--quick", "-o", output, *more, *size[part])
        assert SMOKE in ended.err, name
        assert "A smoke run: these figures mean nothing." in ended.out
        assert f"results are in {output / name}.json" in ended.out
        assert json.loads((output / f"{name}.json").read_text())
        record = json.loads((output / "run.json").read_text())[f"{name}.json"]
        assert record["quick"] is True
        assert "smoke run" in record["note"]
        assert record["options"]["pairs"] == 12
        if name not in ("dynamics", "human"):
            assert record["options"]["batch_size"] == 128
        for word in PRINTED_BY_LIBRARIES:
            assert word not in ended.out + ended.err, (name, word)
        assert "{'" not in ended.out + ended.err
    recorded = json.loads((output / "run.json").read_text())
    assert set(recorded) == {"pairs.json", "elo.json", *(f"{name}.json" for name in commands)}
    assert recorded["human.json"]["validation"]["source"] == str(own / "b.jsonl")
    assert "In part" not in good("bench", "report", "-o", output).err
    again = good("bench", "table", "--quick", "-o", output, *commands["table"], *size)
    assert "answers in" not in again.err
    assert "training" not in again.err


def test_a_table_of_ones_own_task(good: Cli, size: tuple[object, ...], own: Path, tmp_path: Path) -> None:
    ended = good("bench", "table", "-o", tmp_path / "out", "--method", "greedy", *own_task(own), *size)
    assert "smoke" not in ended.out + ended.err
    rows = json.loads((tmp_path / "out/table.json").read_text())
    assert {(row["task"], row["method"]) for row in rows} == {("positive", "patient"), ("positive", "greedy")}
    shown = [line.split()[:3] for line in ended.out.splitlines() if line.startswith("positive ")]
    assert shown == [["positive", row["method"], row["at"]] for row in rows]
    clamped = any(row["clamped"] for row in rows)
    assert ("the nearest setting stands in" in ended.out) == clamped
    assert json.loads((tmp_path / "out/run.json").read_text())["table.json"]["quick"] is False


def test_all_but_human_labels_take_ones_own_tasks(
    good: Cli, size: tuple[object, ...], own: Path, tmp_path: Path
) -> None:
    """Two are called after their faces; dynamics, which judge nothing, want no judge."""
    output = tmp_path / "out"
    pairs = two_tasks(own)
    good("bench", "pareto", "--quick", "-o", output, *pairs, "--judge", "vader", "--judge", "flesch", *size[ANSWERS])
    assert json.loads((output / "pareto.json").read_text())["tasks"] == ["positive", "readable"]
    more = ("--variant", "no_rounds", "--judge", "vader", "--judge", "flesch")
    good("bench", "ablation", "--quick", "-o", output, *pairs, *more, *size[ANSWERS])
    rows = json.loads((output / "ablation.json").read_text())
    assert {row["task"] for row in rows} == {"positive", "readable"}
    good("bench", "dynamics", "--quick", "-o", output, *pairs[:4], *size[LEARNS])
    assert {row["task"] for row in json.loads((output / "dynamics.json").read_text())} == {"positive"}
    judges = [task["judge"] for task in json.loads((output / "run.json").read_text())["ablation.json"]["tasks"]]
    assert judges == ["vader", "flesch"]
    told = good("bench", "report", "-o", output, "--plots", tmp_path / "plots").out
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert f"{len(plots)} charts are in {tmp_path / 'plots'}" in told
    assert {"pareto.svg", "dynamics-positive.svg", "ablation-readable.svg"} <= set(plots)


def test_without_a_subcommand_it_shows_its_help(cli: Cli) -> None:
    ended = cli("bench")
    assert (ended.status, ended.err) == (2, "")
    assert "Usage: llmdoctor bench" in ended.out
    assert all(name in ended.out for name in ("table", "frontier", "pareto", "ablation", "dynamics", "human", "report"))


@pytest.mark.parametrize("command", ["pareto", "ablation", "dynamics", "human"])
def test_an_option_that_would_do_nothing_is_none(cli: Cli, command: str) -> None:
    unheard = ["--rollout-tokens", "--transfer-q-prompts"]
    if command in ("dynamics", "human"):
        unheard += ["--prompt-count", "--max-new-tokens", "--batch-size"]
        (fields,) = _SizeOfLearning.__metadata__
        assert {setting.name for setting in fields.settings} == {*_LEARNING, "seeds"}, "what is recorded of them"
    for option in unheard:
        ended = cli("bench", command, option, 1)
        assert ended.status == 2
        assert f"No such option: {option}" in ended.err


def test_tasks_of_the_same_faces_are_numbered() -> None:
    tasks = _tasks(pairs=["a", "b", "c"], faces=["helpful", "harmless", "helpful"], judges=["vader"])
    assert [(task.name, task.pairs, task.faces, task.judge) for task in tasks] == [
        ("helpful", "a", "helpful", "vader"),
        ("harmless", "b", "harmless", "vader"),
        ("helpful-2", "c", "helpful", "vader"),
    ]


def test_tasks_of_ones_own_that_do_not_match(cli: Cli, own: Path, tmp_path: Path) -> None:
    line = refused(cli, "table", "-o", tmp_path / "out", *own_task(own), "--pairs-from", own / "b.jsonl")
    assert "2 × --pairs-from, 1 × --faces and 2 × --judge; expected as many of each, or one judge" in line
    line = refused(cli, "pareto", "-o", tmp_path / "out", *own_task(own))
    assert "a Pareto front needs two tasks, this comparison has 1" in line
    line = refused(cli, "pareto", "-o", tmp_path / "out", *two_tasks(own), "--judge", "vader")
    assert "vader would judge both tasks, and it does not know which is which" in line


def test_a_shard_decodes_and_writes_no_results(good: Cli, size: tuple[object, ...], own: Path, tmp_path: Path) -> None:
    command = ("bench", "table", "-o", tmp_path / "out", "--method", "greedy", *own_task(own), *size)
    ended = good(*command, "--shard", "1/2")
    assert "shard 1/2 is there; when all are, the same command without --shard makes the results" in ended.out
    assert not (tmp_path / "out/table.json").exists()
    # One seed of one task is one unit: nothing is left for the other.
    before = cell_files(tmp_path / "out")
    assert before
    good(*command, "--shard", "2/2")
    assert cell_files(tmp_path / "out") == before
    good(*command)
    assert (tmp_path / "out/table.json").exists()
    assert cell_files(tmp_path / "out") == before


def test_verbose_shows_what_the_libraries_say(good: Cli, size: tuple[object, ...], own: Path, tmp_path: Path) -> None:
    ended = good("bench", "table", "-o", tmp_path, "--method", "greedy", "--verbose", *own_task(own), *size)
    assert "train_loss" in ended.out


def test_unknown_names_list_the_known(cli: Cli, size: tuple[object, ...], tmp_path: Path) -> None:
    line = refused(cli, "table", "-o", tmp_path / "out", "--method", "magic", *size)
    assert "no method is named magic; there is llmdoctor, " in line
    line = refused(cli, "frontier", "-o", tmp_path / "out", "--task", "mood", "--task", "sentiment", *size)
    assert "no controlled task is named mood; there is sentiment, readability" in line
    line = refused(cli, "table", "-o", tmp_path / "out", "--shard", "2", *size)
    assert "a shard is a number and how many there are, such as 1/2, got '2'" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (("--judge", "vader"), "--pairs-from, --faces"),
        (("--pairs-from", "p.jsonl", "--faces", "positive"), "--judge"),
        (("--faces", "positive"), "--pairs-from, --judge"),
    ],
)
def test_a_half_given_task(
    cli: Cli, size: tuple[object, ...], tmp_path: Path, given: tuple[str, ...], missing: str
) -> None:
    line = refused(cli, "table", "-o", tmp_path / "out", *given, *size)
    assert f"a task of your own needs --pairs-from, --faces, --judge; missing: {missing}" in line


def test_some_methods_or_all_of_them(cli: Cli, size: tuple[object, ...], tmp_path: Path) -> None:
    for name in ("table", "frontier"):
        line = refused(cli, name, "-o", tmp_path / "out", "--method", "greedy", "--all", *size)
        assert "--method names some methods, --all takes all of them; give one of the two" in line


def test_controlled_tasks_beside_a_task_of_ones_own(
    cli: Cli, size: tuple[object, ...], own: Path, tmp_path: Path
) -> None:
    line = refused(cli, "table", "-o", tmp_path / "out", "--task", "sentiment", *own_task(own), *size)
    assert "--task names a controlled task, --pairs-from one of your own; give one of them" in line


@pytest.mark.parametrize(("content", "message"), [("\n", "is empty"), (None, "no such file")])
def test_bad_prompts(
    cli: Cli, size: tuple[object, ...], own: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    line = refused(cli, "table", "-o", tmp_path / "out", *own_task(own), *size, "--prompts", path)
    assert message in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--pairs-from", "none.jsonl", "--faces", "positive", "--judge", "vader"), "none.jsonl: no such file"),
        (("--patient", "./no-model"), "no-model"),
        (("--seeds", "0"), "seeds must be at least 1, got 0"),
        (("--prompt-count", "1"), "prompt_count must be at least 2, got 1"),
    ],
)
def test_bad_values(cli: Cli, size: tuple[object, ...], tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    assert message in refused(cli, "table", "-o", tmp_path / "out", "--method", "greedy", *size, *more)


def test_unknown_faces(cli: Cli, size: tuple[object, ...], own: Path, tmp_path: Path) -> None:
    task = ("--pairs-from", own / "a.jsonl", "--faces", "happy", "--judge", "vader")
    assert "no faces for the dimension 'happy'" in refused(cli, "table", "-o", tmp_path / "out", *task, *size)
    human = ("--train", own / "a.jsonl", "--validation", own / "b.jsonl", "--faces", "happy")
    assert "no faces for the dimension 'happy'" in refused(cli, "human", "-o", tmp_path / "out", *human, *size[LEARNS])


def test_a_reward_model_with_two_heads(
    cli: Cli, size: tuple[object, ...], own: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    two = tmp_path / "two-heads"
    AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=2).save_pretrained(two)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(two)
    line = refused(cli, "table", "-o", tmp_path / "out", *own_task(own, f"reward:{two}"), *size)
    assert "is a reward model with 2 heads; expected one output" in line
    assert not (tmp_path / "out/raw").exists()


def test_a_judge_that_is_down_leaves_the_answers(
    cli: Cli, good: Cli, size: tuple[object, ...], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens; everything is decoded and kept. With the judge up, the same command only judges."""
    monkeypatch.setattr(
        "llmdoctor.evaluation.chat_endpoint.ChatEndpoint",
        lambda model, **how: ChatEndpoint(model, retries=0, **how),
    )
    output = tmp_path / "out"
    judging = Judging(answer=lambda _: Say(json.dumps({"verdict": "tie"})))
    with serving(judging) as server:
        port = server.url
    command: tuple[Any, ...] = ("table", "-o", output, "--method", "greedy", *own_task(own, f"chat:wise@{port}"), *size)
    line = refused(cli, *command)
    assert "no connection" in line
    assert f"kept in {output / 'judge.sqlite'}: run again to go on" in line
    before = cell_files(output)
    assert before
    assert not (output / "table.json").exists()
    with serving(Judging(answer=lambda _: Say("no such key", status=401))) as server:
        other = [f"chat:wise@{server.url}" if str(word).startswith("chat:") else word for word in command]
        assert "status 401: no such key; check the key in the environment variable OPENAI_API_KEY" in refused(
            cli, *other
        )
    with serving(judging) as server:
        other = [f"chat:wise@{server.url}" if str(word).startswith("chat:") else word for word in command]
        ended = good("bench", *other)
    assert "answers in" not in ended.err
    assert cell_files(output) == before
    rows = json.loads((output / "table.json").read_text())
    assert all(row["tie"] == row["prompts"] for row in rows)


def test_a_chat_judge_is_announced_and_reported(
    cli: Cli, good: Cli, size: tuple[object, ...], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many questions for nobody to ask are refused with nothing asked; --yes goes on; a rerun asks nothing."""
    monkeypatch.setattr("llmdoctor.cli.bench_judge.UNASKED", 10)
    output = tmp_path / "out"
    with serving(Judging()) as server:
        judge = f"chat:wise@{server.url}"
        command = ("table", "-o", output, "--method", "greedy", *own_task(own, judge), *size)
        priced = (*command, "--judge-price-in", "1", "--judge-price-out", "2", "--judge-concurrency", 2)
        line = refused(cli, *command)
        assert f"{judge} would be asked up to " in line
        assert "there is no terminal to ask you at; more than 10 need --yes" in line
        assert server.bodies == []
        ended = good("bench", *priced, "--yes")
        asked = len(server.bodies)
        first = next(line for line in ended.err.splitlines() if line.startswith(judge))
        assert " questions to ask, 0 answered already; about " in first
        assert ", about $0.0" in first
        assert " if every first reply holds a verdict (where none does, up to 3 are asked for)" in first
        assert "; after that at most 36 more of that kind" in first
        (said,) = [line for line in ended.out.splitlines() if line.startswith(judge)]
        assert f"{asked} replies asked for, " in said
        assert "0 refused, 0 unparsed" in said
        # The server counts 100 tokens read and 10 written a reply: 120 millionths of a dollar.
        assert said.endswith(f"written; ${asked * 120 / 1e6:.4f}")
        again = good("bench", *command)
        assert "questions are answered already, nothing is asked" in again.err
        assert f"{judge}: 0 replies asked for" in again.out
        assert len(server.bodies) == asked


@pytest.mark.parametrize("answer", ["y", "n"])
def test_at_a_terminal_the_user_is_asked(
    cli: Cli, size: tuple[object, ...], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """Once: what comes later is part of the question. No is no error, and what is decoded is kept."""
    stdin = Terminal(answer + "\n")
    monkeypatch.setattr("sys.stdin", stdin)
    output = tmp_path / "out"
    with serving(Judging()) as server:
        judge = f"chat:wise@{server.url}"
        ended = cli("bench", "table", "-o", output, "--method", "greedy", *own_task(own, judge), *size)
        assert (ended.err + ended.out).count("Ask them? [y/N]") == 1
        assert (ended.status, bool(server.bodies)) == ((0, True) if answer == "y" else (130, False))
    if answer == "n":
        assert f"stopped. Finished answers and models are kept in {output}" in ended.err
    assert cell_files(output)


def test_a_judge_against_human_labels(cli: Cli, good: Cli, own: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with serving(Judging()) as server:
        judge = f"chat:wise@{server.url}"
        command = ("judge", "--judge", judge, "--pairs", own / "a.jsonl", "-o", output)
        ended = good("bench", *command, "--limit", 5)
        found = json.loads((output / "judge.json").read_text())
        assert found["pairs"] == 5
        assert f"agreement with the labels of 5 pairs: {found['agreement']:.1f} % (" in ended.out
        assert "the same in both orders: 100.0 %" in ended.out
        assert f"ties: {found['ties']}, unanswered among them: 0" in ended.out
        assert f"{judge}: {len(server.bodies)} replies asked for, 0 from the cache; of 5 comparisons" in ended.out
        assert f"{judge}: {len(server.bodies)} questions to ask, 0 answered already" in ended.err
        smoke = good("bench", *command, "--quick")
        assert "A smoke run: these figures mean nothing." in smoke.out
    assert json.loads((output / "run.json").read_text())["judge.json"]["quick"] is True
    plain = good("bench", "judge", "--judge", "brevity", "--pairs", own / "a.jsonl", "-o", output)
    assert "it reads each answer by itself" in plain.out
    line = refused(cli, "judge", "--judge", "vader", "--pairs", own / "a.jsonl", "-o", output, "--judge-rpm", 5)
    assert "judge_rpm: only for a chat judge, the judge is 'vader'" in line
    assert "none.jsonl: no such file" in refused(cli, "judge", "--judge", "vader", "--pairs", "none.jsonl")
    line = refused(cli, *command, "--judge-prompt", tmp_path / "no.txt")
    assert "no.txt: cannot be read" in line


def test_other_options_and_broken_files_are_refused(
    cli: Cli, good: Cli, size: tuple[object, ...], own: Path, tmp_path: Path
) -> None:
    command = ("table", "-o", tmp_path, "--method", "greedy", *own_task(own), *size)
    good("bench", *command)
    line = refused(cli, *command, "--max-new-tokens", 3)
    assert "was made from other inputs (length: stored 4, now 3). Give another output folder, or delete it." in line
    path = tmp_path / "raw/any/greedy/only-seed0.jsonl.gz"
    path.write_bytes(path.read_bytes()[:100])
    line = refused(cli, *command)
    assert f"{path} is broken" in line
    assert "delete it and run again" in line
    path.unlink()
    assert "seed 0: greedy: 6 answers in" in good("bench", *command).err


def test_without_trl(
    cli: Cli, size: tuple[object, ...], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    line = refused(cli, "table", "-o", tmp_path / "out", "--method", "dpo", *own_task(own), *size)
    assert "DPO is trained by TRL, which is not installed: pip install -e '.[bench]'" in line
    assert cell_files(tmp_path / "out")


def test_an_interrupted_run_says_what_is_kept(
    cli: Cli, size: tuple[object, ...], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmdoctor.bench.table.best_point", interrupt)
    ended = cli("bench", "table", "-o", tmp_path, "--method", "greedy", *own_task(own), *size)
    assert ended.status == 130
    assert f"Finished answers and models are kept in {tmp_path}; the same command goes on" in ended.err


def test_consent_is_to_one_judges_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was agreed to for later covers the next rows of that judge, and nobody else's nor the next task's."""
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("typer.confirm", lambda *_, **__: asked.append("?"))
    told: list[str] = []
    user = AskUser(SimpleNamespace(progress=SimpleNamespace(say=told.append)), yes=False)  # type: ignore[arg-type]

    def wants(judge: str, new: int, later: int = 0) -> int:
        user(Asking(judge, CostEstimate(new, new, 10 * new, None, None, 3), later))
        return len(asked)

    assert wants("chat:cheap", 600, 3000) == 1
    assert wants("chat:dear", 1500) == 2
    assert wants("chat:cheap", 2900) == 2
    assert wants("chat:cheap", 50) == 3
    assert wants("chat:cheap", 600, 3000) == 4
    assert wants("chat:cheap", 600, 3000) == 5
    assert wants("chat:cheap", 3001) == 6
    assert len(told) == 7
