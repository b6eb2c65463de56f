"""What the tests of the arena share: a comparison on the tiny model, and steps that remember what they were told."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import some_pairs
from transformers import TrainerCallback

from llmdoctor.bench import kit
from llmdoctor.bench.arena import Arena
from llmdoctor.bench.options import BenchOptions, Shard, Task
from llmdoctor.data.preferences import write_pairs
from llmdoctor.models import loading

PROMPTS = 6
SEEDS = 2


class Told:
    """Steps that remember their descriptions."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.units: list[int] = []
        self.said: list[str] = []

    def start(self, description: str, total: int | None = None, unit: str = "") -> None:
        self.started.append(description)
        self.units.append(0)

    def advance(self, units: int = 1) -> None:
        self.units[-1] += units

    def done(self) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)

    def training_callback(self, description: str) -> TrainerCallback:
        told = self

        class Begun(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                told.start(description)

        return Begun()


def sources(folder: Path) -> Path:
    """Pairs of two tasks and prompts, as files."""
    write_pairs(folder / "a.jsonl", some_pairs(12))
    write_pairs(folder / "b.jsonl", some_pairs(12, seed=1))
    (folder / "prompts.txt").write_text("".join(f"say {number} the cat\n" for number in range(PROMPTS)))
    return folder


def options_of(tiny_folder: Path, folder: Path, **changes: Any) -> BenchOptions:
    own = {"prompts": str(folder / "prompts.txt"), "prompt_count": PROMPTS, "pairs": 12, "seeds": SEEDS}
    small = {"max_new_tokens": 6, "epochs": 1, "rounds": 1, "rollout_tokens": 2, "transfer_q_prompts": 4}
    return BenchOptions(patient=str(tiny_folder), **{**own, **small, "batch_size": 64, **changes})


def tasks_of(folder: Path, judge: str = "vader") -> list[Task]:
    return [
        Task("a", str(folder / "a.jsonl"), "positive", judge),
        Task("b", str(folder / "b.jsonl"), "readable", "brevity"),
    ]


def arena_of(
    tiny_folder: Path,
    folder: Path,
    output: Path,
    *,
    tasks: Sequence[Task] = (),
    shard: Shard | None = None,
    so_far: bool = False,
    **changes: Any,
) -> tuple[Arena, Told]:
    """An arena on the tiny model with the first task or those given."""
    told = Told()
    options = options_of(tiny_folder, folder, **changes)
    return Arena(output, options, told, tasks or tasks_of(folder)[:1], shard=shard, so_far=so_far), told


@contextmanager
def float32() -> Iterator[None]:
    """Models load in float32 whatever the processor: in bfloat16 an answer may change with its batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "cpu_multiplies_bfloat16", lambda: False)
        kit._patient.cache_clear()
        yield


def cell_files(output: Path) -> dict[str, tuple[int, bytes]]:
    """Every finished cell: when it was written, and its bytes."""
    found = sorted((output / "raw").rglob("*.jsonl.gz"))
    return {str(path.relative_to(output)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def answers_of(content: bytes) -> list[dict[str, Any]]:
    """The answers of a cell's file."""
    return [json.loads(line) for line in gzip.decompress(content).split(b"\n")[1:-1]]
