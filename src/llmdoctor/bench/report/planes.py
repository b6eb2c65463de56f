"""Pictures in a plane: score against KL and diversity, ablations, and two objectives against each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from llmdoctor.bench.report.charts import Series, Spot, frontier
from llmdoctor.bench.report.looks import look, setting_text
from llmdoctor.bench.report.picture import Picture, groups, left_out
from llmdoctor.bench.report.results import BenchResults, finite
from llmdoctor.evaluation.formatting import plain

_DRAWN: tuple[Literal["score", "score_low", "score_high", "kl", "kl_low", "kl_high", "distinct_4"], ...] = (
    "score", "score_low", "score_high", "kl", "kl_low", "kl_high", "distinct_4",
)  # fmt: skip
_KL = "KL to the patient, nats an answer (spaced by square root)"


def frontier_pictures(results: BenchResults, task: str, stem: str) -> Iterator[Picture]:
    """Score against KL and against distinct-4."""
    rows = [row for row in results.frontier if row["task"] == task]
    drawable = [row for row in rows if finite(*(row[key] for key in _DRAWN))]
    if not drawable:
        return
    lost = left_out(look(row["method"]).name for row in rows if row not in drawable)
    against_kl, against_diversity = [], []
    for method, own in groups(drawable, "method").items():
        titles = [_title(row) for row in own]
        bounds = [(row["score_low"], row["score_high"]) for row in own]
        pairs = list(zip(own, titles, bounds, strict=True))
        against_kl.append(
            Series(
                look(method),
                [Spot(r["kl"], r["score"], text, (r["kl_low"], r["kl_high"]), bound) for r, text, bound in pairs],
            )
        )
        against_diversity.append(
            Series(look(method), [Spot(r["distinct_4"], r["score"], text, None, bound) for r, text, bound in pairs])
        )
    looks = [entry.look for entry in against_kl]
    yield Picture(
        "frontier", task, f"frontier-{stem}-kl", f"Score against KL: {task}",
        f"Higher at the same KL is better. Bars: 95 % intervals.{lost}",
        frontier(against_kl, _KL, f"Score against KL, {task}", root=True, y_title="score"), looks,
    )  # fmt: skip
    yield Picture(
        "frontier", task, f"frontier-{stem}-diversity", f"Score against diversity: {task}",
        f"Up and to the right is better. Distinct-4: share of four-word sequences said only once.{lost}",
        frontier(against_diversity, "distinct-4", f"Score against distinct-4, {task}", y_title="score"), looks,
    )  # fmt: skip


def _title(row: Any) -> str:
    name = ", ".join(filter(None, [look(row["method"]).title, setting_text(row["setting"])]))
    return (
        f"{name}\nscore {plain(row['score'], 3)} ({plain(row['score_low'], 3)} to {plain(row['score_high'], 3)})\n"
        f"KL {plain(row['kl'])}, distinct-4 {plain(row['distinct_4'], 3)}, perplexity {plain(row['perplexity'], 1)}"
    )


def ablation_pictures(results: BenchResults, task: str, stem: str) -> Iterator[Picture]:
    """Variants of the doctor, score against KL."""
    rows = [
        row
        for row in results.ablation
        if row["task"] == task and finite(row["score"], row["score_low"], row["score_high"], row["kl"])
    ]
    if not rows:
        return
    lost = left_out(look(r["variant"]).name for r in results.ablation if r["task"] == task and r not in rows)
    series = [
        Series(look(variant), [_part(row) for row in sorted(own, key=lambda row: float(row["beta"]))])
        for variant, own in groups(rows, "variant").items()
    ]
    note = (
        "One line a variant, one spot a β. What falls below the one that it is taken from, at the same KL, was worth "
        f"having: rounds and pairs are parts of the whole, and parts of theirs are taken from them.{lost}"
    )
    # One folder may hold parts that were trained from several bases.
    if base := results.records.get("ablation.json", {}).get("options", {}).get("base"):
        note = f"Trained from {base}. {note}"
    chart = frontier(series, _KL, f"Ablation, {task}", root=True, y_title="score", height=360)
    yield Picture(
        "ablation", task, f"ablation-{stem}", f"Parts taken away: {task}", note, chart, [s.look for s in series]
    )


def _part(row: Any) -> Spot:
    title = f"{look(row['variant']).title}, β = {row['beta']:g}\nscore {plain(row['score'], 3)}, KL {plain(row['kl'])}"
    if row["win_plus_half_tie"] is not None:
        against = f"{plain(row['win_plus_half_tie'], 1)} % ({plain(row['ci_low'], 1)} to {plain(row['ci_high'], 1)})"
        title += f"\nat this KL {look(row['of']).name} has {against} against it"
    return Spot(row["kl"], row["score"], title, None, (row["score_low"], row["score_high"]))


def pareto_pictures(results: BenchResults) -> Iterator[Picture]:
    """Two objectives, with the patient as the reference."""
    found = results.pareto
    if found is None or not found["points"]:
        return
    one, two = found["tasks"]
    lines, looks = [], []
    for method, points in groups(found["points"], "method").items():
        ordered = sorted(points, key=lambda point: float(point["scores"][0]))
        lines.append(Series(look(method), [_mixture(point) for point in ordered]))
        looks.append(look(method))
    x, y = found["reference"]
    chart = frontier(
        lines, f"score: {one}", f"Two objectives, {one} and {two}",
        marked=(x, y, "patient alone"), y_title=f"score: {two}",
    )  # fmt: skip
    note = "Up and to the right is better. Lines join each method's own front; faint: beaten by another of its own."
    yield Picture("pareto", "", "pareto", f"Two objectives at once: {one} and {two}", note, chart, looks)


def _mixture(point: Any) -> Spot:
    one, two = point["scores"]
    name = ", ".join(filter(None, [look(point["method"]).title, setting_text(point["setting"])]))
    title = f"{name}\nscores {plain(one, 3)} and {plain(two, 3)}, KL {plain(point['kl'])}"
    return Spot(one, two, f"{title}, distinct-4 {plain(point['distinct_4'], 3)}", faint=not point["on_front"])
