"""`llmdoctor draft`: what it prints and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.harness import CPU, Cli

from llmdoctor.models.draft import load_draft
from llmdoctor.models.loading import load_model
from llmdoctor.shrink import samples


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path) -> tuple[object, ...]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Question {number}?\n" for number in range(6)))
    return (
        "draft", "--patient", tiny_folder, "--prompts", prompts, "--vocabulary", 100, "--tokens", 90, "--held-out", 2,
        "--max-new-tokens", 6, "--batch-tokens", 128, "--epochs", 1, *CPU,
    )  # fmt: skip


def test_a_draft_is_made_once(good: Cli, command: tuple[object, ...], tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    done = good(*command, "-o", folder)
    record = json.loads((folder / "draft.json").read_text())
    share = record["weights_read"]["draft"] / record["weights_read"]["patient"]
    figures = record["held_out"]["after"]
    assert f"layers: 1; a guess reads {100 * share:.0f} % of the patient's weights" in done.out
    assert (
        f"a guess is accepted with {100 * figures['acceptance']:.1f} %, the one after it with "
        f"{100 * figures['second_acceptance']:.1f} %"
    ) in done.out
    assert f"the draft model is in {folder}" in done.out
    assert f"next: llmdoctor generate 'How was your day?' --patient {tiny_folder} --draft {folder}" in done.out
    assert "drawing answers: 0 of 90 tokens" in done.err
    assert "distilling: 4 steps in" in done.err
    assert "{'" not in done.out, "a dict that the Trainer printed"
    assert "%|" not in done.err, "a bar of tqdm's"
    again = good(*command, "-o", folder)
    assert again.out == done.out
    assert "distilling" not in again.err, "a finished run is not begun again"
    load_draft(folder, load_model(str(tiny_folder), dtype="float32", device="cpu"))


def test_a_cut_run_says_what_is_kept(
    cli: Cli, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(samples.Sampler, "_states", interrupt)
    ended = cli(*command, "-o", tmp_path / "draft")
    assert ended.status == 130
    assert f"kept in {tmp_path / 'draft'}.parts; the same command goes on" in ended.err
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", 3), "layers must be at most the 2 there are, got 3"),
        (("--unroll", 0), "unroll must be at least 1, got 0"),
        (("--vocabulary", 7), "vocabulary must be at least 8, got 7"),
        (("--held-out", 6), "6 prompts leave none to learn from with held_out 6"),
    ],
)
def test_bad_input(
    cli: Cli, command: tuple[object, ...], tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    ended = cli(*command, *words, "-o", tmp_path / "draft")
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
