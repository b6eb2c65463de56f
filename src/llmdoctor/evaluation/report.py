"""The HTML pages: an inspection of token rewards, and what a demo run did. Self-contained, no scripts, no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmdoctor.errors import UserError
from llmdoctor.evaluation import charts
from llmdoctor.evaluation.formatting import count, duration, percent, signed
from llmdoctor.evaluation.heatmap import guided_tokens, named, reward_tokens, visible
from llmdoctor.evaluation.inspection import THETAS, Inspection, Row, TokenType, inspect_rewards
from llmdoctor.evaluation.metrics import Interval, WinTieLoss
from llmdoctor.evaluation.pages import PAPER, flat, write_page
from llmdoctor.rewards.store import SIDES

_ROWS_SHOWN_FIRST = 24


class Agreement(TypedDict):
    """Rank agreement between paraphrased faces: `spearman[i][j]` compares faces i and j."""

    faces: list[str]
    spearman: list[list[float]]


class SystemFigures(TypedDict):
    """Figures of one system; `score_ci` is [low, high] at 95 %, `kl` is to the patient, in nats a sequence."""

    score: float
    score_ci: Sequence[float]
    distinct_4: float
    perplexity: float
    kl: NotRequired[float]


class DemoSummary(TypedDict):
    """What summary.json holds. `win_plus_half_tie` is in percent.

    `seconds` is this run's, by stage and in order: a stage that an earlier run had finished counts what was left.
    """

    patient: SystemFigures
    guided: SystemFigures
    win_plus_half_tie: float
    alpha: float
    beta: float
    seed: int
    seconds: Mapping[str, float]
    peak_rss_gb: float
    versions: Mapping[str, str]
    scorer: NotRequired[str]


class DemoRow(TypedDict):
    """One unseen prompt. The last two belong together: guided text by token, and log π_dec − log π_patient (nats)."""

    prompt: str
    patient: str
    guided: str
    patient_score: float
    guided_score: float
    guided_tokens: NotRequired[Sequence[str]]
    guided_shift: NotRequired[Sequence[float]]


def _messages(prompt: str) -> list[dict[str, str]]:
    messages = json.loads(prompt)
    return [
        {"role": visible(str(message["role"])), "content": visible(str(message["content"]))} for message in messages
    ]


def _example(row: Row) -> dict[str, Any]:
    sides = [
        {
            "name": side,
            "tokens": reward_tokens(row, side),
            "kept": sum(reward != 0 for reward in row[f"{side}_rewards"]),
            "complete": row[f"{side}_terminal"],
        }
        for side in SIDES
    ]
    return {"prompt": _messages(row["prompt"]), "sides": sides}


def _mean_off_diagonal(agreement: Agreement) -> float:
    matrix = np.asarray(agreement["spearman"], dtype=np.float64)
    size = len(agreement["faces"])
    if matrix.shape != (size, size):
        raise ValueError(f"spearman must be {size} × {size} for {size} faces, got shape {matrix.shape}")
    return float(matrix[~np.eye(size, dtype=bool)].mean()) if size > 1 else float("nan")


def render_inspection(
    rows: Iterable[Row],
    manifest: Mapping[str, Any],
    output: Path,
    examples: int = 12,
    *,
    theta: float | None = None,
    agreement: Agreement | None = None,
) -> Inspection:
    """Write the inspection page of a rewards store to `output` and return its figures.

    Args:
        rows: the store's rows, gone through once.
        manifest: how the store was made, shown as it is.
        output: the HTML file.
        examples: how many pairs to show token by token.
        theta: the threshold in use, marked in the charts; None for a density threshold, which has no single θ.
        agreement: rank agreement between paraphrased faces, if it was measured.

    Raises:
        UserError: no rows, or rows that are not a rewards store's.
    """
    stats = inspect_rewards(rows, examples=examples)
    curves = {"all": stats.overall.kept_at, "chosen": stats.chosen.kept_at, "rejected": stats.rejected.kept_at}
    write_page(
        "inspection.html.j2",
        output,
        title="Token rewards · llmdoctor",
        footer=f"Made by llmdoctor inspect. Method: {PAPER}.",
        stats=stats,
        overall=stats.overall,
        kept_chart=charts.kept_curve(THETAS.tolist(), curves, theta),
        histogram=charts.importance_histogram(stats.overall.histogram.tolist(), theta),
        examples=[_example(row) for row in stats.examples],
        faces=agreement["faces"] if agreement else [],
        spearman=agreement["spearman"] if agreement else [],
        mean_agreement=_mean_off_diagonal(agreement) if agreement else None,
        manifest=flat(manifest),
    )
    return stats


def _type_table(title: str, types: Sequence[TokenType], style: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("token")
    table.add_column("seen", justify="right")
    table.add_column("mean reward", justify="right", style=style)
    for token in types:
        table.add_row(Text(named(token.text)), count(token.count), signed(token.mean_reward))
    return table


def inspection_summary(stats: Inspection, top: int = 8) -> RenderableType:
    """The inspection's main figures for a terminal (print it with rich)."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("", "responses", "tokens", "kept", "kept share", "faces agree"):
        table.add_column(name, justify="left" if not name else "right")
    for name, side in (("chosen", stats.chosen), ("rejected", stats.rejected), ("both", stats.overall)):
        figures = (count(side.responses), count(side.tokens), count(side.kept))
        table.add_row(name, *figures, percent(side.kept_ratio, 1), percent(side.agreement, 1))
    lists = Table.grid(padding=(0, 6, 0, 0))
    lists.add_row(
        _type_table("Most rewarded", stats.most_rewarded[:top], "green"),
        _type_table("Most punished", stats.most_punished[:top], "red"),
    )
    note = f"Tokens seen at least {stats.min_count} times; mean over every occurrence. ␣ is a space."
    return Group(table, Text(), lists, Text(note, style="dim"))


def _stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        {"name": name.replace("_", " "), "seconds": value, "width": round(100 * value / longest, 1)}
        for name, value in seconds.items()
    ]


def _duel_row(row: DemoRow) -> dict[str, Any]:
    tokens = row.get("guided_tokens") or [row["guided"]]
    shifts = row.get("guided_shift") or [0.0] * len(tokens)
    return {
        **row,
        "prompt": visible(row["prompt"]),
        "patient": visible(row["patient"]),
        "guided": guided_tokens(tokens, shifts),
    }


def _story(patient_name: str, prompts: int, seconds: float) -> str:
    return (
        f"{patient_name[:1].upper()}{patient_name[1:]} answered {count(prompts)} prompts that were not trained on, "
        f"once alone and once guided by a small doctor trained for it. This run took {duration(seconds)}. "
        "Its weights are untouched: the doctor only shifts which token comes next."
    )


def _mean_row(name: str, figures: SystemFigures) -> tuple[str, str, Interval]:
    low, high = figures["score_ci"]
    return name, name, Interval(figures["score"], low, high)


def render_demo_report(
    summary: DemoSummary,
    rows: Sequence[DemoRow],
    output: Path,
    *,
    pairs: Iterable[Row] = (),
    settings: Mapping[str, Any] | None = None,
    patient_name: str = "the patient",
    tie_margin: float = 0.0,
) -> Path:
    """Write the demo's page to `output`.

    Args:
        summary: the content of summary.json.
        rows: every unseen prompt with both texts and scores, in the order of the test set.
        output: the HTML file.
        pairs: a few rewards rows to show token by token.
        settings: anything else to list under "Settings", beside what `summary` holds.
        patient_name: how the page calls the frozen model.
        tie_margin: the score difference up to which `win_plus_half_tie` counted a tie.

    Raises:
        UserError: there are no rows.
    """
    if not rows:
        raise UserError("the demo has no prompts to report on")
    patient, guided = summary["patient"], summary["guided"]
    scores = [row["patient_score"] for row in rows], [row["guided_score"] for row in rows]
    outcome = WinTieLoss.from_scores(scores[1], scores[0], tie_margin)
    total = sum(summary["seconds"].values())
    shown = {key: value for key, value in summary.items() if key in ("alpha", "beta", "seed", "scorer")}
    write_page(
        "demo.html.j2",
        output,
        title="Patient and guided · llmdoctor demo",
        footer=f"Made by llmdoctor demo. Method: {PAPER}.",
        story=_story(patient_name, len(rows), total),
        patient=patient,
        guided=guided,
        scorer=summary.get("scorer"),
        wins=summary["win_plus_half_tie"],
        wins_ci=outcome.interval(),
        outcome=outcome,
        diversity_ratio=guided["distinct_4"] / patient["distinct_4"] if patient["distinct_4"] else float("nan"),
        perplexity_ratio=guided["perplexity"] / patient["perplexity"],
        scatter=charts.before_after(*scores),
        means=charts.interval_rows([_mean_row("patient", patient), _mean_row("guided", guided)]),
        stages=_stages(summary["seconds"]),
        total_seconds=total,
        peak=summary["peak_rss_gb"],
        rows=[_duel_row(row) for row in rows],
        first=_ROWS_SHOWN_FIRST,
        marks=any("guided_shift" in row for row in rows),
        examples=[_example(row) for row in pairs],
        settings=flat({**shown, **(settings or {}), **summary["versions"]}),
    )
    return output
