"""What a comparison says in words: against whom LLMdoctor wins and loses, and what stays open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmdoctor.bench.methods import DOCTOR
from llmdoctor.bench.report.looks import look
from llmdoctor.bench.table import Row

Verdict = Literal["wins", "open", "loses"]


def verdict(row: Row) -> Verdict:
    """LLMdoctor wins or loses where the interval of win + ½tie excludes 50 %; otherwise it is open."""
    if row["ci_low"] > 50:
        return "wins"
    return "loses" if row["ci_high"] < 50 else "open"


@dataclass
class Findings:
    """A task's verdicts at equal KL, most lopsided first.

    Attributes:
        task: its name.
        wins, open, loses: rows by verdict.
        unmatched: rows whose KL LLMdoctor was not measured at, so that it answered at another.
    """

    task: str
    wins: list[Row] = field(default_factory=list)
    open: list[Row] = field(default_factory=list)
    loses: list[Row] = field(default_factory=list)
    unmatched: list[Row] = field(default_factory=list)

    @property
    def matched(self) -> int:
        """How many methods were met at equal KL."""
        return len(self.wins) + len(self.open) + len(self.loses)


def is_own(method: str) -> bool:
    """Another form of LLMdoctor, which is no opponent."""
    return method.startswith(DOCTOR)


def findings(table: Sequence[Row]) -> list[Findings]:
    """The verdicts of every task."""
    found: dict[str, Findings] = {}
    for row in sorted(table, key=lambda row: abs(row["win_plus_half_tie"] - 50), reverse=True):
        if row["at"] == "equal_kl" and not is_own(row["method"]):
            task = found.setdefault(row["task"], Findings(row["task"]))
            (task.unmatched if row["clamped"] else getattr(task, verdict(row))).append(row)
    order = list(dict.fromkeys(row["task"] for row in table))
    return sorted(found.values(), key=lambda task: order.index(task.task))


def headline(found: Sequence[Findings]) -> str:
    """The comparison in one sentence."""
    total = sum(task.matched for task in found)
    if not total:
        return "Methods that steer a frozen model, side by side"
    wins, undecided, losses = (sum(len(getattr(task, name)) for task in found) for name in ("wins", "open", "loses"))
    if len(found) == 1:
        [task] = found
        verbs = (("beats", task.wins), ("loses to", task.loses), ("is not told apart from", task.open))
        said = [_against(verb, rows) for verb, rows in verbs if rows]
        return f"At equal KL LLMdoctor {', and '.join(filter(None, [', '.join(said[:-1]), said[-1]]))}"
    if wins == total:
        return f"At equal KL LLMdoctor wins all of {total} comparisons"
    parts = [f"wins {wins} of {total} comparisons"]
    if losses:
        parts.append(f"loses {losses}")
    if undecided:
        parts.append(f"leaves {undecided} undecided")
    return f"At equal KL LLMdoctor {listed(parts)}"


def _against(verb: str, rows: Sequence[Row]) -> str:
    if len(rows) > 3:
        return f"{verb} {len(rows)} methods"
    return f"{verb} {listed(look(row['method']).name for row in rows)}"


def listed(parts: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = list(parts)
    return f"{', '.join(first)} and {last}" if first else last
