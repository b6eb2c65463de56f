"""How the command line starts and ends; some of it in processes of their own."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tests.cli.harness import Cli

from llmdoctor.cli import main, reference

ENTRY = [sys.executable, "-c", "from llmdoctor.cli.main import main; main()"]


def shell(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ENTRY, *arguments], capture_output=True, text=True, timeout=60, check=False, **options)


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys; from llmdoctor.cli.main import run\n"
        "statuses = [run(['--version']), run(['--help']), run(['train', '--help']), run(['models', '--help'])]\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'peft', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'{statuses} {heavy}' if any(statuses) or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("llmdoctor 0.")


@pytest.mark.parametrize("name", reference.commands())
def test_every_command_helps(good: Cli, name: str) -> None:
    text = good(*name.split(), "--help").out
    assert f"Usage: llmdoctor {name}" in text
    if not name.startswith("models"):
        assert f"Example: llmdoctor {name}" in text


def test_the_help_names_every_command(good: Cli) -> None:
    text = good("--help").out
    for name in ("pairs", "rewards", "inspect", "train", "generate", "chat", "bench", "models", "demo"):
        assert f" {name} " in text


def test_without_a_command_it_helps_and_fails(cli: Cli) -> None:
    ended = cli()
    assert ended.status == 2
    assert "Usage: llmdoctor" in ended.out


def test_statuses_of_a_process(tmp_path: Path) -> None:
    assert shell("--version").returncode == 0
    mistaken = shell("inspect", str(tmp_path), "--no-such")
    assert (mistaken.returncode, mistaken.stdout) == (2, "")
    assert mistaken.stderr == "llmdoctor: error: No such option: --no-such (see: llmdoctor inspect --help)\n"


def test_an_output_of_another_encoding_gets_what_it_can_show() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([*ENTRY, "train", "--help"], capture_output=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode("cp1252")
    assert "Usage: llmdoctor train" in shown
    assert "\\u03bb" in shown  # λ, which that encoding has no place for


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_standard_output() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*ENTRY, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("llmdoctor: error: the disk is full.")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_pipe_is_quiet() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed:
        done = subprocess.run(
            [*ENTRY, "--help"], stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_real_interrupt(tmp_path: Path) -> None:
    """Ctrl-C while the command waits for its prompts, which it does once the other end of the pipe opens."""
    prompts = tmp_path / "prompts.txt"
    os.mkfifo(prompts)
    command = [*ENTRY, "pairs", "--prompts", str(prompts), "-o", str(tmp_path / "pairs.jsonl")]
    # A shell that starts the tests in the background makes them, and all that they start, ignore Ctrl-C.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    with prompts.open("w"):
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("", "llmdoctor: stopped. Nothing had been written yet.\n")
    assert process.returncode == 130


def test_threads_and_verbose_reach_where_they_count(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("torch.set_num_threads", seen.append)
    monkeypatch.setattr(
        "llmdoctor.rewards.store.RewardStore.open", lambda path: warnings.warn(f"odd {path}", stacklevel=1)
    )
    for options in ((), ("--verbose", "--threads", "3")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cli("inspect", tmp_path, *options)
        seen.append([str(warning.message) for warning in caught])
    assert seen == [[], 3, [f"odd {tmp_path}"]]


def test_our_own_warnings_are_lines_and_leave_no_handler(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("llmdoctor.data.preferences")
    monkeypatch.setattr("llmdoctor.rewards.store.RewardStore.open", lambda path: logger.warning("3 rows skipped"))
    assert "llmdoctor: 3 rows skipped\n" in cli("inspect", tmp_path).err
    assert logging.getLogger("llmdoctor").handlers == []


def wrapped(cause: Exception) -> Exception:
    error = RuntimeError("could not save")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (wrapped(OSError(errno.ENOSPC, "full")), True),
        (OSError(errno.EDQUOT, "over the quota"), True),
        (wrapped(OSError(errno.EACCES, "denied")), False),
        (ValueError("28"), False),
    ],
)
def test_a_full_disk_is_recognised_however_it_is_worded(error: Exception, full: bool) -> None:
    assert main._is_disk_full(error) is full
