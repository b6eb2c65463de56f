"""`llmdoctor generate`: what it writes, and that no finished answer is lost."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cli.harness import CPU, Cli, write_jsonl
from tests.tiny import OTHER_CORPUS, byte_level, save_tiny
from torch import Tensor

from llmdoctor.cli import results
from llmdoctor.cli.doctors import DoctorArgument
from llmdoctor.cli.generate import printable, show_stream
from llmdoctor.cli.results import ResultFile
from llmdoctor.decoding.lane import Lane
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.models.draft import DraftModel, save_draft
from llmdoctor.models.loading import load_model

ROWS = [{"id": f"p{number}", "prompt": "Hello" + "!" * number} for number in range(5)]


@pytest.fixture
def command(finished: Path, tiny_folder: Path, tmp_path: Path) -> tuple[object, ...]:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    return ("generate", "--prompts", prompts, "--patient", tiny_folder, "--doctor", f"{finished / 'doctor'}=3",
            "--max-new-tokens", 6, "--batch-size", 2, *CPU)  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_can_be_made_again_alone(good: Cli, command: tuple[object, ...], tmp_path: Path) -> None:
    good(*command, "-o", tmp_path / "all.jsonl")
    rows = read(tmp_path / "all.jsonl")
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3", "p4"]
    assert len({row["seed"] for row in rows}) == 5
    assert not any("unmapped_mass" in row for row in rows), "nothing is translated"
    assert any(row["kl_estimate"] != 0 for row in rows), "the doctor changes nothing"
    write_jsonl(tmp_path / "prompts.jsonl", ROWS[3:4])
    good(*command, "-o", tmp_path / "one.jsonl")
    alone = read(tmp_path / "one.jsonl")[0]
    assert alone["kl_estimate"] == pytest.approx(rows[3]["kl_estimate"], abs=1e-4)
    assert {**alone, "kl_estimate": 0} == {**rows[3], "kl_estimate": 0}


def test_answers_that_end_with_an_error_are_told(
    good: Cli, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest prompt is one that memory cannot hold; the four others are answered."""
    inner = Lane.prefill_states
    widths: list[int] = []

    def measured(self: Lane) -> Tensor:
        widths.append(self._ids.shape[1])
        return inner(self)

    def prefill(self: Lane) -> Tensor:
        if self._ids.shape[1] == max(widths):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self)

    monkeypatch.setattr(Lane, "prefill_states", measured)
    clean = good(*command, "-o", tmp_path / "clean.jsonl")
    assert "end with an error" not in clean.out + clean.err
    monkeypatch.setattr(Lane, "prefill_states", prefill)
    done = good(*command, "-o", tmp_path / "out.jsonl")
    assert "1 of them end with an error: p4 (" in done.out + done.err
    rows, expected = read(tmp_path / "out.jsonl"), read(tmp_path / "clean.jsonl")
    assert (rows[4]["finish_reason"], rows[4]["text"]) == ("error", "")
    assert [row["text"] for row in rows[:4]] == [row["text"] for row in expected[:4]]


def test_answers_are_the_same_with_a_draft(
    good: Cli, command: tuple[object, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    patient = load_model(str(tiny_folder), dtype="float32", device="cpu")
    save_draft(DraftModel.from_layers(patient.model, [1], torch.arange(250)), patient, {}, tmp_path / "draft")
    good(*command, "-o", tmp_path / "plain.jsonl")
    done = good(*command, "--draft", tmp_path / "draft", "-o", tmp_path / "guessed.jsonl")
    assert f"loading the draft model {tmp_path / 'draft'}" in done.err
    for one, other in zip(read(tmp_path / "plain.jsonl"), read(tmp_path / "guessed.jsonl"), strict=True):
        assert one.pop("kl_estimate") == pytest.approx(other.pop("kl_estimate"), abs=1e-3)
        assert one == other
    words = ("--patient", tiny_folder, "--draft", tmp_path / "draft", "--max-new-tokens", 9)
    streamed = good("generate", "Hi", *words, *CPU)
    assert " a pass, ended by " in streamed.err


def test_a_doctor_whose_strength_never_grows_says_nothing(
    good: Cli, cli: Cli, command: tuple[object, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    good(*command, "-o", tmp_path / "guided.jsonl")
    good(*command, "--onset", 10**6, "-o", tmp_path / "mute.jsonl")
    alone = ("generate", "--prompts", tmp_path / "prompts.jsonl", "--patient", tiny_folder, "--max-new-tokens", 6)
    good(*alone, *CPU, "-o", tmp_path / "alone.jsonl")
    guided, mute, patient = (read(tmp_path / f"{name}.jsonl") for name in ("guided", "mute", "alone"))
    assert [row["text"] for row in mute] == [row["text"] for row in patient] != [row["text"] for row in guided]
    assert [row["kl_estimate"] for row in mute] == pytest.approx([0.0] * len(mute), abs=1e-3)
    assert {row["onset"] for row in mute} == {10**6}
    assert (
        "was made from other inputs (onset: stored 1000000, now (absent))"
        in cli(*command, "-o", tmp_path / "mute.jsonl").err
    )


def test_interrupted_and_continued_is_the_same_file(
    good: Cli, cli: Cli, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after two answers, then a kill in the middle of writing a third, then to the end."""
    good(*command, "-o", tmp_path / "whole.jsonl")
    cut, partial = tmp_path / "cut.jsonl", tmp_path / "cut.jsonl.partial"
    add = ResultFile.add

    def add_two(self: ResultFile, number: int, row: dict[str, Any]) -> None:
        if len(self.rows) == 2:
            raise KeyboardInterrupt
        add(self, number, row)

    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "add", add_two)
        stopped = cli(*command, "-o", cut)
    assert stopped.status == 130
    assert stopped.err.splitlines()[-1] == (
        f"llmdoctor: stopped. Finished answers are kept in {partial}; the same command goes on from there."
    )
    assert not cut.exists()
    assert len(partial.read_bytes().splitlines()) == 3, "the fingerprint and two rows"
    with partial.open("a") as handle:
        handle.write('{"number": 4, "row": {"id": "cut he')
    continued = good(*command, "-o", cut)
    assert "answering: 5 prompts" in continued.err
    assert [row["text"] for row in read(cut)] == [row["text"] for row in read(tmp_path / "whole.jsonl")]
    assert not partial.exists()


def test_other_settings_are_refused(
    good: Cli, cli: Cli, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.jsonl"
    good(*command, "-o", output)
    before = output.read_text()
    assert "is finished already" in good(*command, "-o", output).out
    ended = cli(*command, "-o", output, "--temperature", 0)
    assert ended.status == 2
    assert "was made from other inputs (temperature: stored 1.0, now 0.0)" in ended.err
    assert "loading" not in ended.err, "what is no matter of the patient is told before it is loaded"
    assert "--overwrite to replace it" in ended.err
    assert output.read_text() == before
    ended = cli(*command[:-4], "--dtype", "bfloat16", "--device", "cpu", "-o", output)
    assert "was made from other inputs (dtype: stored float32, now bfloat16)" in ended.err
    good(*command, "-o", output, "--temperature", 0, "--overwrite")
    assert output.read_text() != before


def test_of_an_unfinished_run_the_setting_that_differs_is_named(tmp_path: Path) -> None:
    """With the rows of an older version, which have no settings, the fingerprint that differs."""
    target, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
    was, now = (
        {"fingerprint": {"sampling": digest}, "settings": {"sampling": {"seed": seed, "top_k": 0}}}
        for digest, seed in (("one", 0), ("two", 1))
    )
    with ResultFile(target, was) as unfinished:
        unfinished.add(0, {"text": "a"})
    with pytest.raises(FingerprintMismatch, match=r"\(seed: stored 0, now 1\)\. Delete that file"):
        ResultFile(target, now).__enter__()
    first, *rest = partial.read_text().splitlines(keepends=True)
    partial.write_text(json.dumps(json.loads(first)["fingerprint"]) + "\n" + "".join(rest))
    with pytest.raises(FingerprintMismatch, match=r"\(sampling: stored one, now two\)\. Delete that file"):
        ResultFile(target, now).__enter__()
    with ResultFile(target, was) as again:
        assert again.rows == {0: {"text": "a"}}
    ResultFile(target, {"fingerprint": {}}).check()
    with pytest.raises(FingerprintMismatch, match=r"\(sampling: stored one, now two\)\. Delete that file"):
        ResultFile(target, now).check()


def test_an_unfinished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "a.jsonl"
    with ResultFile(target, {"fingerprint": {"patient": "one"}}) as unfinished:
        unfinished.add(1, {"text": "b"})
    with pytest.raises(FingerprintMismatch, match=r"patient: stored one, now two\). Delete that file"):
        ResultFile(target, {"fingerprint": {"patient": "two"}}).__enter__()
    with ResultFile(target, {"fingerprint": {"patient": "one"}}) as again:
        assert again.rows == {1: {"text": "b"}}
        again.add(0, {"text": "a"})
        again.finish(2)
    assert target.read_text() == '{"text": "a"}\n{"text": "b"}\n'
    assert json.loads((tmp_path / "a.jsonl.recipe.json").read_text())["fingerprint"] == {"patient": "one"}


def test_a_file_made_by_something_else_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "a.jsonl"
    target.write_text("precious")
    with pytest.raises(UserError, match="is there already, made by something else"):
        ResultFile(target, {"fingerprint": {}})


@given(cut=st.integers(min_value=0, max_value=200))
def test_a_partial_file_cut_anywhere_gives_its_whole_rows(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    target = tmp_path_factory.mktemp("cut") / "a.jsonl"
    recipe = {"fingerprint": {"patient": "one"}}
    with ResultFile(target, recipe) as first:
        for number in range(3):
            first.add(number, {"text": "é" * number})
    partial = target.with_name("a.jsonl.partial")
    data = partial.read_bytes()[:cut]
    partial.write_bytes(data)
    with ResultFile(target, recipe) as second:
        assert len(second.rows) == max(0, data.count(b"\n") - 1)
        assert all(row == {"text": "é" * number} for number, row in second.rows.items())
        for number in range(3):
            if number not in second.rows:
                second.add(number, {"text": "é" * number})
        second.finish(3)
    assert [json.loads(line)["text"] for line in target.read_text().splitlines()] == ["", "é", "éé"]


def test_a_system_prompt_replaces_a_prompts_own(good: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Be loud."}, {"role": "user", "content": "Hi"}]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": own}, {"prompt": "Ho"}])
    good("generate", "--prompts", prompts, "-o", tmp_path / "a.jsonl", "--patient", tiny_folder, "--system", "Be calm.",
         "--max-new-tokens", 1, *CPU)  # fmt: skip
    calm = {"role": "system", "content": "Be calm."}
    assert [row["prompt"] for row in read(tmp_path / "a.jsonl")] == [
        [calm, {"role": "user", "content": "Hi"}],
        [calm, {"role": "user", "content": "Ho"}],
    ]


def test_one_prompt_streams_what_the_file_would_hold(good: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    greedy = ("--patient", tiny_folder, "--temperature", 0, "--max-new-tokens", 12, *CPU)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\n")
    good("generate", "--prompts", prompts, "-o", tmp_path / "a.jsonl", *greedy)
    assert good("generate", "Hello", *greedy).out == printable(read(tmp_path / "a.jsonl")[0]["text"]) + "\n"


@pytest.mark.parametrize("failing", ["write_json", "write_text"])
def test_a_run_that_dies_while_it_finishes_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Over a file made in another way, and with a full disk at either of the two writes: the same command goes on."""
    target = tmp_path / "out.jsonl"
    with ResultFile(target, {"fingerprint": {"patient": "old"}}) as old:
        old.add(0, {"text": "old"})
        old.finish(1)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    recipe = {"fingerprint": {"patient": "new"}}
    with monkeypatch.context() as patch, ResultFile(target, recipe, overwrite=True) as new:
        new.add(0, {"text": "new"})
        patch.setattr(results, failing, full)
        with pytest.raises(OSError, match="No space"):
            new.finish(1)
    with ResultFile(target, recipe) as again:
        assert not again.finished
        assert again.rows == {0: {"text": "new"}}
        again.finish(1)
    assert read(target) == [{"text": "new"}]
    assert ResultFile(target, recipe).finished


def test_text_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[2Jb\nc\td\x07 é") == "a\ufffd[2Jb\nc\td\ufffd é"
    assert printable("a\u202eb\x9b31m") == "a\ufffdb\ufffd31m"
    # A narrow space, a joined emoji, a Persian word with a joiner, a wide space.
    assert printable(text := "10\u202f% 👩\u200d💻 می\u200cخواهم\u3000。") == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/doctor", DoctorArgument("runs/doctor")),
        ("runs/doctor=0.5", DoctorArgument("runs/doctor", 0.5)),
        ("runs/doctor=-1e-1", DoctorArgument("runs/doctor", -0.1)),
        ("kind:runs/doctor=2", DoctorArgument("runs/doctor", 2.0, "kind")),
        ("kind:owner/name", DoctorArgument("owner/name", 1.0, "kind")),
        ("a:runs/doctor=1.0", DoctorArgument("runs/doctor", 1.0, "a")),
        ("a:/runs/doctor", DoctorArgument("/runs/doctor", 1.0, "a")),
        ("b", DoctorArgument("b")),
        ("b=0.5", DoctorArgument("b", 0.5)),
        ("one,two=2", DoctorArgument("one,two", 2.0)),
        ("C:\\doctor=2", DoctorArgument("C:\\doctor", 2.0)),
        ("a=b=2", DoctorArgument("a=b", 2.0)),
    ],
)
def test_how_a_doctor_is_named(text: str, expected: DoctorArgument) -> None:
    assert DoctorArgument.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--doctor : expected PATH=BETA"),
        ("=1", "--doctor =1: expected PATH=BETA"),
        ("b=", "--doctor b=: '' is no number; expected PATH=BETA"),
        ("b=1,0", "'1,0' is no number"),
        ("b=1.0,c=0.5", "these are several doctors; give each by itself, as --doctor PATH=BETA"),
        ("glad & calm:b=1", "a name has letters, digits, '.', '_' and '-' and begins with a letter, got 'glad & calm'"),
    ],
)
def test_what_is_no_doctor(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b").mkdir()
    with pytest.raises(UserError, match=re.escape(message)):
        DoctorArgument.parse(text)


def test_a_path_that_exists_is_taken_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("eta=0.5", "kind:doctor", "b", "a=1,b=2"):
        Path(name).mkdir()
        assert DoctorArgument.parse(name) == DoctorArgument(name)
    assert DoctorArgument.parse("kind:doctor=2") == DoctorArgument("kind:doctor", 2.0)


def test_a_doctor_of_another_vocabulary(
    good: Cli, finished: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on the patient's rewards, it guides the patient; what translating it leaves out is said."""
    other, doctor = save_tiny(tmp_path / "other", byte_level(320, OTHER_CORPUS), seed=3), tmp_path / "doctor"
    trained = good("train", "--rewards", finished / "rewards", "--base", other, "-o", doctor, "--eval-fraction",
                   0, "--rounds", 2, "--pairs-first", "--num-train-epochs", 2, *CPU)  # fmt: skip
    assert "%|" not in trained.err, "a bar of another library's"
    assert "reading the pairs for the read-out" in trained.err
    assert "round 2 of 2: answers" in trained.err
    prompts = write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    asked = ("--patient", tiny_folder, "--doctor", f"{doctor}=3", "--max-new-tokens", 6, *CPU)
    made = good("generate", "--prompts", prompts, "-o", tmp_path / "answers.jsonl", *asked)
    assert re.search(r"a doctor's vocabulary \(\d+ tokens\) is not the patient's \(300\): its tokens lead to", made.err)
    said = re.search(
        r"translated: ([\d.e-]+) % of the doctors' probability was on tokens that stand for none", made.err
    )
    rows = read(tmp_path / "answers.jsonl")
    assert said is not None
    mean = sum(row["tokens"] * row["unmapped_mass"] for row in rows) / sum(row["tokens"] for row in rows)
    assert said[1] == f"{100 * mean:.2g}"
    assert len({row["unmapped_mass"] for row in rows}) > 1
    assert any(row["kl_estimate"] != 0 for row in rows), "the doctor changes nothing"
    assert "translated: " in good("generate", "Hello", *asked).err
    alone = good("generate", "Hello", "--patient", tiny_folder, "--doctor", f"{finished / 'doctor'}=1", *CPU)
    assert "translated" not in alone.err
    assert "is not the patient's" not in alone.err
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/compare\nHello\n/beta 0\nHello\n"))
    chat = good("chat", *asked).err
    assert len(re.findall("translated: .* % of the doctors' probability .* none of the patient's$", chat, re.M)) == 2


@pytest.mark.parametrize(("said", "shown"), [(["half a"], "half a\n"), ([], "")])
def test_a_stream_that_breaks_off_ends_its_line(
    capsys: pytest.CaptureFixture[str], said: list[str], shown: str
) -> None:
    def pieces() -> Iterator[str]:
        yield from said
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show_stream(pieces())
    assert capsys.readouterr().out == shown
