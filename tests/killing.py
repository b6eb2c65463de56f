"""Jobs in processes of their own that can be killed with SIGKILL, without paying for the imports every time.

A server imports the heavy modules once and runs nothing else; every job is a fork of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_SERVER = """
import importlib, json, os, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
print("ready", flush=True)
for line in sys.stdin:
    source, arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        try:
            namespace = {}
            exec(compile(source, "job", "exec"), namespace)
            namespace["main"](*arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
_MODULES = ("llmdoctor.rewards.acquire", "llmdoctor.tfpo.train", "llmdoctor.pairs.make", "tiny")


class JobServer:
    """Runs jobs: Python source with a function `main`, and its arguments."""

    def __init__(self, log: Path) -> None:
        # Not as `tests.tiny`: a package of that name may be installed.
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
        self._log = log.open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *_MODULES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._line() == "ready", self._errors()

    def run(self, source: str, *arguments: Any, kill_when: Callable[[], bool] | None = None) -> bool:
        """Run a job to its end, or kill it as soon as `kill_when()`; returns whether it ended by itself."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps([source, [str(argument) for argument in arguments]]) + "\n")
        stdin.flush()
        pid = int(self._line())
        if kill_when is not None:
            # A job that has ended was reaped by the server, so there is nothing to kill.
            with contextlib.suppress(ProcessLookupError):
                while not kill_when():
                    os.kill(pid, 0)
                    time.sleep(0.002)
                os.kill(pid, signal.SIGKILL)
        status = int(self._line())
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, self._errors()
            assert kill_when is not None
            return False
        assert os.WEXITSTATUS(status) == 0, self._errors()
        return True

    def run_through_kills(
        self,
        source: str,
        *arguments: Any,
        progress: Callable[[], int],
        kills: Sequence[int],
        seed: int = 0,
        left: Callable[[], Any] = lambda: None,
    ) -> list[Any]:
        """Run a job again and again, killed a random moment after its `progress()` reaches each of `kills`, to its end.

        Progress triggers the kills, not the clock: on a busy machine a job's pace is anybody's guess. Returns what
        `left()` said after each kill.

        Raises:
            AssertionError: a job ended before it could be killed, so the test would have shown nothing.
        """
        draw = random.Random(seed)
        seen: list[Any] = []
        for reached in kills:

            def due(reached: int = reached) -> bool:
                if progress() < reached:
                    return False
                time.sleep(draw.uniform(0, 0.05))
                return True

            assert not self.run(source, *arguments, kill_when=due), f"ended before it was killed at {reached}"
            seen.append(left())
        assert self.run(source, *arguments)
        return seen

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._log.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _errors(self) -> str:
        self._log.seek(0)
        return self._log.read()


def last_step(checkpoints: Path) -> int:
    """The highest step of which a checkpoint, whole or not, stands in the folder; 0 if none does."""
    return max((int(path.name.rpartition("-")[2]) for path in checkpoints.glob("checkpoint-*[0-9]")), default=0)
