"""The end of every benchmark: where it ran, its result in a file if asked for, and one JSON object as the last line."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmdoctor.bench.record import machine
from llmdoctor.files import write_text


def circumstances() -> dict[str, Any]:
    """Commit, versions and machine: what a figure depends on besides what was asked for."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    code = ["git", "status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py"]
    changed = subprocess.run(code, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": head.stdout.strip() + ("+changes" if changed else ""),
        "versions": {name: version(name) for name in ("llmdoctor", "torch", "transformers", "peft")},
        "machine": machine(),
    }


def record(result: dict[str, Any], output: Path | None) -> None:
    """Add the `circumstances` to `result`; write it to `output`; print it without its rows."""
    result = {**result, **circumstances()}
    keep(result, output)
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


def keep(result: dict[str, Any], output: Path | None) -> None:
    """Write what there is so far to `output`, if asked for."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(result, indent=2) + "\n")
