"""The report of a comparison: one page, self-contained, no scripts, no network; and its charts as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llmdoctor.bench.points import Figures
from llmdoctor.bench.report.charts import sheet
from llmdoctor.bench.report.examples import read_examples
from llmdoctor.bench.report.findings import findings, headline, is_own, verdict
from llmdoctor.bench.report.looks import SERIES_CSS, colours_css, look, setting_text
from llmdoctor.bench.report.pictures import hardest_first, of_section, pictures
from llmdoctor.bench.report.results import BenchResults, read_results
from llmdoctor.bench.table import LEAST_DISTINCT, MOST_PERPLEXITY, Row
from llmdoctor.evaluation.formatting import plain
from llmdoctor.evaluation.pages import PAPER, flat, write_page
from llmdoctor.files import write_text

PAGE = "report.html"
_DARK = "\n@media (prefers-color-scheme: dark) {{ {} }}"


def render_bench_report(folder: Path) -> Path:
    """Read the result files in `folder` and write the page beside them; returns its path.

    Raises:
        UserError: no results there, or a file that is broken or of another schema.
    """
    results = read_results(folder)
    found = findings(results.table)
    examples, examples_note = read_examples(results)
    quick = [name for name, record in results.records.items() if record.get("quick")]
    return write_page(
        "bench.html.j2",
        folder / PAGE,
        title="The arena · llmdoctor bench",
        footer=f"Made by llmdoctor bench. Method: {PAPER}.",
        css=Markup(SERIES_CSS + colours_css(dark=False) + _DARK.format(colours_css(dark=True))),
        quick=quick,
        all_quick=len(quick) == len(results.records),
        headline=("Smoke run, means nothing: " if "table.json" in quick else "") + headline(found),
        findings=found,
        scale=_scale(results),
        tables=[_Table(task, rows) for task in results.tasks if (rows := _of(results.table, task))],
        most_perplexity=MOST_PERPLEXITY,
        least_distinct=LEAST_DISTINCT,
        pictures=pictures(results),
        of_section=of_section,
        tasks=results.tasks,
        ablation=results.ablation,
        judge=results.judge,
        costs=_costs(results.frontier),
        examples=examples,
        examples_note=examples_note,
        origins=_origins(results.records),
        unrecorded=[name for name in results.present if name not in results.records],
        missing=results.missing,
        look=look,
        is_own=is_own,
        verdict=verdict,
        setting_text=setting_text,
    )


def write_plots(folder: Path, into: Path) -> list[Path]:
    """Write every chart that the results in `folder` allow as an SVG file below `into`; returns their paths.

    Raises:
        UserError: as `render_bench_report`.
    """
    paths = []
    for picture in pictures(read_results(folder)):
        path = into / f"{picture.name}.svg"
        write_text(path, sheet(picture.title, picture.note, picture.chart, picture.looks))
        paths.append(path)
    return paths


class _Table:
    """One task's table, where LLMdoctor does worst first."""

    def __init__(self, task: str, rows: Sequence[Row]) -> None:
        self.task = task
        self.lines = hardest_first(rows)
        self.rows = [row for line in self.lines for row in line.values()]
        self.prompts = max(row["prompts"] for row in rows)
        self.seeds = max(row["seeds"] for row in rows)
        self.clamped = any(row["clamped"] for row in rows)
        self.broken = not all(row["keeps_text"] and row["doctor_keeps_text"] for row in rows)


@dataclass(frozen=True)
class _Cost:
    """What a method costs, over tasks and settings."""

    method: str
    speed: tuple[float, float]
    patient: tuple[float, float]
    guide: tuple[float, float]
    fastest: float

    @property
    def width(self) -> float:
        """Length of its bar, percent: the mean of its slowest and fastest against the fastest of all."""
        return round(50 * sum(self.speed) / self.fastest, 1) if self.fastest else 0.0


def _costs(frontier: Sequence[Figures]) -> list[_Cost]:
    fastest = max((row["tokens_per_second"] for row in frontier), default=0.0)
    costs = []
    for method in dict.fromkeys(row["method"] for row in frontier):
        own = [row for row in frontier if row["method"] == method]
        speed, patient, guide = (
            (min(values), max(values))
            for values in (
                [row["tokens_per_second"] for row in own],
                [row["patient_forwards_per_token"] for row in own],
                [row["guide_forwards_per_token"] for row in own],
            )
        )
        costs.append(_Cost(method, speed, patient, guide, fastest))
    return sorted(costs, key=lambda cost: -cost.speed[1])


def _scale(results: BenchResults) -> str:
    """How much was measured, in words."""
    rows: Sequence[Any] = results.table or results.frontier or results.ablation
    if not rows:
        return ""
    prompts, seeds = max(row["prompts"] for row in rows), max(row["seeds"] for row in rows)
    tasks = "task" if len(results.tasks) == 1 else "tasks"
    return (
        f"{plain(prompts, 0)} unseen prompts, {seeds} {'seed' if seeds == 1 else 'seeds'}, "
        f"{len(results.tasks)} {tasks}: {', '.join(results.tasks)}"
    )


def _origins(records: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """File names with what they were made from; files of one record together."""
    names: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, record in records.items():
        names.setdefault(tuple(_facts(record)), []).append(name)
    return [(", ".join(files), list(facts)) for facts, files in names.items()]


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A record without what was left empty."""
    tasks = [dict(task) for task in run.get("tasks", [])]
    shown = {**run, "tasks": {task.pop("name"): task for task in tasks}}
    return [(name.removeprefix("options · "), value) for name, value in flat(shown) if value]


def _of(rows: Sequence[Row], task: str) -> list[Row]:
    return [row for row in rows if row["task"] == task]
