"""What is compared, on what, and how large."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llmdoctor.errors import UserError


@dataclass(frozen=True)
class Task:
    """A preference to be learned from pairs, and the judge that says who did better.

    Attributes:
        name: of its folder and rows.
        pairs: source of preference pairs, as `load_preferences` takes it.
        faces: dimension of the faces that read the pairs.
        judge: a scorer's name, `reward:MODEL` or `chat:MODEL@URL`.
    """

    name: str
    pairs: str
    faces: str
    judge: str


CONTROLLED_TASKS = (
    Task("sentiment", "builtin:sentiment", "positive", "vader"),
    Task("readability", "builtin:readability", "readable", "flesch"),
)
"""Tasks whose truth is known: the scorer that chose the pairs (best and worst of eight answers) also judges."""


@dataclass(frozen=True)
class Shard:
    """The part of a comparison's decoding that is one process's; the others do theirs beside it, in the same folder.

    Attributes:
        number: 1 … `of`.
        of: processes.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise UserError(f"a shard is one of 1/{self.of} … {self.of}/{self.of}, got {self.number}/{self.of}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `2/4`: the second of four."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and int(of)):
            raise UserError(f"a shard is a number and how many there are, such as 1/2, got {text!r}")
        return cls(int(number), int(of))

    def has(self, place: int) -> bool:
        """Whether the unit at `place` is this shard's."""
        return place % self.of == self.number - 1


@dataclass(frozen=True)
class BenchOptions:
    """Size of a comparison. Two runs with other values do not share results.

    Attributes:
        patient: the frozen model.
        base: what doctors and the other trained baselines are trained from; the patient itself if empty.
        prompts: source of unseen prompts, as `load_prompts` takes it.
        prompt_count: at most so many of them.
        pairs: at most so many preference pairs of a task.
        seeds: independent repetitions: each trains its own models and draws its own answers.
        max_new_tokens: longest answer.
        epochs: passes over the pairs, the same for all that is trained on them; a doctor of rounds goes by `rounds`.
        rounds: of that half of LLMdoctor's doctors that learns from answers of its own; 0 leaves the one of the pairs.
        rollout_tokens: how far Transfer-Q* looks ahead.
        transfer_q_prompts: at most so many of them for Transfer-Q*, the dearest method by far.
        batch_size: answers decoded together; changes no answer, up to rounding.
    """

    patient: str = "builtin:smollm2"
    base: str = ""
    prompts: str = "builtin:prompts/test"
    prompt_count: int = 320
    pairs: int = 300
    seeds: int = 3
    max_new_tokens: int = 48
    epochs: int = 2
    rounds: int = 4
    rollout_tokens: int = 8
    transfer_q_prompts: int = 320
    batch_size: int = 160

    def __post_init__(self) -> None:
        for name, least in (
            ("prompt_count", 2), ("pairs", 4), ("seeds", 1), ("max_new_tokens", 1), ("epochs", 1), ("rounds", 0),
            ("rollout_tokens", 1), ("transfer_q_prompts", 2), ("batch_size", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def folder(self, task: str) -> str:
        """Where a task's trained models, and the answers made with them, go: see `folder_of`."""
        return folder_of(task, self.base, self.patient)

    def quick(self) -> BenchOptions:
        """A smoke run: small enough for ten minutes on two cores, far too small to mean anything."""
        most = {
            "prompt_count": 16, "pairs": 32, "seeds": 1, "max_new_tokens": 24, "epochs": 1, "rounds": 1,
            "rollout_tokens": 4,
            "transfer_q_prompts": 4, "batch_size": 128,
        }  # fmt: skip
        return replace(self, **{name: min(getattr(self, name), value) for name, value in most.items()})


def folder_of(task: str, base: str, patient: str) -> str:
    """Name of a task's folder: the task's own, with the name of the base behind it where that is not the patient.

    So that one folder of results holds what was trained from several bases.
    """
    return task if base in ("", patient) else f"{task}@{Path(base).resolve().name}"
