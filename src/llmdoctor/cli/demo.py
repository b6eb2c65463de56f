"""`llmdoctor demo`: the whole pipeline on the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.cli.options import check_output

if TYPE_CHECKING:
    from llmdoctor.demo import DemoResult

_ROWS_SHOWN = 6


@command
def demo(
    run: Run,
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder for everything that is made.")
    ] = Path("runs/demo"),
    options: Annotated[dict[str, Any], FieldsOf("llmdoctor.demo", "DemoOptions", panel="Demo")],
) -> None:
    """See all of it in minutes: rewards, a doctor trained in front of you, and guided answers beside the patient's own.

    Needs no data and no model: both come with llmdoctor. A run that was cut goes on when it is started again.

    Example: llmdoctor demo
    """
    check_output(output, folder=True)
    from llmdoctor.cli.training_callback import quiet_training
    from llmdoctor.demo import DemoOptions, run_demo

    run.kept = f"What is finished is kept in {output}; the same command goes on from there."
    with quiet_training(run.verbose):
        result = run_demo(output, run.progress, DemoOptions(**options))
    _show(run, result)
    run.say(f"the report is {result.report}")


def _show(run: Run, result: DemoResult) -> None:
    from rich.table import Table
    from rich.text import Text

    from llmdoctor.cli.generate import printable

    table = Table(expand=True, show_lines=True)
    for name, ratio in (("prompt", 2), ("patient", 4), ("guided", 4)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for row in result.rows[:_ROWS_SHOWN]:
        table.add_row(*(Text(printable(row[name])) for name in ("prompt", "patient", "guided")))
    run.console.print(table)
    summary = result.summary
    figures = Table(box=None, padding=(0, 3, 0, 0))
    for heading in ("", "score", "95 %", "distinct-4", "perplexity", "KL"):
        figures.add_column(heading, justify="right" if heading else "left")
    for name, system in (("patient", summary["patient"]), ("guided", summary["guided"])):
        low, high = system["score_ci"]
        figures.add_row(
            name,
            f"{system['score']:.2f}",
            f"{low:.2f} … {high:.2f}",
            f"{system['distinct_4']:.3f}",
            f"{system['perplexity']:.1f}",
            f"{system['kl']:.1f}",
        )
    run.console.print(figures)
    run.say(
        f"guided against patient, wins and half the ties: {summary['win_plus_half_tie']:.0f} %; "
        f"{sum(summary['seconds'].values()):.0f} s, at most {summary['peak_rss_gb']:.1f} GB"
    )
