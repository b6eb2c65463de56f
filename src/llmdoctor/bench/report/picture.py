"""One picture of a comparison, and how rows are sorted into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from llmdoctor.bench.report.looks import Look


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart with what belongs to it.

    Attributes:
        section: of the page.
        task: that it is about; empty for all.
        name: of its file, without suffix.
        title: above it.
        note: how it is read.
        chart: SVG.
        looks: what its key explains.
    """

    section: str
    task: str
    name: str
    title: str
    note: str
    chart: Markup
    looks: Sequence[Look] = ()


def groups(rows: Sequence[Any], key: str) -> Mapping[str, list[Any]]:
    """Rows by the value of `key`, in their order."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def left_out(names: Iterable[str]) -> str:
    """A sentence on what could not be drawn; empty where nothing is."""
    lost = sorted(set(names))
    return f" Not drawn, for want of a finite figure: {', '.join(lost)}." if lost else ""
