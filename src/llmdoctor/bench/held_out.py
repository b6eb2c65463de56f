"""What guides say of held-out pairs: how early they tell chosen from rejected, and how often they agree with people."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.kit import LABELS, MERGED, READOUT, Kit
from llmdoctor.bench.methods import DOCTOR, DOCTOR_OF_LABELS, DOCTOR_OF_ROUNDS
from llmdoctor.bench.options import BenchOptions, Task
from llmdoctor.bench.record import guides_record, pairs_record
from llmdoctor.data.preferences import PreferencePair, load_preferences
from llmdoctor.errors import UserError
from llmdoctor.evaluation.dynamics import pooled_dynamics
from llmdoctor.evaluation.metrics import cluster_bootstrap_ci

if TYPE_CHECKING:
    from llmdoctor.baselines.implicit import ImplicitReward

GUIDES = {
    DOCTOR: MERGED, DOCTOR_OF_ROUNDS: "tfpo", DOCTOR_OF_LABELS: LABELS, "genarm": "genarm", "dpo": "dpo",
}  # fmt: skip
"""The guides compared, LLMdoctor with the halves that it is merged from, and what `Kit.trained` calls them."""


def guides_of(options: BenchOptions) -> dict[str, str]:
    """`GUIDES`; without rounds LLMdoctor has no halves."""
    parts = (DOCTOR_OF_ROUNDS, DOCTOR_OF_LABELS)
    return {name: kind for name, kind in GUIDES.items() if options.rounds or name not in parts}


class DynamicsRow(TypedDict):
    """One row of `dynamics.json`, see `evaluation.dynamics.Dynamics`."""

    task: str
    method: str
    positions: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    scale: float
    pairs: int
    seeds: int


class HumanRow(TypedDict):
    """One row of `human.json`: percent of held-out pairs whose chosen response the guide, or the read-out, prefers."""

    method: str
    accuracy: float
    low: float
    high: float
    pairs: int
    train_pairs: int
    seeds: int
    difference: float
    difference_low: float
    difference_high: float


def make_dynamics(arena: Arena) -> list[DynamicsRow]:
    """Train what is missing, write `dynamics.json`; returns its rows. Pairs: those no guide was trained on.

    Raises:
        UserError: a guide tells no pair apart.
    """
    rows: list[DynamicsRow] = []
    for task in arena.tasks:
        kit = arena.kits[task.name]
        pairs = _unseen(kit)
        for method, found in _read(arena, kit, guides_of(arena.options), pairs):
            try:
                curve = pooled_dynamics(
                    [([one.chosen for one in rewards], [one.rejected for one in rewards]) for rewards in found]
                )
            except ValueError as error:
                raise UserError(
                    f"{task.name}: {method} has learned nothing ({error}); give more pairs or epochs"
                ) from error
            rows.append(
                {
                    "task": task.name,
                    "method": method,
                    "positions": list(curve.positions),
                    "mean": list(curve.mean),
                    "low": list(curve.low),
                    "high": list(curve.high),
                    "scale": curve.scale,
                    "pairs": curve.pairs,
                    "seeds": curve.trainings,
                }
            )
        kit.forget()
    arena.write("dynamics.json", rows, guides_record(arena.options, arena.tasks, list(arena.seeds)))
    return rows


def make_human(
    arena: Arena, train: str, validation: str, faces: str, validation_count: int | None, names: Sequence[str] = ()
) -> list[HumanRow]:
    """Train guides on human pairs, write `human.json`; returns its rows.

    Args:
        arena: where; its `pairs`, `epochs` and `seeds` are the budget.
        train: source of the training pairs.
        validation: source of the pairs that are judged.
        faces: dimension of the faces that read the training pairs.
        validation_count: at most so many validation pairs.
        names: guides; all if empty. LLMdoctor and the read-out always take part.

    Raises:
        UserError: a guide that is not compared.
    """
    guides = guides_of(arena.options)
    if unknown := sorted(set(names) - set(guides)):
        raise UserError(f"no guide compared here is named {', '.join(unknown)}; there is {', '.join(guides)}")

    task = Task("human", train, faces, "")
    kit = Kit(task, arena.options, arena.output / "models", arena.steps)
    pairs = list(load_preferences(validation, limit=validation_count))
    right: dict[str, list[list[float]]] = {}
    chosen = {method: kind for method, kind in guides.items() if not names or method in {*names, DOCTOR}}
    for method, found in _read(arena, kit, chosen, pairs):
        right[method] = [[] for _ in pairs]
        for rewards in found:
            for place, reward in enumerate(rewards):
                right[method][place].append(_share(*reward.totals))
    # No guide, but what judges LLMdoctor's rounds; the same for every seed.
    right[READOUT] = [[_share(*scores)] for scores in _judged(kit, pairs)]
    rows: list[HumanRow] = []
    for method, values in right.items():
        accuracy = cluster_bootstrap_ci(values)
        gaps = [np.subtract(ours, theirs).tolist() for ours, theirs in zip(right[DOCTOR], values, strict=True)]
        difference = cluster_bootstrap_ci(gaps)
        rows.append(
            {
                "method": method,
                "accuracy": accuracy.mean,
                "low": accuracy.low,
                "high": accuracy.high,
                "pairs": len(pairs),
                "train_pairs": len(kit.training_pairs()),
                "seeds": arena.options.seeds,
                "difference": difference.mean,
                "difference_low": difference.low,
                "difference_high": difference.high,
            }
        )
    sources = {"train": pairs_record(train, kit.pairs()), "validation": pairs_record(validation, pairs)}
    arena.write("human.json", rows, guides_record(arena.options, [task], list(arena.seeds)) | sources)
    return rows


def _read(
    arena: Arena, kit: Kit, guides: Mapping[str, str], pairs: Sequence[PreferencePair]
) -> Iterator[tuple[str, list[list[ImplicitReward]]]]:
    """Each guide with what it says of the pairs, one list a seed; trained where it is not there."""
    from llmdoctor.baselines.implicit import implicit_rewards, reference_logps

    references = None
    for method, kind in guides.items():
        folders = [kit.trained(kind, seed) for seed in arena.seeds]
        if references is None:
            # All guides are trained from one base.
            arena.steps.start(f"{kit.task.name}: their base reads", len(pairs), "pairs")
            references = reference_logps(folders[0], pairs, progress=arena.steps.advance)
            arena.steps.done()
        arena.steps.start(f"{kit.task.name}: {method} reads", len(folders) * len(pairs), "pairs")
        found = [
            implicit_rewards(folder, pairs, references=references, progress=arena.steps.advance) for folder in folders
        ]
        arena.steps.done()
        yield method, found


def _share(chosen: float, rejected: float) -> float:
    return 100.0 if chosen > rejected else 50.0 if chosen == rejected else 0.0


def _judged(kit: Kit, pairs: Sequence[PreferencePair]) -> list[tuple[float, float]]:
    """What the patient's read-out of the training pairs makes of both answers of each pair."""
    readout, prompts = kit.readout(), [pair.prompt for pair in pairs]
    chosen = readout.score(prompts, [pair.chosen for pair in pairs], complete=[p.chosen_complete for p in pairs])
    rejected = readout.score(prompts, [pair.rejected for pair in pairs], complete=[p.rejected_complete for p in pairs])
    return list(zip(chosen, rejected, strict=True))


def _unseen(kit: Kit, most: int = 200) -> list[PreferencePair]:
    """Pairs of the task beyond those that were trained on; the held-out tail of those where there are no more."""
    trained = {(pair.prompt[-1]["content"], pair.chosen, pair.rejected) for pair in kit.pairs()}
    everything: Sequence[PreferencePair] = list(load_preferences(kit.task.pairs))
    rest = [pair for pair in everything if (pair.prompt[-1]["content"], pair.chosen, pair.rejected) not in trained]
    if not rest:
        own = kit.pairs()
        rest = own[-max(1, round(0.1 * len(own))) :]
    return list(itertools.islice(rest, most))
