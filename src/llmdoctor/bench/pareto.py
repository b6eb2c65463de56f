"""Two objectives at once: two doctors merged or mixed while decoding, against Reward Soups and MOD."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.kit import MERGED, Kit
from llmdoctor.bench.methods import CONTENDERS, PATIENT, Built, Contender, Setting
from llmdoctor.bench.options import Task
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide, load_guide
from llmdoctor.errors import UserError
from llmdoctor.evaluation.metrics import distinct_n
from llmdoctor.evaluation.pareto import hypervolume, pareto_front
from llmdoctor.files import digest

RESAMPLES = 500
FIRST_SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)
"""Weight of the first task; the second has the rest. Quarters alone are steps so coarse that where they happen to fall
decides which hypervolume is the larger."""

STRENGTHS: Mapping[str, Sequence[float]] = {
    "llmdoctor_merged": (0.62, 1.3), "llmdoctor": (0.6, 1.25), "reward_soup": (0.5, 1.0), "mod": (0.5, 1.0),
}  # fmt: skip
"""What both weights are multiplied by. At 1 a soup or MOD of DPO policies is what their papers propose, at a half it
goes half the way. LLMdoctor's were chosen to spend no more nats than soups do, on average over the shares
(`benchmarks/results/pareto.json`)."""


class ParetoPoint(TypedDict):
    """One method at one mixture."""

    method: str
    setting: dict[str, float]
    scores: list[float]
    kl: float
    distinct_4: float
    on_front: bool


class Volume(TypedDict):
    """A hypervolume with its bootstrap interval over prompts, and the most KL, in nats, that a point of it spends.

    `lead` is by how much the merged doctors' is larger, with its interval: the same prompts are drawn for both.
    """

    value: float
    low: float
    high: float
    kl: float
    lead: float
    lead_low: float
    lead_high: float


class StrengthVolume(Volume):
    """That of a method's points of one strength; led by those of the merged doctors' strength of the same place."""

    method: str
    strength: float


class Pareto(TypedDict):
    """`pareto.json`. The reference point is the patient's own mean scores: only what beats it on both counts."""

    tasks: list[str]
    reference: list[float]
    points: list[ParetoPoint]
    hypervolume: dict[str, Volume]
    by_strength: list[StrengthVolume]
    prompts: int
    seeds: int


@dataclass(frozen=True)
class _Scored:
    """A point with its scores [prompts, seeds, 2]."""

    method: str
    setting: Setting
    scores: np.ndarray[Any, np.dtype[np.float64]]
    kl: float
    distinct_4: float


class _Both(Kit):
    """Of two tasks at once, whose models the kits of each make."""

    def __init__(self, pair: Task, arena: Arena, kits: Sequence[Kit]) -> None:
        super().__init__(pair, arena.options, arena.output, arena.steps)
        self._kits = kits

    @property
    def lesson(self) -> str:
        """Fingerprint of what both learn."""
        return digest([kit.lesson for kit in self._kits])


def make_pareto(arena: Arena, strengths: Mapping[str, Sequence[float]] = STRENGTHS) -> Pareto:
    """Decode what is missing, write `pareto.json`; returns its content.

    Args:
        arena: where.
        strengths: of each method.

    Raises:
        UserError: the comparison has not exactly two tasks, or one judge for both.
        ShardDone: as `Arena.decode`.
    """
    if len(arena.tasks) != 2:
        raise UserError(f"a Pareto front needs two tasks, this comparison has {len(arena.tasks)}")
    if (judge := arena.tasks[0].judge) == arena.tasks[1].judge:
        raise UserError(
            f"{judge} would judge both tasks, and it does not know which is which: a front needs a judge for each"
        )
    for task in arena.tasks:
        # As in `Arena.decode`.
        arena.judge(task)
    contenders = _contenders(arena, strengths)
    fields = zip(*(astuple(task) for task in arena.tasks), strict=True)
    pair = Task(*("+".join(both) for both in fields))
    arena.kits.setdefault(pair.name, _Both(pair, arena, [arena.kits[task.name] for task in arena.tasks]))
    for seed, _ in arena.units([pair]):
        for contender in contenders:
            for setting in contender.settings:
                arena.cells.get(pair, contender, setting, seed)
        for kit in arena.kits.values():
            kit.forget()
    arena.end_shard()
    points = [(contender, setting) for contender in contenders for setting in contender.settings]
    for objective in arena.tasks:
        arena.announce_scores_of(objective, [_texts(arena, pair, *point) for point in points])
    scored = [_scored(arena, pair, *point) for point in points]
    patient = _scored(arena, arena.tasks[0], CONTENDERS[PATIENT], {})
    reference = patient.scores.mean((0, 1))
    methods = list(dict.fromkeys(entry.method for entry in scored))
    result: Pareto = {
        "tasks": [task.name for task in arena.tasks],
        "reference": reference.tolist(),
        "points": [],
        "hypervolume": {},
        "by_strength": [],
        "prompts": patient.scores.shape[0],
        "seeds": arena.options.seeds,
    }
    for method in methods:
        own = [entry for entry in scored if entry.method == method]
        front = pareto_front([entry.scores.mean((0, 1)).tolist() for entry in own])
        for place, entry in enumerate(own):
            result["points"].append(
                {
                    "method": method,
                    "setting": dict(entry.setting),
                    "scores": entry.scores.mean((0, 1)).tolist(),
                    "kl": entry.kl,
                    "distinct_4": entry.distinct_4,
                    "on_front": place in front,
                }
            )
    # LLMdoctor's doctors merged are the first.
    drawn = {method: [entry for entry in scored if entry.method == method] for method in methods}
    ours = _volumes(drawn[methods[0]], patient)
    for method, own in drawn.items():
        result["hypervolume"][method] = _told(own, _volumes(own, patient), ours)
    for rank in range(min(map(len, strengths.values()))):
        at = {
            method: [e for e in own if e.setting["strength"] == strengths[method][rank]]
            for method, own in drawn.items()
        }
        ours = _volumes(at[methods[0]], patient)
        for method, own in at.items():
            told = _told(own, _volumes(own, patient), ours)
            result["by_strength"].append({"method": method, "strength": strengths[method][rank], **told})
    arena.write("pareto.json", result)
    return result


def _volumes(points: Sequence[_Scored], patient: _Scored) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The hypervolume of some points, first of all prompts, then of each resample of them.

    Prompts are drawn alike for points and patient, and in every call.
    """
    scores = np.stack([point.scores for point in points])
    rng = np.random.default_rng(0)
    count = scores.shape[1]

    def volume(drawn: Any) -> float:
        return hypervolume(scores[:, drawn].mean((1, 2)).tolist(), patient.scores[drawn].mean((0, 1)).tolist())

    return np.array([volume(np.arange(count)), *(volume(rng.integers(count, size=count)) for _ in range(RESAMPLES))])


def _told(points: Sequence[_Scored], volumes: Any, ours: Any) -> Volume:
    leads = ours - volumes
    (low, high), (lead_low, lead_high) = (np.quantile(values[1:], [0.025, 0.975]) for values in (volumes, leads))
    return {
        "value": float(volumes[0]),
        "low": float(low),
        "high": float(high),
        "kl": max(point.kl for point in points),
        "lead": float(leads[0]),
        "lead_low": float(lead_low),
        "lead_high": float(lead_high),
    }


def _scored(arena: Arena, task: Task, contender: Contender, setting: Setting) -> _Scored:
    texts = _texts(arena, task, contender, setting)
    columns = []
    for objective in arena.tasks:
        scores = arena.scores(objective, texts)
        columns.append(np.array([scores[prompt.id] for prompt in arena.prompts]))
    by_seed = [arena.cells.get(task, contender, setting, seed).sample(0) for seed in arena.seeds]
    flat = [answer for answers in by_seed for answer in answers]
    return _Scored(
        contender.name,
        setting,
        np.stack(columns, axis=-1),
        sum(answer.kl for answer in flat) / len(flat),
        sum(distinct_n([answer.text for answer in answers], 4) for answers in by_seed) / len(by_seed),
    )


def _texts(arena: Arena, task: Task, contender: Contender, setting: Setting) -> dict[str, list[str]]:
    """By prompt, one a seed."""
    found: dict[str, list[str]] = {}
    for seed in arena.seeds:
        for answer in arena.cells.get(task, contender, setting, seed).sample(0):
            found.setdefault(answer.prompt, []).append(answer.text)
    return found


def _contenders(arena: Arena, strengths: Mapping[str, Sequence[float]]) -> list[Contender]:
    settings = {
        method: tuple({"share": share, "strength": strength} for strength in own for share in FIRST_SHARES)
        for method, own in strengths.items()
    }
    kits = [arena.kits[task.name] for task in arena.tasks]

    def mixed(kind: str) -> Callable[[Kit, int, Setting], Built]:
        def build(kit: Kit, seed: int, setting: Setting) -> Built:
            patient = kits[0].patient
            guides = []
            for own in kits:
                guides.append(replace(own.guide(kind, seed, "ratio"), name=own.task.name))
            betas = dict(zip((own.task.name for own in kits), _weights(setting), strict=True))
            return _built(patient, guides, betas, arena)

        return build

    def merged_doctors(kit: Kit, seed: int, setting: Setting) -> Built:
        from llmdoctor.models.merging import merge_doctors

        paths = [own.trained(MERGED, seed) for own in kits]
        with tempfile.TemporaryDirectory() as scratch:
            merged = merge_doctors(paths, (setting["share"], 1 - setting["share"]), Path(scratch) / "merged")
            guide = load_guide(merged, kits[0].patient, name="merged")
        return _built(kits[0].patient, [guide], {"merged": setting["strength"]}, arena)

    def soup(kit: Kit, seed: int, setting: Setting) -> Built:
        from llmdoctor.baselines.merging import reward_soup

        paths = [own.trained("dpo", seed) for own in kits]
        shares = [setting["share"], 1 - setting["share"]]
        merged = reward_soup(paths, shares, kits[0].fresh_base())
        reference = load_guide(paths[0], kits[0].patient).reference
        return _built(kits[0].patient, [Guide("soup", merged, reference)], {"soup": setting["strength"]}, arena)

    paper = "arXiv 2601.10416"
    every: Sequence[tuple[str, str, str, Callable[[Kit, int, Setting], Built], str]] = (
        ("llmdoctor_merged", "LLMdoctor, two doctors merged", paper, merged_doctors, MERGED),
        ("llmdoctor", "LLMdoctor, two doctors mixed", paper, mixed(MERGED), MERGED),
        ("reward_soup", "Reward Soup of DPO policies", "arXiv 2306.04488", soup, "dpo"),
        # MOD is Π π_i^w_i, of weights that sum to 1 (Shi et al. 2024): patient · Π (π_i / patient)^w_i is just that.
        ("mod", "MOD of DPO policies", "arXiv 2406.18853", mixed("dpo"), "dpo"),
    )
    return [
        Contender(name, title, source, settings[name], build, trained=(kind,))
        for name, title, source, build, kind in every
    ]


def _weights(setting: Setting) -> tuple[float, float]:
    return setting["share"] * setting["strength"], (1 - setting["share"]) * setting["strength"]


def _built(patient: Any, guides: list[Guide], betas: Mapping[str, float], arena: Arena) -> Built:
    decoder = GuidedDecoder(patient, guides, max_batch_size=arena.options.batch_size)
    return Built(decoder, {"betas": dict(betas)}, {})
