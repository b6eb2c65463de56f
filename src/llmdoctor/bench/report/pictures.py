"""Every picture of a comparison, for the page and for files of their own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from llmdoctor.bench.report.charts import Band, Bar, dynamics, intervals
from llmdoctor.bench.report.findings import is_own
from llmdoctor.bench.report.looks import look
from llmdoctor.bench.report.picture import Picture
from llmdoctor.bench.report.planes import ablation_pictures, frontier_pictures, pareto_pictures
from llmdoctor.bench.report.results import BenchResults
from llmdoctor.bench.table import Row
from llmdoctor.evaluation.formatting import plain
from llmdoctor.evaluation.metrics import Interval


def pictures(results: BenchResults) -> list[Picture]:
    """All that the results allow, in the order of the page."""
    found = [
        *(picture for task, stem in _stems(results.tasks).items() for picture in _of_task(results, task, stem)),
        *pareto_pictures(results),
        *_volumes(results),
        *_human(results),
    ]
    return found


def of_section(found: Iterable[Picture], section: str, task: str = "") -> list[Picture]:
    """Those of a section, and of a task where one is named."""
    return [picture for picture in found if picture.section == section and task in ("", picture.task)]


def _stems(tasks: Iterable[str]) -> dict[str, str]:
    """Names of tasks as parts of file names, no two alike."""
    stems: dict[str, str] = {}
    for task in tasks:
        stem = re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-") or "task"
        stems[task] = stem if stem not in stems.values() else f"{stem}-{len(stems) + 1}"
    return stems


def _of_task(results: BenchResults, task: str, stem: str) -> Iterator[Picture]:
    yield from _table(results, task, stem)
    yield from frontier_pictures(results, task, stem)
    yield from ablation_pictures(results, task, stem)
    yield from _dynamics(results, task, stem)
    yield from _elo(results, task, stem)


def hardest_first(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows by method, each with what it has of "best" and "equal_kl"; where LLMdoctor does worst stands first."""
    methods: dict[str, dict[str, Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], {})[row["at"]] = row
    return sorted(methods.values(), key=lambda found: (found.get("equal_kl") or found["best"])["win_plus_half_tie"])


def _table(results: BenchResults, task: str, stem: str) -> Iterator[Picture]:
    rows = [row for row in results.table if row["task"] == task]
    if not rows:
        return
    lines = []
    for found in hardest_first(rows):
        bars = [_outcome(found[at], faint=at == "best") for at in ("equal_kl", "best") if at in found]
        lines.append((look(next(iter(found.values()))["method"]).name, bars))
    title = "Win + ½tie of LLMdoctor against each method"
    note = "Strong and written out: at equal KL. Faint: each at its best. Right of the line LLMdoctor wins."
    chart = intervals(lines, "win + ½tie of LLMdoctor, % (95 % interval)", f"{title}: {task}", centre=50)
    yield Picture("table", task, f"table-{stem}", f"{title}: {task}", note, chart)


def _outcome(row: Row, faint: bool) -> Bar:
    interval = Interval(row["win_plus_half_tie"], row["ci_low"], row["ci_high"])
    return Bar(look(row["method"]), interval, _figures(interval, 1), faint)


def _figures(interval: Interval, digits: int) -> str:
    mean, low, high = (plain(value, digits).replace(",", "") for value in interval)
    return mean if low == high else f"{mean} ({low} to {high})"


def _volumes(results: BenchResults) -> Iterator[Picture]:
    found = results.pareto
    if found is None or not found["hypervolume"]:
        return
    largest = max(volume["high"] for volume in found["hypervolume"].values())
    digits = 2 - math.floor(math.log10(largest)) if largest > 0 else 0
    rows = [
        _interval_row(name, volume["value"], volume["low"], volume["high"], max(0, digits))
        for name, volume in found["hypervolume"].items()
    ]
    for volume in found.get("by_strength", []):
        name, bars = _interval_row(volume["method"], volume["value"], volume["low"], volume["high"], max(0, digits))
        rows.append((f"{name}, strength {volume['strength']:g}", bars))
    reference = ", ".join(plain(score, 3) for score in found["reference"])
    note = f"Area that a method's points cover above the patient alone ({reference}). Larger is better."
    chart = intervals(rows, f"{' × '.join(found['tasks'])}, in units of the scores", "Hypervolume by method")
    yield Picture("pareto", "", "hypervolume", "Hypervolume", note, chart)


def _interval_row(
    method: str, mean: float, low: float, high: float, digits: int | None = None
) -> tuple[str, list[Bar]]:
    largest = max(abs(mean), abs(low), abs(high))
    digits = digits if digits is not None else 0 if largest >= 100 else 1 if largest >= 20 else 3
    interval = Interval(mean, low, high)
    return look(method).name, [Bar(look(method), interval, _figures(interval, digits))]


def _dynamics(results: BenchResults, task: str, stem: str) -> Iterator[Picture]:
    rows = [row for row in results.dynamics if row["task"] == task]
    if not rows:
        return
    bands = [Band(look(r["method"]), r["positions"], r["mean"], r["low"], r["high"]) for r in rows]
    trainings = f", mean of {rows[0]['seeds']} trainings" if rows[0]["seeds"] > 1 else ""
    note = (
        f"Gap between chosen and rejected, read so far, over the mean absolute gap at the end; {rows[0]['pairs']} "
        f"held-out pairs{trainings}. 1 at the end: always right. Dotted: a signal spread evenly."
    )
    title = f"How early each guide tells good from bad: {task}"
    yield Picture("dynamics", task, f"dynamics-{stem}", title, note, dynamics(bands, title), [b.look for b in bands])


def _elo(results: BenchResults, task: str, stem: str) -> Iterator[Picture]:
    rows = [row for row in results.elo if row["task"] == task]
    if not rows:
        return
    ranked = sorted(rows, key=lambda row: -row["elo"])
    lines = [_interval_row(row["method"], row["elo"], row["low"], row["high"], 0) for row in ranked]
    note = (
        "From every method against every other at its best setting, whatever its KL. The patient is 1000; "
        "400 points are odds of 10 to 1."
    )
    chart = intervals(lines, "Elo (95 % interval)", f"Elo, {task}", centre=1000)
    yield Picture("elo", task, f"elo-{stem}", f"All methods on one scale: {task}", note, chart)


def _human(results: BenchResults) -> Iterator[Picture]:
    rows = results.human
    if not rows:
        return
    lines = [_interval_row(row["method"], row["accuracy"], row["low"], row["high"], 1) for row in rows]
    note = f"{rows[0]['train_pairs']} pairs to learn from, {rows[0]['pairs']} held out. The line is chance."
    chart = intervals(lines, "held-out pairs told right, % (95 % interval)", "Agreement with people", centre=50)
    yield Picture("human", "", "human", "Agreement with human labels", note, chart)
    others = [row for row in rows if not is_own(row["method"])]
    if others:
        gaps = [
            _interval_row(row["method"], row["difference"], row["difference_low"], row["difference_high"], 1)
            for row in others
        ]
        note = "Same pairs, same resamples. Right of the line LLMdoctor is better."
        title = "LLMdoctor's lead over each"
        chart = intervals(gaps, "difference, percentage points", title, centre=0)
        yield Picture("human", "", "human-difference", title, note, chart)
