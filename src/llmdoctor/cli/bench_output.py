"""How the results of a comparison are printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from llmdoctor.cli.command import Run


def show_rows(run: Run, rows: Any, names: tuple[str, ...], figures: tuple[str, ...]) -> None:
    """Print some columns of result rows: words under `names`, numbers under `figures`, nothing for None."""
    shown = Table(box=None, pad_edge=False)
    for name in names:
        shown.add_column(name)
    for name in figures:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        shown.add_row(*(_words(row[name]) for name in names), *(_figure(row[name]) for name in figures))
    show_table(run, shown)


def show_table(run: Run, table: Table) -> None:
    """Print a table in full: a line that is wider than the window goes on below, but no word is cut."""
    needed = Measurement.get(run.console, run.console.options.update(width=1000), table).maximum
    Console(highlight=False, width=max(run.console.width, needed)).print(table)


def show_done(run: Run, output: Path, name: str, quick: bool) -> None:
    """Say where the results are."""
    if quick:
        run.say("A smoke run: these figures mean nothing.")
    run.say(f"results are in {output / name}, every answer in {output / 'raw'}; llmdoctor bench report -o {output}")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:g}" for name, number in value.items())
    return str(value)
