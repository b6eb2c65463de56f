"""What a run's results were made from and on: `run.json`, which has one record a result file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

from llmdoctor.bench.options import BenchOptions, Task
from llmdoctor.data.preferences import PreferencePair
from llmdoctor.data.prompts import Prompt
from llmdoctor.errors import UserError
from llmdoctor.files import digest, write_json

SCHEMA_VERSION = 2
RUN = "run.json"
_PACKAGES = ("llmdoctor", "torch", "transformers", "peft", "trl", "tokenizers", "numpy", "choix", "moocore", "nltk")
_LEARNING = ("patient", "base", "pairs", "epochs", "rounds")


def surroundings(quick: bool) -> dict[str, Any]:
    """Commit, versions and machine, ready for JSON; part of every record."""
    return {
        "schema_version": SCHEMA_VERSION,
        "quick": quick,
        "note": "A smoke run: its figures mean nothing." if quick else "",
        "commit": _commit(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What it runs on, ready for JSON: system, processor and its instructions as torch uses them, cores, GPU."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    named = named or platform.processor() or platform.machine()
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": f"{named}, {torch.backends.cpu.get_cpu_capability()}",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def answers_record(options: BenchOptions, tasks: Sequence[Task], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What answers to prompts were made from: settings, tasks, hashes of faces and prompts."""
    return {
        "options": asdict(options),
        "tasks": [_task_record(task) for task in tasks],
        "prompts_hash": digest([[prompt.id, list(prompt.messages)] for prompt in prompts]),
        "prompts": len(prompts),
        "seeds": list(range(options.seeds)),
    }


def guides_record(options: BenchOptions, tasks: Sequence[Task], seeds: Sequence[int]) -> dict[str, Any]:
    """What guides that only read pairs were made from: nobody answers a prompt or judges."""
    own = [{key: value for key, value in _task_record(task).items() if key != "judge"} for task in tasks]
    return {"options": {name: getattr(options, name) for name in _LEARNING}, "tasks": own, "seeds": list(seeds)}


def pairs_record(source: str, pairs: Iterable[PreferencePair]) -> dict[str, Any]:
    """A source of pairs with the number and hash of those taken from it."""
    rows = [[list(pair.prompt), pair.chosen, pair.rejected] for pair in pairs]
    return {"source": source, "pairs": len(rows), "hash": digest(rows)}


def write_result(folder: Path, name: str, value: Any, record: Mapping[str, Any]) -> Path:
    """Write a result file, and its record into `run.json` beside those of the other files.

    Raises:
        UserError: as `read_records`; the result file is written all the same.
    """
    path = folder / name
    write_json(path, value)
    # Two subcommands may end at once in one folder.
    with FileLock(folder / ".run.lock"):
        write_json(folder / RUN, {**read_records(folder), name: dict(record)})
    return path


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What each result file in `folder` was made from, by its name; nothing where there is no `run.json`.

    The first schema had one record that did not say which file it was of, so it says nothing of any.

    Raises:
        UserError: `run.json` is broken or of a later schema.
    """
    path = folder / RUN
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is broken ({error}); delete it and run the bench again") from error
    if isinstance(found, dict) and found.get("schema_version") == 1:
        return {}
    if not isinstance(found, dict) or not all(isinstance(record, dict) for record in found.values()):
        raise UserError(f"{path} must hold one object a result file; delete it and run the bench again")
    for name, record in found.items():
        if (schema := record.get("schema_version")) != SCHEMA_VERSION:
            raise UserError(
                f"{path}: the record of {name} has schema version {schema}; this version reads {SCHEMA_VERSION}: "
                "delete it and run the bench again"
            )
    return found


def _task_record(task: Task) -> dict[str, Any]:
    from llmdoctor.rewards.faces import face_pairs

    return {**asdict(task), "faces_hash": digest(asdict(face_pairs(task.faces)[0]))}


def _commit() -> str | None:
    """The commit of the checkout that this code runs from; None for an installed package."""
    here = Path(__file__).parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie in a folder of somebody's own repository, which does not track it.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = git("rev-parse", "HEAD")
    return head and head + ("+changes" if git("status", "--porcelain", "--", str(here.parent)) else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
