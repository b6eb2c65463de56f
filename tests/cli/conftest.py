"""The command line in this process, and what it makes of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.harness import CPU, PAIRS, Cli, Ended, write_jsonl

from llmdoctor.cli.main import run


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line here; arguments of any kind are turned into text."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        return Ended(status, *capsys.readouterr())

    return call


@pytest.fixture
def good(cli: Cli) -> Cli:
    """As `cli`, for commands that must succeed."""

    def call(*arguments: object) -> Ended:
        ended = cli(*arguments)
        assert ended.status == 0, ended.err
        return ended

    return call


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rewards` and a `doctor`, made by the command line; read-only for tests."""
    folder = tmp_path_factory.mktemp("finished")
    pairs = write_jsonl(folder / "pairs.jsonl", PAIRS)
    made = run(
        ["rewards", "--pairs", str(pairs), "--faces", "positive", "--patient", str(tiny_folder), "-o",
         str(folder / "rewards"), *CPU]
    )  # fmt: skip
    assert made == 0
    trained = run(
        ["train", "--rewards", str(folder / "rewards"), "-o", str(folder / "doctor"), "--eval-fraction", "0.25",
         "--rounds", "0", "--num-train-epochs", "4", "--learning-rate", "0.05", *CPU]
    )  # fmt: skip
    assert trained == 0
    return folder
