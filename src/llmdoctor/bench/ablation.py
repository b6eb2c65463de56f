"""The doctor with one part taken away, each trained and measured like the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.kit import ABLATIONS, MERGED
from llmdoctor.bench.methods import DOCTOR, DOCTOR_OF_PAIRS, DOCTOR_OF_ROUNDS, Contender, guided
from llmdoctor.bench.options import BenchOptions
from llmdoctor.errors import UserError

BETAS = (1.0, 2.0)
WHOLE = "whole"

VARIANTS: Mapping[str, str] = {
    WHOLE: MERGED,
    "no_pairs": "tfpo",
    **{kind: kind for kind in ABLATIONS if kind != "tfpo"},
}
"""By the name in rows, what `Kit.trained` calls it: the doctor as it is, its two halves (`no_pairs` is trained in
rounds, `no_rounds` on the pairs), and each half with one of its own parts taken away."""


class AblationRow(TypedDict):
    """One row of `ablation.json`."""

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


def variants_of(options: BenchOptions) -> list[str]:
    """Those of `VARIANTS` that differ: without rounds the whole doctor is itself the one of the pairs."""
    return [name for name in VARIANTS if options.rounds or name == WHOLE or name.startswith("pairs_")]


def make_ablation(arena: Arena, names: Sequence[str] = ()) -> list[AblationRow]:
    """Train and decode what is missing, write `ablation.json`; returns its rows.

    Args:
        arena: where.
        names: those of `variants_of` that stand beside the whole doctor; all if none is given.

    Raises:
        UserError: a variant that is not there.
        ShardDone: as `Arena.decode`.
    """
    known = variants_of(arena.options)
    if unknown := sorted(set(names) - set(known)):
        without = "" if arena.options.rounds else " without rounds"
        raise UserError(f"no variant of the doctor{without} is named {', '.join(unknown)}; there is {', '.join(known)}")
    settings = tuple({"beta": beta} for beta in BETAS)
    # Their answers are the main comparison's.
    there = {WHOLE: DOCTOR, "no_pairs": DOCTOR_OF_ROUNDS, "no_rounds": DOCTOR_OF_PAIRS}
    variants = {
        name: Contender(there.get(name, name), name, "", settings, guided(kind, "ratio"), trained=(kind,))
        for name, kind in VARIANTS.items()
        if name in known and (not names or name in (WHOLE, *names))
    }
    arena.decode(list(variants.values()))
    rows: list[AblationRow] = []
    for task in arena.tasks:
        arena.announce_scores(task, list(variants.values()))
        for name, contender in variants.items():
            for point in arena.points(task, contender):
                figures = point.figures()
                rows.append(
                    {
                        "task": task.name,
                        "variant": name,
                        "beta": point.setting["beta"],
                        "score": figures["score"],
                        "score_low": figures["score_low"],
                        "score_high": figures["score_high"],
                        "kl": figures["kl"],
                        "distinct_4": figures["distinct_4"],
                        "perplexity": figures["perplexity"],
                        "prompts": figures["prompts"],
                        "seeds": figures["seeds"],
                    }
                )
    arena.write("ablation.json", rows)
    return rows
