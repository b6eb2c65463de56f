"""What a run's results were made from and on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmdoctor.bench.options import BenchOptions, Task
from llmdoctor.data.prompts import Prompt
from llmdoctor.files import digest

SCHEMA_VERSION = 1
_PACKAGES = ("llmdoctor", "torch", "transformers", "peft", "trl", "tokenizers", "numpy", "choix", "moocore", "nltk")


def provenance(options: BenchOptions, tasks: Sequence[Task], prompts: Sequence[Prompt], quick: bool) -> dict[str, Any]:
    """Commit, hashes of prompts and faces, settings, versions and machine, ready for JSON."""
    import torch

    from llmdoctor.rewards.faces import face_pairs

    return {
        "schema_version": SCHEMA_VERSION,
        "quick": quick,
        "note": "A smoke run: its figures mean nothing." if quick else "",
        "commit": _commit(),
        "options": asdict(options),
        "tasks": [{**asdict(task), "faces_hash": digest(asdict(face_pairs(task.faces)[0]))} for task in tasks],
        "prompts_hash": digest([[prompt.id, list(prompt.messages)] for prompt in prompts]),
        "prompts": len(prompts),
        "seeds": list(range(options.seeds)),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _commit() -> str | None:
    """The commit of the checkout that this code runs from; None for an installed package."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", str(here.parent)], cwd=here, capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
