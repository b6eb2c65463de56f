"""Mistakes of the user's: one clear line, status 2, and nothing finished is lost."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.cli.harness import CPU, PAIRS, Cli, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdoctor.cli import results
from llmdoctor.rewards.store import RewardStore


def refused(cli: Cli, *arguments: object) -> str:
    """The one line that a command is refused with."""
    ended = cli(*arguments)
    assert ended.status == 2, ended.out + ended.err
    assert ended.out == ""
    lines = [line for line in ended.err.splitlines() if line.startswith("llmdoctor: error: ")]
    assert lines == ended.err.splitlines()[-1:], ended.err
    assert "Traceback" not in ended.err
    return lines[0]


def rewards_of(pairs: Path, patient: Path, output: Path, *more: object) -> tuple[object, ...]:
    return ("rewards", "--pairs", pairs, "--faces", "positive", "--patient", patient, "-o", output, *more, *CPU)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', "line 2 is not JSON"),
        ('{"prompt": "a", "chosen": "b"}\n', "line 1 has no `rejected`"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "line 1 has identical `chosen` and `rejected`"),
    ],
)
def test_bad_pairs_are_found_before_the_model_is_loaded(
    cli: Cli, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content)
    line = refused(cli, *rewards_of(path, tmp_path / "no-such-model", tmp_path / "out"))
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), ("\n", "is empty")])
def test_bad_prompts(cli: Cli, tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    for command in ("pairs", "generate"):
        assert message in refused(cli, command, "--prompts", path, "-o", tmp_path / "out.jsonl", "--patient", "./none")


def test_a_prompt_longer_than_the_context(cli: Cli, good: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    long = {"prompt": "7" * 600, "chosen": "b", "rejected": "c"}
    path = write_jsonl(tmp_path / "pairs.jsonl", [*PAIRS, long])
    command = rewards_of(path, tiny_folder, tmp_path / "out")
    assert re.search(r"pair 5 \('.*' …\) has a prompt of", refused(cli, *command))
    shutil.rmtree(tmp_path / "out")
    assert "4 pairs (1 skipped: 1 too long), " in good(*command, "--too-long", "skip").out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Short?\n" + "7" * 600 + "\n")
    command = ("generate", "--prompts", prompts, "-o", tmp_path / "a.jsonl", "--patient", tiny_folder, *CPU)
    assert "prompt 2 has 6" in refused(cli, *command)
    assert "leaves no room" in refused(cli, "generate", "7" * 600, "--patient", tiny_folder, *CPU)


def test_pairs_of_several_dimensions(cli: Cli, good: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    """Told before the patient is loaded, wherever the second one comes."""
    row = {"prompt": "Tea?", "response_0": "Yes.", "response_1": "No.", "better_response_id": 0}
    path = write_jsonl(tmp_path / "pku.jsonl", [{**row, "safer_response_id": 1}])
    for command in (
        rewards_of(path, Path("none"), tmp_path / "out"),
        ("readout", "--pairs", path, "-o", tmp_path / "r"),
    ):
        line = refused(cli, *command)
        assert "several dimensions (harmless and helpful), " in line
        assert "choose it with --dimension NAME" in line
    good(*rewards_of(path, tiny_folder, tmp_path / "out", "--dimension", "harmless"))
    (made,) = RewardStore.open(tmp_path / "out").rows()
    assert ("".join(made["chosen_tokens"][:-1]), made["dimension"]) == ("No.", "harmless")


def test_what_was_cut_and_what_was_left_out_is_said(cli: Cli, good: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    """Of four good pairs one becomes the same by the cut; a row that is no pair is left out only where asked for."""
    rows = [*PAIRS[:3], {"prompt": "Sing.", "chosen": "La la la la!", "rejected": "La la la la?"}, {"prompt": "?"}]
    command = rewards_of(write_jsonl(tmp_path / "p.jsonl", rows), tiny_folder, tmp_path / "out")
    assert "line 5" in refused(cli, *command, "--on-bad", "error")
    assert "unknown on_bad 'drop', expected one of auto, error, skip" in refused(cli, *command, "--on-bad", "drop")
    said = good(*command, "--on-bad", "skip", "--max-completion-length", 6)
    assert "3 pairs (1 skipped: 1 with equal responses), " in said.out
    cut = RewardStore.open(tmp_path / "out").manifest["cut"]
    assert cut > 0
    assert f"of 6 responses {cut} were cut at 6 tokens (--max-completion-length)" in said.out
    assert "skipped 1 of 5 rows" in said.err


@pytest.mark.parametrize("arguments", [("caf\udce9",), ("Hi", "--system", "caf\udce9")])
def test_arguments_that_are_not_utf8(cli: Cli, tiny_folder: Path, arguments: tuple[str, ...]) -> None:
    """Python hands on the byte 0xe9 as half of a surrogate pair."""
    line = refused(cli, "generate", *arguments, "--patient", tiny_folder, *CPU)
    assert r"'caf\udce9' is not text in UTF-8" in line


@pytest.fixture(scope="module")
def other_vocabulary(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one more token."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["<|extra|>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_vocabulary(
    cli: Cli, finished: Path, tiny_folder: Path, other_vocabulary: Path, tmp_path: Path
) -> None:
    rewards = finished / "rewards"
    line = refused(cli, "inspect", rewards, "--patient", other_vocabulary, "-o", tmp_path / "page.html", *CPU)
    assert f"{other_vocabulary} (tokenizer " in line
    assert f"made with {tiny_folder} (tokenizer " in line


def test_other_faces_than_asked(cli: Cli, finished: Path, tmp_path: Path) -> None:
    """Refused by what was recorded, before any model is loaded."""
    doctor, rewards = finished / "doctor", finished / "rewards"
    for command in (("generate", "Hi"), ("chat",)):
        line = refused(cli, *command, "--patient", "./none", "--doctor", f"{doctor}=1", "--dimension", "helpful")
        assert line.endswith(f"the doctor {doctor} was trained for 'positive', not for 'helpful'")
    line = refused(cli, "train", "--rewards", rewards, "--faces", "helpful", "-o", tmp_path / "doctor")
    assert line.endswith(f"the rewards in {rewards} were made with the faces 'positive', not 'helpful'")


def test_the_dimension_that_was_asked_for(good: Cli, finished: Path, tiny_folder: Path) -> None:
    good("generate", "Hi", "--patient", tiny_folder, "--doctor", finished / "doctor", "--dimension", "polite",
         "--dimension", "positive", "--max-new-tokens", 1, *CPU)  # fmt: skip


def test_two_doctors_of_one_name(cli: Cli, good: Cli, finished: Path, tiny_folder: Path) -> None:
    command = ("generate", "Hi", "--patient", tiny_folder, "--max-new-tokens", 1, *CPU)
    doctor = finished / "doctor"
    line = refused(cli, *command, "--doctor", doctor, "--doctor", doctor)
    assert "two doctors are named 'positive'; name one of them: --doctor NAME:PATH=BETA" in line
    good(*command, "--doctor", doctor, "--doctor", f"second:{doctor}=0.5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "give either one PROMPT or --prompts FILE"),
        (["generate", "Hi", "--prompts", "x.txt"], "give either one PROMPT or --prompts FILE"),
        (["generate", "--prompts", "x.txt"], "--prompts and --output belong together"),
        (["generate", "--prompts", "x.txt", "-o", "x.txt"], "holds the prompts, and would be written over"),
        (["generate", " "], "the prompt is empty"),
        (["generate", "Hi", "--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
        (["generate", "Hi", "--alpha", "x"], "Invalid value for '--alpha'"),
        (["generate", "Hi", "--doctor", "d=much"], "'much' is no number; expected PATH=BETA"),
        (["generate", "Hi", "--doctor", "d=nan"], "a finite number BETA"),
        (["generate", "Hi", "--doctor", "./none"], "none is not a doctor: it has no doctor.json"),
        (["generate", "Hi", "--threads", "0"], "threads must be at least 1, got 0"),
        (["pairs", "--scorer", "vader", "--faces", "polite", "-o", "x.jsonl"], "either --scorer or --faces, not both"),
        (["pairs", "--paraphrase", "2", "-o", "x.jsonl"], "are meant by --faces DIMENSION; give that, too"),
        (["pairs", "--scorer", "taste", "-o", "x.jsonl"], "unknown scorer 'taste'"),
        (["rewards", "--pairs", "p.jsonl", "--faces", "loud", "-o", "x"], "no faces for the dimension 'loud'"),
        (["rewards", "--pairs", "p.jsonl", "--faces", "polite", "--paraphrase", "9", "-o", "x"], "no paraphrase 9"),
        (["rewards", "--faces", "polite", "-o", "x"], "Missing option '--pairs' (see: llmdoctor rewards --help)"),
        (["inspect", "."], "holds no token rewards"),
        (["train", "--rewards", ".", "-o", "x", "--speed", "9"], "No such option: --speed"),
        (["trian"], "No such command 'trian'"),
    ],
)
def test_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(cli, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--report-to",
            "carrier-pigeon",
            "report_to 'carrier-pigeon' is unknown or not installed; available here: none",
        ),
        ("--lr-scheduler-type", "zigzag", "zigzag is not a valid SchedulerType"),
        ("--eval-strategy", "never", "never is not a valid IntervalStrategy"),
        ("--eta", "0", "eta must be positive and finite, got 0.0"),
        ("--lora-rank", "0", "lora_rank must be at least 1, got 0"),
        ("--eval-fraction", "0.9", "4 pairs leave none to train on"),
    ],
)
def test_bad_training_settings(cli: Cli, finished: Path, tmp_path: Path, option: str, value: str, message: str) -> None:
    assert message in refused(
        cli, "train", "--rewards", finished / "rewards", "-o", tmp_path / "d", option, value, *CPU
    )
    assert not (tmp_path / "d" / "doctor.json").exists()


_PAIRS = "--pairs pairs.jsonl --faces positive"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate --prompts p.txt -o folder", "folder is a folder; the answers need a file, such as"),
        ("generate --prompts p.txt -o file", "file is there already, made by something else"),
        ("generate --prompts p.txt -o file/a.jsonl", "file is a file; give another output"),
        ("generate Hi --overwrite", "--limit and --overwrite are of --prompts FILE"),
        ("generate Hi --limit 3", "--limit and --overwrite are of --prompts FILE"),
        ("generate Hi --doctor {doctor} --form sum", "form must be one of ratio, product, got 'sum'"),
        ("generate Hi --doctor {doctor} --doctor {doctor}=2", "two doctors are named 'positive'"),
        ("generate Hi --doctor {doctor} --batch-size 0", "Invalid value for '--batch-size'"),
        ("generate Hi --doctor cut", "the doctor cut is not whole: it lacks value_head.safetensors"),
        ("generate Hi --dimension polite", "--dimension says what a doctor must be trained for; give --doctor"),
        ("generate Hi --alpha nan", "alpha must be a finite number, got nan"),
        ("generate Hi --draft folder", "folder is not a draft model: it has no draft.json"),
        ("generate Hi --best-of 2 --readout folder", "folder is not a read-out: it has no readout.json"),
        ("generate Hi --best-of 2 --readout x --temperature 0", "--best-of 2 draws samples, so the temperature must"),
        ("chat --form sum", "form must be one of ratio, product, got 'sum'"),
        ("chat --alpha inf", "alpha must be a finite number, got inf"),
        ("chat --draft folder", "folder is not a draft model: it has no draft.json"),
        (f"rewards {_PAIRS} -o file", "file is a file; give a folder for the output"),
        (f"rewards {_PAIRS} -o file/rewards", "file is a file; give another output"),
        (f"rewards {_PAIRS} -o x --tau 0", "tau must be positive, got 0.0"),
        ("train --rewards {rewards} -o file", "file is a file; give a folder for the output"),
        ("train --rewards {rewards} -o {rewards}", "holds the token rewards; give the doctor a folder of its own"),
        ("train --rewards {rewards} -o x --dtype int8", "error: Unknown dtype 'int8'"),
        ("demo -o file", "file is a file; give a folder for the output"),
        ("train --rewards {rewards} -o x --eta 0", "eta must be positive and finite, got 0.0"),
        ("train --rewards {rewards} -o x --lr-scheduler-type zigzag", "zigzag is not a valid SchedulerType"),
        ("train --rewards {rewards} -o x --lr-scheduler-type warmup_stable_decay", "cannot be used with"),
        ("train --rewards {rewards} -o x --lr-scheduler-type greedy", "and rounds do not look at them while they"),
        (
            "train --rewards {rewards} -o x --lr-scheduler-type reduce_lr_on_plateau --rounds 0 --eval-fraction 0",
            "goes by the loss on held-out pairs, and there are none",
        ),
        ("train --rewards {rewards} -o x --eta 0.1", "eta 0.1 is a setting of the balance on pairs"),
        ("train --rewards {rewards} -o x --no-lora", "rounds need a LoRA doctor"),
        ("train --rewards {rewards} -o x --eval-fraction 0.9", "4 pairs leave none to train on"),
        ("train --rewards {rewards} -o x --eval-fraction 0.3", "rounds need at least 4 pairs to fit a judge to, got 3"),
        ("train -o x", "there is nothing to learn from: give --pairs with preference pairs, or --rewards"),
        ("train --pairs pairs.jsonl --rewards {rewards} -o x", "give --pairs or --rewards, not both"),
        ("train --rewards {rewards} -o x --patient me/mine", "--patient says how --pairs are read"),
        ("train --rewards {rewards} -o x --on-bad skip", "--on-bad says how --pairs are read"),
        ("train --rewards {rewards} -o x --too-long skip", "--too-long says how --pairs are read"),
        ("train --pairs none.jsonl -o x", "none.jsonl: no such file"),
        ("train --pairs pairs.jsonl -o x --faces helpful", "nothing in this training learns of them"),
        ("train --pairs pairs.jsonl -o x --rounds 0", "so they have no token rewards, of which objective subtb learns"),
        ("train --pairs pairs.jsonl -o x --faces loud", "no faces for the dimension 'loud'"),
        ("train --pairs pairs.jsonl -o x --eval-fraction 0.9", "4 pairs leave none to train on"),
        ("train --pairs pairs.jsonl -o x --eval-fraction 0.3", "rounds need at least 4 pairs to fit a judge to, got 3"),
        ("train --pairs pairs.jsonl -o x --lr-scheduler-type greedy", "and rounds do not look at them while they"),
        (
            "train --pairs pairs.jsonl -o x --faces helpful --rounds 0 --eval-fraction 0 --lr-scheduler-type greedy",
            "goes by the loss on held-out pairs, and there are none",
        ),
        ("train --pairs pairs.jsonl -o x --no-lora", "rounds need a LoRA doctor"),
        ("pairs -o x.csv", "x.csv: pairs are written as .jsonl or .jsonl.gz"),
        ("pairs -o file/x.jsonl", "file is a file; give another output"),
        ("pairs -o x.jsonl --temperature 0", "temperature 0 gives every prompt the same answer"),
        ("pairs -o x.jsonl --scorer os:getcwd", "scorer 'os:getcwd' failed on 1 texts (TypeError: "),
        ("pairs -o x.jsonl --top-p 0", "top_p must be in (0, 1], got 0.0"),
        ("pairs -o x.jsonl --batch-size 0", "batch_size must be at least 1, got 0"),
        ("shrink -o file/small", "file is a file; give another output"),
        ("shrink -o folder", "folder holds something else than a shrunk model"),
        ("shrink -o x --prompts p.txt", "2 prompts leave none to learn from with held_out 32"),
        ("draft -o folder", "folder holds something else than a draft model"),
        ("draft -o x --prompts p.txt", "2 prompts leave none to learn from with held_out 32"),
        ("readout --pairs pairs.jsonl -o folder", "folder holds something else than a read-out"),
        ("readout --pairs pairs.jsonl -o x", "a read-out with 5 folds needs at least 2 folds and 2 pairs in each"),
        ("inspect {rewards} -o folder", "folder is a folder; give a file for the output"),
        ("bench table -o file", "file is a file; give a folder for the output"),
        ("bench table --pairs-from none.jsonl --faces polite --judge vader", "none.jsonl: no such file"),
        ("bench table --pairs-from pairs.jsonl --faces loud --judge vader", "no faces for the dimension 'loud'"),
        ("bench judge --judge vader --pairs pairs.jsonl -o file", "file is a file; give a folder for the output"),
    ],
)
def test_told_before_a_model_is_loaded(
    cli: Cli, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "p.txt").write_text("Hello\nYou\n")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    shutil.copytree(finished / "doctor", tmp_path / "cut")
    (tmp_path / "cut" / "value_head.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    ended = cli(*command.format(doctor=finished / "doctor", rewards=finished / "rewards").split())
    assert (ended.status, message in ended.err) == (2, True), ended.err
    assert "loading" not in ended.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_record_that_is_broken(cli: Cli, good: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Hello\n")
    command = ("generate", "--prompts", tmp_path / "p.txt", "-o", tmp_path / "a.jsonl", "--patient", tiny_folder,
               "--max-new-tokens", 1, *CPU)  # fmt: skip
    good(*command)
    (tmp_path / "a.jsonl.recipe.json").write_text("{")
    assert "a.jsonl.recipe.json is broken (JSONDecodeError" in refused(cli, *command)
    good(*command, "--overwrite")


def test_finished_work_is_not_replaced_unasked(cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    assert "is there already; give another -o, or --overwrite" in refused(cli, "pairs", "-o", output)
    assert output.read_text() == "precious"


def test_debug_shows_where_it_came_from(cli: Cli, tmp_path: Path) -> None:
    ended = cli("inspect", tmp_path, "--debug")
    assert ended.status == 2
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("llmdoctor: error: ")


def test_a_bug_keeps_its_traceback(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(RewardStore, "open", broken)
    ended = cli("inspect", tmp_path)
    assert ended.status == 1
    assert "ZeroDivisionError: ours" in ended.err


def test_a_full_disk_keeps_finished_shards(
    cli: Cli, good: Cli, tiny_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second of two shards; when there is room the first is not made again."""
    command = rewards_of(pairs_file, tiny_folder, tmp_path / "out", "--shard-size", 2)
    write = pq.write_table

    def write_one(table: Any, where: Any) -> None:
        if (tmp_path / "out" / "logps" / "00000.parquet").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, where)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", write_one)
        line = refused(cli, *command)
    assert line == (
        f"llmdoctor: error: the disk is full. Scored pairs are kept in {tmp_path / 'out'}; the same command goes on "
        "from there. Free some space and run the same command again"
    )
    first = tmp_path / "out" / "logps" / "00000.parquet"
    made = first.stat().st_mtime_ns
    good(*command)
    assert first.stat().st_mtime_ns == made
    assert len(RewardStore.open(tmp_path / "out")) == 4


def test_a_full_disk_keeps_finished_answers(
    cli: Cli, good: Cli, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{number}?"} for number in range(4)])
    command = ("generate", "--prompts", prompts, "-o", tmp_path / "a.jsonl", "--patient", tiny_folder,
               "--max-new-tokens", 3, *CPU)  # fmt: skip

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_text", full)
        assert "the disk is full. Finished answers are kept in" in refused(cli, *command)
    kept = (tmp_path / "a.jsonl.partial").read_text()
    assert len(kept.splitlines()) == 5, "the fingerprint and four rows"
    good(*command)
    assert json.loads(kept.splitlines()[1])["row"] in [
        json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()
    ]


def test_an_output_that_cannot_be_written(cli: Cli, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    page = tmp_path / "file" / "page.html"
    assert "cannot use" in refused(cli, "inspect", finished / "rewards", "--no-agreement", "-o", page)
