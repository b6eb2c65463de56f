"""`llmdoctor merge`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.cli.harness import CPU, Cli

from llmdoctor.models.doctor import DoctorConfig


def test_two_doctors_become_one_that_answers(
    good: Cli, cli: Cli, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    doctor, both = finished / "doctor", tmp_path / "both"
    done = good("merge", doctor, f"{doctor}=-0.5", "-o", both, "--dimension", "half")
    assert f"2 doctors are one for half, in {both}" in done.out + done.err
    assert f"llmdoctor generate PROMPT --patient {tiny_folder} --doctor {both}=1" in done.out + done.err
    assert [part["weight"] for part in DoctorConfig.load(both).training["merged"]] == [1, -0.5]
    none = tmp_path / "none"
    good("merge", doctor, f"{doctor}=-1", "-o", none)
    answer = ("generate", "Hello", "--patient", tiny_folder, "--max-new-tokens", 12, *CPU)
    own, halved, plain = (
        good(*answer, *(("--doctor", f"{folder}=1") if folder else ())).out for folder in (doctor, both, None)
    )
    assert good(*answer, "--doctor", f"{none}=1").out == plain
    assert own != plain
    assert halved != own
    again = cli("merge", doctor, doctor, "-o", both)
    assert (again.status, again.out) == (2, "")
    assert f"{both} holds a doctor already; give another folder, or --overwrite" in again.err
    good("merge", doctor, doctor, "-o", both, "--overwrite")
    assert DoctorConfig.load(both).dimension == DoctorConfig.load(doctor).dimension


def test_what_is_no_place_for_it(cli: Cli, finished: Path, tmp_path: Path) -> None:
    doctor = finished / "doctor"
    trained = tmp_path / "trained"
    shutil.copytree(doctor, trained)
    assert "holds a doctor's training" in cli("merge", doctor, doctor, "-o", trained, "--overwrite").err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "holds something else than a doctor" in cli("merge", doctor, doctor, "-o", tmp_path / "other").err
    (tmp_path / "file").write_text("")
    assert "is a file" in cli("merge", doctor, doctor, "-o", tmp_path / "file").err
    assert "at least two doctors" in cli("merge", doctor, "-o", tmp_path / "new").err
    assert "is not a doctor" in cli("merge", doctor, tmp_path / "other", "-o", tmp_path / "new").err
    # In the words of this command, which has no --doctor.
    for part, message in (
        (f"{doctor}=x", "'x' is no number; expected PATH=WEIGHT"),
        (f"{doctor}=nan", "expected PATH=WEIGHT, with a finite number WEIGHT"),
        (f"kind:{doctor}=1", "what is merged goes by no name; expected DOCTOR=WEIGHT"),
    ):
        refused = cli("merge", part, doctor, "-o", tmp_path / "new")
        assert (refused.status, message in refused.err, "--doctor" in refused.err) == (2, True, False), refused.err
    assert not (tmp_path / "new").exists()


def test_of_several_processes_the_first_speaks(
    cli: Cli, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun numbers them; what goes wrong is told by whoever it happens to."""
    doctor = finished / "doctor"
    monkeypatch.setenv("RANK", "1")
    done = cli("merge", doctor, doctor, "-o", tmp_path / "both")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert (tmp_path / "both" / "doctor.json").is_file()
    wrong = cli("merge", doctor, tmp_path, "-o", tmp_path / "more")
    assert (wrong.status, "is not a doctor" in wrong.err) == (2, True)
