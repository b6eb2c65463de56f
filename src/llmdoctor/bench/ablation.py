"""The doctor with one part taken away, each trained and measured like the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.chosen import Chosen
from llmdoctor.bench.kit import ABLATIONS, LABELS, MERGED, MERGED_SUBTB
from llmdoctor.bench.methods import (
    CONTENDERS,
    DOCTOR,
    DOCTOR_BALANCED,
    DOCTOR_OF_LABELS,
    DOCTOR_OF_PAIRS,
    DOCTOR_OF_ROUNDS,
    Contender,
    guided,
)
from llmdoctor.bench.options import BenchOptions, Task
from llmdoctor.bench.points import Point
from llmdoctor.bench.table import at_kl
from llmdoctor.errors import UserError

BETAS = (1.0, 2.0)
WHOLE, BALANCED, OF_ROUNDS, OF_LABELS, OF_PAIRS = "whole", "balanced", "no_pairs", "labels", "no_rounds"

VARIANTS: Mapping[str, str] = {
    WHOLE: MERGED,
    BALANCED: MERGED_SUBTB,
    OF_ROUNDS: "tfpo",
    OF_LABELS: LABELS,
    **{kind: kind for kind in ABLATIONS if kind != "tfpo"},
}
"""By the name in rows, what `Kit.trained` calls it: the doctor as it is; with a second doctor that learns token rewards
as well; its two halves (`no_pairs` is trained in rounds, `labels` on the pairs' labels); what is trained without rounds
(`no_rounds`); and the doctors of rounds and of pairs, each with one of its own parts taken away."""

ANSWERS_OF = {
    WHOLE: DOCTOR, BALANCED: DOCTOR_BALANCED, OF_ROUNDS: DOCTOR_OF_ROUNDS, OF_LABELS: DOCTOR_OF_LABELS,
    LABELS: DOCTOR_OF_LABELS, OF_PAIRS: DOCTOR_OF_PAIRS,
}  # fmt: skip
"""The variants whose answers are a contender's of the main comparison."""


class AblationRow(TypedDict):
    """One row of `ablation.json`.

    `of` is what the part was taken from ("" for the whole doctor), and `win_plus_half_tie` percent with its interval
    what that one reaches against the variant, at the KL that the variant spends (`clamped` where it does not reach
    that far): below 50 the part does harm. `by_seed` is the same for each seed.
    """

    task: str
    variant: str
    beta: float
    score: float
    score_low: float
    score_high: float
    kl: float
    distinct_4: float
    perplexity: float
    prompts: int
    seeds: int
    of: str
    win_plus_half_tie: float | None
    ci_low: float | None
    ci_high: float | None
    by_seed: list[float]
    clamped: bool


def variants_of(options: BenchOptions) -> list[str]:
    """Those of `VARIANTS` that differ: without rounds the whole doctor is itself the one of the pairs."""
    return [name for name in VARIANTS if options.rounds or name == WHOLE or name.startswith("pairs_")]


def taken_from(variant: str, options: BenchOptions) -> str:
    """What a part is taken away from to make the variant; "" for the whole doctor."""
    if variant == WHOLE:
        return ""
    if not options.rounds or variant in (BALANCED, OF_ROUNDS, OF_LABELS, OF_PAIRS):
        return WHOLE
    return OF_PAIRS if variant.startswith("pairs_") else OF_ROUNDS


def make_ablation(arena: Arena, names: Sequence[str] = ()) -> list[AblationRow]:
    """Train and decode what is missing, write `ablation.json`; returns its rows.

    Args:
        arena: where.
        names: those of `variants_of` that stand beside the whole doctor; if none is given, all but what is taken from
            the doctor of the rounds: what is trained in rounds takes several times as long.

    Raises:
        UserError: a variant that is not there.
        ShardDone: as `Arena.decode`.
    """
    known = variants_of(arena.options)
    if unknown := sorted(set(names) - set(known)):
        without = "" if arena.options.rounds else " without rounds"
        raise UserError(f"no variant of the doctor{without} is named {', '.join(unknown)}; there is {', '.join(known)}")
    origins = {name: taken_from(name, arena.options) for name in known}
    chosen = {name for name in known if (name in names if names else origins[name] != OF_ROUNDS)}
    settings = tuple({"beta": beta} for beta in BETAS)
    variants = {
        name: Contender(ANSWERS_OF.get(name, name), name, "", settings, guided(VARIANTS[name], "ratio"),
                        trained=(VARIANTS[name],))
        for name in known
        if name in chosen | {WHOLE}
    }  # fmt: skip
    # At all their settings, so that they can be had at any KL.
    wholes = [CONTENDERS[ANSWERS_OF[name]] for name in known if name in {origins[one] for one in chosen}]
    arena.decode([*variants.values(), *wholes])
    rows: list[AblationRow] = []
    for task in arena.tasks:
        arena.announce_scores(task, [*variants.values(), *wholes])
        points = [(name, point) for name, contender in variants.items() for point in arena.points(task, contender)]
        matches = {
            (name, place): (at_kl(arena, task, Chosen([point]), ANSWERS_OF[origin]), point)
            for place, (name, point) in enumerate(points)
            if (origin := origins[name])
        }
        arena.announce(
            task, [(texts, Chosen([point]).texts) for ours, point in matches.values() for texts in ours.versions]
        )
        for place, (name, point) in enumerate(points):
            rows.append(_row(arena, task, name, origins[name], point, matches.get((name, place))))
    arena.write("ablation.json", rows)
    return rows


def _row(
    arena: Arena, task: Task, variant: str, origin: str, point: Point, match: tuple[Chosen, Point] | None
) -> AblationRow:
    figures = point.figures()
    contest = None if match is None else match[0].against(arena, task, Chosen([point]))
    found = contest.matchup() if contest else None
    return {
        "task": task.name,
        "variant": variant,
        "beta": point.setting["beta"],
        "score": figures["score"],
        "score_low": figures["score_low"],
        "score_high": figures["score_high"],
        "kl": figures["kl"],
        "distinct_4": figures["distinct_4"],
        "perplexity": figures["perplexity"],
        "prompts": figures["prompts"],
        "seeds": figures["seeds"],
        "of": origin,
        "win_plus_half_tie": found.win_plus_half_tie if found else None,
        "ci_low": found.ci_low if found else None,
        "ci_high": found.ci_high if found else None,
        "by_seed": contest.by_seed if contest else [],
        "clamped": match is not None and match[0].clamped,
    }
