"""The doctor with one part taken away, each trained and measured like the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.kit import ABLATIONS
from llmdoctor.bench.methods import DOCTOR, DOCTOR_OF_PAIRS, Contender, guided
from llmdoctor.bench.options import BenchOptions
from llmdoctor.errors import UserError

BETAS = (1.0, 2.0)
WHOLE = "tfpo"
"""The doctor with all its parts, as `ABLATIONS` names it."""


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


def kinds_of(options: BenchOptions) -> list[str]:
    """The variants of `ABLATIONS` that differ: without rounds the whole doctor is itself the one of the pairs."""
    return [kind for kind in ABLATIONS if options.rounds or kind == WHOLE or kind.startswith("pairs_")]


def make_ablation(arena: Arena, kinds: Sequence[str] = ()) -> list[AblationRow]:
    """Train and decode what is missing, write `ablation.json`; returns its rows.

    Args:
        arena: where.
        kinds: those of `kinds_of` that stand beside the whole doctor; all if none is given.

    Raises:
        UserError: a kind that is not there.
        ShardDone: as `Arena.decode`.
    """
    known = kinds_of(arena.options)
    if unknown := sorted(set(kinds) - set(known)):
        without = "" if arena.options.rounds else " without rounds"
        raise UserError(f"no variant of the doctor{without} is named {', '.join(unknown)}; there is {', '.join(known)}")
    settings = tuple({"beta": beta} for beta in BETAS)
    # Their answers are the main comparison's.
    there = {WHOLE: DOCTOR, "no_rounds": DOCTOR_OF_PAIRS}
    variants = {
        kind: Contender(there.get(kind, kind), kind, "", settings, guided(kind, "ratio"), trained=(kind,))
        for kind in known
        if not kinds or kind in (WHOLE, *kinds)
    }
    arena.decode(list(variants.values()))
    rows: list[AblationRow] = []
    for task in arena.tasks:
        arena.announce_scores(task, list(variants.values()))
        for kind, contender in variants.items():
            for point in arena.points(task, contender):
                figures = point.figures()
                rows.append(
                    {
                        "task": task.name,
                        "variant": "whole" if kind == WHOLE else kind,
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
