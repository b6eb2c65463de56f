"""Two processes that train together, as a launcher starts them; nobody stops one where the other has failed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

_SECONDS = 240


def in_two_processes(script: str, *arguments: object, **environment: str) -> list[tuple[int, str]]:
    """Run a script in both; the exit status of each, and what it said. One that waits for ever fails the test."""
    tests = Path(__file__).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")]),
        **environment,
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)], env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]
