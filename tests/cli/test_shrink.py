"""`llmdoctor shrink`: what it prints, what it leaves, and a doctor trained on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.harness import CPU, Cli

from llmdoctor.models.doctor import DoctorConfig
from llmdoctor.models.loading import load_model
from llmdoctor.shrink import samples


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path) -> tuple[object, ...]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Question {number}?\n" for number in range(6)))
    return (
        "shrink", "--patient", tiny_folder, "--prompts", prompts, "--layers", 1, "--tokens", 90, "--held-out", 2,
        "--max-new-tokens", 6, "--batch-tokens", 128, "--epochs", 1, *CPU,
    )  # fmt: skip


def test_a_doctor_on_a_shrunk_patient(
    good: Cli, command: tuple[object, ...], finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    small, doctor = tmp_path / "small", tmp_path / "doctor"
    done = good(*command, "-o", small)
    record = json.loads((small / "shrink.json").read_text())
    share = record["weights_read"]["small"] / record["weights_read"]["patient"]
    acceptance, kl = (record["held_out"]["after"][name] for name in ("acceptance", "kl"))
    assert f"1 of 2 layers; a token reads {100 * share:.0f} % of the patient's weights" in done.out
    assert f"accepted with {100 * acceptance:.1f} %, KL {kl:.2f} nats a token" in done.out
    assert f"--patient {tiny_folder} --base {small} -o runs/doctor" in done.out
    assert "drawing answers: 0 of 90 tokens" in done.err
    assert "distilling: 4 steps in" in done.err
    assert "{'" not in done.out, "a dict that the Trainer printed"
    assert "%|" not in done.err, "a bar of tqdm's"
    again = good(*command, "-o", small)
    assert again.out == done.out
    assert "distilling" not in again.err, "a finished run is not begun again"

    good("train", "--rewards", finished / "rewards", "--base", small, "-o", doctor, "--eval-fraction", 0,
         "--rounds", 1, *CPU)  # fmt: skip
    assert DoctorConfig.load(doctor).base == str(small)
    answer = good(
        "generate", "Hello", "--patient", tiny_folder, "--doctor", f"{doctor}=1.0", "--max-new-tokens", 4, *CPU
    )
    assert "tokens, ended by" in answer.err


def test_a_cut_run_says_what_is_kept(
    cli: Cli, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(samples.Sampler, "_states", interrupt)
    ended = cli(*command, "-o", tmp_path / "small")
    assert ended.status == 130
    assert f"kept in {tmp_path / 'small'}.parts; the same command goes on" in ended.err
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", 2), "layers must be at least 1 and fewer than the 2 there are, got 2"),
        (("--layers", 0), "layers must be at least 1, got 0"),
        (("--keep", "0,1"), "keep must be ascending numbers from 0 to 1, not all of them, got '0,1'"),
        (("--held-out", 6), "6 prompts leave none to learn from with held_out 6"),
        (("--seed", 1), "was made from other inputs (seed: stored 0, now 1)"),
        (("--dtype", "bfloat16"), "was made from other inputs (dtype: stored float32, now bfloat16)"),
    ],
)
def test_bad_input(
    cli: Cli, good: Cli, command: tuple[object, ...], tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    small = tmp_path / "small"
    if "stored" in message:
        good(*command, "-o", small)
    ended = cli(*command, *words, "-o", small)
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


def test_the_small_model_is_stored_in_the_patients_dtype(
    good: Cli, command: tuple[object, ...], tmp_path: Path
) -> None:
    good(*command, "--dtype", "bfloat16", "-o", tmp_path / "small")
    small = load_model(str(tmp_path / "small"), device="cpu", dtype="auto")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"
    assert small.model.config.num_hidden_layers == 1
