"""Cells of answers: decoded once, refused where they do not fit, whole after a kill; best-of-n by itself."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.bench.tools import PROMPTS, SEEDS, answers_of, arena_of, cell_files, tasks_of
from tests.killing import JobServer

from llmdoctor.baselines.best_of_n import BestOfN
from llmdoctor.bench import kit as kit_module
from llmdoctor.bench.arena import Arena, ShardDone
from llmdoctor.bench.cells import Cell
from llmdoctor.bench.kit import ABLATIONS, Kit
from llmdoctor.bench.methods import BEST_OF_N, CONTENDERS, DOCTOR, PATIENT, SAMPLES
from llmdoctor.bench.options import BenchOptions, Shard
from llmdoctor.bench.table import make_table
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.decoding.row import Row
from llmdoctor.errors import FingerprintMismatch, UserError

GREEDY = CONTENDERS["greedy"]


@pytest.fixture
def copied(compared: Arena, tmp_path: Path) -> Path:
    """A copy of the finished comparison's folder."""
    return Path(shutil.copytree(compared.output, tmp_path / "out"))


def test_a_finished_comparison_is_neither_decoded_nor_trained_again(
    tiny_folder: Path, bench_sources: Path, copied: Path
) -> None:
    before = cell_files(copied)
    arena, told = arena_of(tiny_folder, bench_sources, copied)
    shutil.rmtree(copied / "models")
    make_table(arena)
    assert told.started == []
    assert cell_files(copied) == before
    assert not (copied / "models").exists()


def test_only_what_is_missing_is_decoded_with_the_models_that_are_there(
    tiny_folder: Path, bench_sources: Path, copied: Path
) -> None:
    before = cell_files(copied)
    gone = [f"raw/a/{DOCTOR}/beta=2-seed1.jsonl.gz", "raw/a/args/weight=1.5-seed0.jsonl.gz"]
    for name in gone:
        (copied / name).unlink()
    arena, told = arena_of(tiny_folder, bench_sources, copied)
    make_table(arena)
    after = cell_files(copied)
    # The token rewards are there as well: they are only opened.
    assert [step for step in told.started if "token rewards" not in step] == [
        "a, seed 0: args weight 1.5",
        "a, seed 1: llmdoctor beta 2",
    ]
    assert {name: after[name] for name in before if name not in gone} == {
        name: before[name] for name in before if name not in gone
    }
    for name in gone:
        assert answers_of(after[name][1]) == answers_of(before[name][1])


def test_every_prompt_has_its_answers_in_order(compared: Arena) -> None:
    """The patient answers eight times; Transfer-Q* the first four prompts only, as the options say."""
    ids = [prompt.id for prompt in compared.prompts]
    for contender in CONTENDERS.values():
        samples = SAMPLES if contender.name == PATIENT else 1
        asked = ids[:4] if contender.few_prompts else ids
        for seed in range(SEEDS):
            cell = compared.cells.get(compared.tasks[0], contender, contender.settings[0], seed)
            assert [answer.prompt for answer in cell.answers] == [name for name in asked for _ in range(samples)]
            assert [answer.sample for answer in cell.sample(0)] == [0] * len(asked)
            assert cell.seconds > 0
            assert all(answer.tokens <= 6 for answer in cell.answers)


def test_guided_answers_keep_where_the_choice_was_moved(compared: Arena) -> None:
    """One mark a token, of the guided methods alone."""
    task = compared.tasks[0]
    cell = compared.cells.get(task, CONTENDERS[DOCTOR], {"beta": 2.0}, 0)
    assert [len(answer.marks) for answer in cell.answers] == [answer.tokens for answer in cell.answers]
    assert any(shift for answer in cell.answers for _, shift in answer.marks)
    assert not any(answer.marks for answer in compared.cells.get(task, GREEDY, {}, 0).answers)


def test_seeds_draw_apart_and_settings_draw_alike(compared: Arena) -> None:
    """The same prompt, seed and sample draw with the same numbers, so the patient's answer is found again at top-k 300.

    (A vocabulary of 300: top-k with at least as many is the patient itself.)
    """
    task = compared.tasks[0]
    texts = [
        [a.text for a in compared.cells.get(task, CONTENDERS[PATIENT], {}, seed).sample(0)] for seed in range(SEEDS)
    ]
    assert texts[0] != texts[1]
    requests = [
        Request(p.messages, sampling=SamplingParams(max_new_tokens=6, top_k=300, seed=(1 << 40) + (place << 16)))
        for place, p in enumerate(compared.prompts)
    ]
    decoder = GuidedDecoder(compared.kits["a"].patient)
    assert [done.text for done in decoder.generate(requests)] == texts[1]


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"max_new_tokens": 5}, ["length"]),
        ({"prompt_count": 5}, ["prompts"]),
        ({"pairs": 10}, ["learned", "lesson"]),
        ({"epochs": 2}, ["learned", "recipes"]),
    ],
    ids=str,
)
def test_other_options_are_refused_in_one_line(
    tiny_folder: Path, bench_sources: Path, copied: Path, changes: dict[str, Any], differs: list[str]
) -> None:
    arena, told = arena_of(tiny_folder, bench_sources, copied, **changes)
    with pytest.raises(FingerprintMismatch, match="was made from other inputs") as caught:
        make_table(arena)
    stored, current = caught.value.stored, caught.value.current
    assert sorted(key for key in stored if stored[key] != current[key]) == differs
    assert "\n" not in str(caught.value)
    assert "Give another output folder" in str(caught.value)
    assert told.started == []


def test_other_prompts_faces_and_pairs_are_refused(
    tiny_folder: Path, bench_sources: Path, copied: Path, tmp_path: Path
) -> None:
    text = (bench_sources / "prompts.txt").read_text()
    (tmp_path / "other.txt").write_text(text.replace("cat", "dog", 1))
    arena, _ = arena_of(tiny_folder, bench_sources, copied, prompts=str(tmp_path / "other.txt"))
    with pytest.raises(FingerprintMismatch, match="prompts: stored"):
        arena.cells.get(arena.tasks[0], GREEDY, {}, 0)
    task = arena_of(tiny_folder, bench_sources, copied)[0].tasks[0]
    for other in (replace(task, faces="polite"), replace(task, pairs=str(bench_sources / "b.jsonl"))):
        arena, _ = arena_of(tiny_folder, bench_sources, copied, tasks=[other])
        with pytest.raises(FingerprintMismatch, match="learned: stored"):
            arena.cells.get(other, CONTENDERS[DOCTOR], {"beta": 2.0}, 0)
        # What has nothing to learn serves any task.
        assert len(arena.cells.get(other, GREEDY, {}, 0).answers) == PROMPTS


def test_other_pairs_of_the_same_name_are_refused(
    tiny_folder: Path, bench_sources: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after labels were swapped in the file; what learns nothing stays as it is."""
    pairs = Kit.pairs
    swap = lambda kit: [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs(kit)]  # noqa: E731
    monkeypatch.setattr(Kit, "pairs", swap)
    arena, _ = arena_of(tiny_folder, bench_sources, copied)
    task = arena.tasks[0]
    with pytest.raises(FingerprintMismatch, match=r"\(lesson: stored \w{16}, now \w{16}\)"):
        arena.cells.get(task, CONTENDERS[DOCTOR], {"beta": 2.0}, 0)
    assert len(arena.cells.get(task, GREEDY, {}, 0).answers) == PROMPTS


def test_other_weights_of_the_same_name_are_refused(
    tiny_folder: Path, bench_sources: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after another model was put into the folder."""
    monkeypatch.setattr(kit_module, "_weights", lambda spec: "another")
    arena, _ = arena_of(tiny_folder, bench_sources, copied)
    task = arena.tasks[0]
    for contender, setting in ((GREEDY, {}), (CONTENDERS[DOCTOR], {"beta": 2.0})):
        with pytest.raises(FingerprintMismatch, match=r"\(weights: stored \w{16}, now \w{16}\)"):
            arena.cells.get(task, contender, setting, 0)
    with pytest.raises(FingerprintMismatch, match=r"\(base: stored \w{16}, now another\)"):
        arena.kits["a"].trained("tfpo", 0)


def test_files_that_say_nothing_of_pairs_and_weights_are_read(
    tiny_folder: Path, bench_sources: Path, copied: Path
) -> None:
    """As those made before that was written down."""
    for path in copied.rglob("*-seed0.jsonl.gz"):
        forget = rewritten(lambda lines: [lines[0]["stamp"].pop(name) for name in ("weights", "lesson")])
        path.write_bytes(forget(path.read_bytes()))
    arena, told = arena_of(tiny_folder, bench_sources, copied)
    make_table(arena)
    assert told.started == []


def test_how_many_are_drawn_together_is_no_other_recipe(tiny_folder: Path, bench_sources: Path, copied: Path) -> None:
    arena, told = arena_of(tiny_folder, bench_sources, copied, batch_size=3)
    make_table(arena)
    assert told.started == []


def test_how_far_transfer_q_looks_ahead_matters_to_it_alone(
    tiny_folder: Path, bench_sources: Path, copied: Path
) -> None:
    arena, _ = arena_of(tiny_folder, bench_sources, copied, rollout_tokens=3)
    task = arena.tasks[0]
    assert len(arena.cells.get(task, CONTENDERS["args"], {"weight": 1.5}, 0).answers) == PROMPTS
    with pytest.raises(FingerprintMismatch, match="setting: stored"):
        arena.cells.get(task, CONTENDERS["transfer_q"], {"strength": 1.0}, 0)


def test_answers_of_models_that_would_be_trained_otherwise_now_are_refused(
    tiny_folder: Path, bench_sources: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of this project's defaults; methods that train nothing, or something else, stay as they are."""
    monkeypatch.setitem(ABLATIONS, "tfpo", {"config": {"eta": 0.7}})  # type: ignore[call-overload]
    arena, _ = arena_of(tiny_folder, bench_sources, copied)
    task = arena.tasks[0]
    with pytest.raises(FingerprintMismatch, match="recipes: stored"):
        arena.cells.get(task, CONTENDERS[DOCTOR], {"beta": 2.0}, 0)
    for name, setting in (("dpo", {"beta": 2.0}), ("greedy", {})):
        assert len(arena.cells.get(task, CONTENDERS[name], setting, 0).answers) == PROMPTS


def test_another_judge_judges_the_same_answers(tiny_folder: Path, bench_sources: Path, copied: Path) -> None:
    arena, told = arena_of(tiny_folder, bench_sources, copied, tasks=tasks_of(bench_sources, judge="brevity")[:1])
    make_table(arena)
    assert told.started == []


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 8]) + content[middle + 8 :]


def rewritten(change: Any) -> Any:
    def write(content: bytes) -> bytes:
        lines = [json.loads(line) for line in gzip.decompress(content).split(b"\n")[:-1]]
        change(lines)
        return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())

    return write


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (cut, "is broken"),
        (flipped, "is broken"),
        (lambda content: b"no gzip at all", "is broken"),
        (lambda content: b"", "is broken"),
        (lambda content: gzip.compress(b'{"schema_version": 1'), "is broken"),
        (lambda content: gzip.compress(b"[]\n"), "is broken"),
        (lambda content: gzip.compress("é".encode("latin-1")), "is broken"),
        (rewritten(lambda lines: lines[0].pop("stamp")), "is broken"),
        (rewritten(lambda lines: lines[1].pop("text")), "is broken"),
        (rewritten(lambda lines: lines[0].update(schema_version=7)), "has schema version 7; this version reads 1"),
    ],
)
def test_a_broken_file_gets_one_line(
    tiny_folder: Path, bench_sources: Path, copied: Path, break_: Any, message: str
) -> None:
    path = copied / "raw/any/greedy/only-seed0.jsonl.gz"
    path.write_bytes(break_(path.read_bytes()))
    arena, _ = arena_of(tiny_folder, bench_sources, copied)
    with pytest.raises(UserError, match=r"only-seed0\.jsonl\.gz") as caught:
        arena.cells.get(arena.tasks[0], GREEDY, {}, 0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if message == "is broken":
        assert "delete it and run again" in str(caught.value)


class NumberedSamples:
    """The patient, with the seeds that the arena gives the samples of a prompt: `Request.seed` names the first."""

    def __init__(self, kit: Kit, n: int) -> None:
        self.inner = GuidedDecoder(kit.patient, max_batch_size=64)
        self.n = n

    def generate(self, requests: Iterable[Request], *, on_done: Any = None) -> list[Completion]:
        asked = [
            replace(request, sampling=replace(request.sampling, seed=int(request.id) + place % self.n))
            for place, request in enumerate(requests)
        ]
        return self.inner.generate(asked, on_done=on_done)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_best_of_n_is_best_of_n_by_itself(compared: Arena, n: int) -> None:
    kit, task = compared.kits["a"], compared.tasks[0]
    for seed in range(SEEDS):
        decoder = BestOfN(NumberedSamples(kit, n), kit.reward_model(seed), n)
        done = decoder.generate(
            Request(p.messages, sampling=SamplingParams(max_new_tokens=6), id=str((seed << 40) + (place << 16)))
            for place, p in enumerate(compared.prompts)
        )
        cell = compared.cells.get(task, CONTENDERS[BEST_OF_N], {"n": float(n)}, seed)
        assert [answer.text for answer in cell.answers] == [one.text for one in done]
        assert [answer.kl for answer in cell.answers] == pytest.approx([one.kl for one in done])
        assert [(a.tokens, a.finish) for a in cell.answers] == [(len(o.token_ids), o.finish_reason) for o in done]
        assert [(answer.patient_forwards, answer.guide_forwards) for answer in cell.answers] == [
            (one.patient_forwards, one.guide_forwards) for one in done
        ]


def test_a_trained_reward_model_that_gives_no_numbers_chooses_nothing(
    compared: Arena, tiny_folder: Path, bench_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first answer would win every time, as NaN is smaller than nothing. No cell is left behind."""
    arena, _ = arena_of(tiny_folder, bench_sources, tmp_path, seeds=1)
    critic = compared.kits["a"].reward_model(0)
    monkeypatch.setattr(critic, "score", lambda prompts, texts, complete: [math.nan] * len(texts))
    monkeypatch.setattr(arena.kits["a"], "reward_model", lambda seed: critic)
    with pytest.raises(UserError, match="a: the reward model of seed 0 gave the reward nan to 48 of 48 answers"):
        arena.cells.get(arena.tasks[0], CONTENDERS[BEST_OF_N], {"n": 2.0}, 0)
    assert not (tmp_path / "raw/a").exists()


def test_only_best_of_n_decodes_nothing_of_its_own() -> None:
    assert [name for name, contender in CONTENDERS.items() if contender.build is None] == [BEST_OF_N, "readout_best"]


JOB = """
from pathlib import Path

from llmdoctor.bench import kit as kit_module
from llmdoctor.bench.arena import Arena, ShardDone
from llmdoctor.bench.options import BenchOptions, Task
from llmdoctor.bench.table import make_table
from llmdoctor.cli.progress import Progress
from llmdoctor.models import loading

def main(patient, folder, output):
    # As `float32`.
    loading.cpu_multiplies_bfloat16 = lambda: False
    options = BenchOptions(
        patient=patient, prompts=folder + "/prompts.txt", prompt_count=6, pairs=12, seeds=2, max_new_tokens=6,
        epochs=1, rounds=1, batch_size=64,
    )
    arena = Arena(Path(output), options, Progress(), [Task("a", folder + "/a.jsonl", "positive", "vader")])
    make_table(arena, ["best_of_n", "genarm"])
"""


def test_a_killed_run_goes_on(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path, job_server: JobServer, compared: Arena
) -> None:
    """Killed again and again: what was there stays as it is, all of it is whole, and the end is an unbroken run's."""
    output = tmp_path / "out"

    def left() -> dict[str, Any]:
        found = cell_files(output) if output.exists() else {}
        assert all(answers_of(content) for _, content in found.values())
        configs = ("doctor.json", "reward_model.json")
        made = [path for name in configs for path in (output / "models").glob(f"*/seed*/*/{name}")]
        return {**found, **{str(path): path.stat().st_mtime_ns for path in made}}

    seen = job_server.run_through_kills(
        *(JOB, tiny_folder, bench_sources, output),
        progress=lambda: len(list((output / "raw").glob("*/*/*.gz"))),
        kills=[1, 5, 12],
        left=left,
    )
    last = left()
    for found in seen:
        assert {name: last[name] for name in found} == found
    end = cell_files(output)
    whole = cell_files(compared.output)
    for name, (_, content) in end.items():
        for one, other in zip(answers_of(content), answers_of(whole[name][1]), strict=True):
            # Rounded to four places, and in float32 the last one may fall on either side.
            for key, places in {"kl": 2e-4, "patient_logp": 2e-4}.items():
                assert one.pop(key) == pytest.approx(other.pop(key), abs=places)
            shifts = [[value for _, value in answer.pop("marks")] for answer in (one, other)]
            assert shifts[0] == pytest.approx(shifts[1], abs=2e-3)
            assert one == other
    methods = {name.split("/")[2] for name in end}
    assert methods == {DOCTOR, PATIENT, BEST_OF_N, "genarm"}
    rows = json.loads((output / "table.json").read_text())
    reference = {(row["method"], row["at"]): row for row in json.loads((compared.output / "table.json").read_text())}
    timed = {"tokens_per_second"}
    for row in rows:
        other = reference[row["method"], row["at"]]
        assert row.keys() == other.keys()
        for key in row.keys() - timed:
            number = isinstance(row[key], float)
            assert row[key] == (pytest.approx(other[key], abs=2e-4) if number else other[key]), key


def test_shards_make_together_what_one_process_makes(tiny_folder: Path, bench_sources: Path, tmp_path: Path) -> None:
    """Nothing twice, nothing missing, and no results before all are there; no shard needs to be first."""
    names, tasks = [PATIENT, "greedy", BEST_OF_N], tasks_of(bench_sources)
    contenders = [CONTENDERS[name] for name in names]
    whole, _ = arena_of(tiny_folder, bench_sources, tmp_path / "whole", tasks=tasks)
    whole.decode(contenders)
    made: list[set[str]] = []
    for number in (3, 1, 2):
        output = tmp_path / f"shard{number}"
        arena, _ = arena_of(tiny_folder, bench_sources, output, tasks=tasks, shard=Shard(number, 3))
        with pytest.raises(ShardDone):
            arena.decode(contenders)
        made.append(set(cell_files(output)))
        shutil.copytree(output / "raw", tmp_path / "together/raw", dirs_exist_ok=True)
    of_tasks = [{name for name in cells if not name.startswith("raw/any/")} for cells in made]
    assert sum(map(len, of_tasks)) == len(set.union(*of_tasks))
    assert all(of_tasks)
    one, other = cell_files(tmp_path / "whole"), cell_files(tmp_path / "together")
    assert set(one) == set(other)
    for name, (_, content) in one.items():
        assert answers_of(content) == answers_of(other[name][1]), name


def test_shards_that_want_the_same_answers_draw_them_once(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    """The patient's answers of a seed, which two tasks' best-of-n choose from, are asked for by both at once."""
    arenas = [arena_of(tiny_folder, bench_sources, tmp_path, tasks=tasks_of(bench_sources)) for _ in range(2)]
    asking = threading.Barrier(2)
    found: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        arena, _ = arenas[number]
        asking.wait()
        cell = arena.cells.get(arena.tasks[number], CONTENDERS[PATIENT], {}, 0)
        found[number] = [answer.text for answer in cell.answers]

    shards = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
    assert found[0] == found[1]
    assert [step for _, told in arenas for step in told.started] == ["seed 0: patient"]
    assert [path.name for path in (tmp_path / "raw" / "any" / PATIENT).iterdir()] == ["only-seed0.jsonl.gz"]


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "a/2", "1/b", "-1/2", "1/0", "1.0/2", "1/2/3"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UserError, match=f"a shard is a number and how many there are, such as 1/2, got '{text}'"):
        Shard.parse(text)


@pytest.mark.parametrize("text", ["0/2", "3/2"])
def test_a_shard_is_one_of_all(text: str) -> None:
    with pytest.raises(UserError, match=f"a shard is one of 1/2 … 2/2, got {text}"):
        Shard.parse(text)
    assert Shard.parse("2/2") == Shard(2, 2)


def test_options_refuse_what_cannot_be() -> None:
    with pytest.raises(UserError, match="seeds must be at least 1, got 0"):
        BenchOptions(seeds=0)
    with pytest.raises(UserError, match="prompt_count must be at least 2, got 1"):
        BenchOptions(prompt_count=1)


def test_a_quick_run_is_never_larger_than_what_was_asked_for() -> None:
    quick = BenchOptions(pairs=8, max_new_tokens=100).quick()
    assert (quick.pairs, quick.max_new_tokens, quick.seeds, quick.prompt_count) == (8, 24, 1, 16)


@pytest.mark.parametrize("broken", [1, PROMPTS])
def test_answers_that_end_with_an_error_are_told(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """Some are kept, with what was said until then; where all are, nothing is."""
    arena, told = arena_of(tiny_folder, bench_sources, tmp_path, seeds=1)
    append = Row.append

    def append_or_fail(self: Row, *token: Any) -> None:
        if self.index < broken and len(self.completion.token_ids) == 2:
            self.finish("error")
        else:
            append(self, *token)

    monkeypatch.setattr(Row, "append", append_or_fail)

    def get() -> Cell:
        return arena.cells.get(arena.tasks[0], GREEDY, {}, 0)

    if broken == PROMPTS:
        with pytest.raises(UserError, match="seed 0: every answer of greedy ends with an error"):
            get()
        assert not list(tmp_path.rglob("*.jsonl.gz"))
    else:
        answers = get().answers
        assert (answers[0].finish, answers[0].tokens) == ("error", 2)
        line = f"1 of {PROMPTS} answers end with an error"
        assert line in told.said[-1]
        get()
        assert sum(line in said for said in told.said) == 1
        # Who finds them later is told, too.
        again, told = arena_of(tiny_folder, bench_sources, tmp_path, seeds=1)
        again.cells.get(again.tasks[0], GREEDY, {}, 0)
        assert line in told.said[-1]
