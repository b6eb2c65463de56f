"""The result files of a comparison, as they lie in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdoctor.bench.ablation import AblationRow
from llmdoctor.bench.agreement import AgreementResult
from llmdoctor.bench.held_out import DynamicsRow, HumanRow
from llmdoctor.bench.pareto import Pareto, ParetoPoint
from llmdoctor.bench.points import Figures
from llmdoctor.bench.record import RUN, read_records
from llmdoctor.bench.table import Elo, Row
from llmdoctor.errors import UserError

# What the page needs of a row; what an older or newer version holds beside it does not matter.
_FILES: Mapping[str, type] = {
    "table": Row,
    "frontier": Figures,
    "elo": Elo,
    "ablation": AblationRow,
    "dynamics": DynamicsRow,
    "human": HumanRow,
}
# Their tasks are no rows of a comparison.
_UNJUDGED = ("human.json", "judge.json")
# Bounded or regularised where they are made. A score, KL or perplexity may be infinite: the page then says so.
_ALWAYS_FINITE = (Elo, HumanRow)


@dataclass(frozen=True)
class BenchResults:
    """All that was found; a file that is not there is an empty list, or None.

    Attributes:
        folder: where.
        records: what each result file that is there was made from, by its name, see `bench.record`.
        judge: how the judge fares on human labels; not every comparison needs to know.
        missing: names of the other files that are not there.
    """

    folder: Path
    records: Mapping[str, Mapping[str, Any]]
    table: list[Row]
    frontier: list[Figures]
    elo: list[Elo]
    ablation: list[AblationRow]
    dynamics: list[DynamicsRow]
    human: list[HumanRow]
    pareto: Pareto | None
    judge: AgreementResult | None
    missing: tuple[str, ...]

    @property
    def present(self) -> list[str]:
        """Names of the result files that are there."""
        return [name for name in (*(f"{name}.json" for name in _FILES), "pareto.json") if name not in self.missing]

    @property
    def tasks(self) -> list[str]:
        """Names, in the order in which they were measured."""
        judged = (record for name, record in self.records.items() if name not in _UNJUDGED)
        named = [str(task["name"]) for record in judged for task in record.get("tasks", [])]
        groups: tuple[list[Any], ...] = (self.table, self.frontier, self.elo, self.ablation, self.dynamics)
        return list(dict.fromkeys([*named, *(row["task"] for rows in groups for row in rows)]))


def read_results(folder: Path) -> BenchResults:
    """Read what is there.

    Raises:
        UserError: no result file at all, or one that is broken or not of this schema.
    """
    rows = {name: _rows(folder, name, kind) for name, kind in _FILES.items()}
    pareto = _pareto(folder)
    missing = [f"{name}.json" for name, found in rows.items() if found is None]
    if pareto is None:
        missing.append("pareto.json")
    if len(missing) == len(_FILES) + 1:
        raise UserError(f"{folder} holds no results; expected at least one of {', '.join(missing)}: run a bench first")
    records = {name: record for name, record in read_records(folder).items() if (folder / name).is_file()}
    if not (folder / RUN).is_file():
        missing.append(RUN)
    return BenchResults(
        folder=folder,
        records=records,
        pareto=pareto,
        judge=_agreement(folder),
        missing=tuple(missing),
        **{name: found or [] for name, found in rows.items()},
    )


def _load(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is broken ({error}); delete it and run the bench again") from error


def _rows(folder: Path, name: str, kind: type) -> list[Any] | None:
    path = folder / f"{name}.json"
    found = _load(path)
    if found is None:
        return None
    if not isinstance(found, list):
        raise UserError(f"{path} must hold a list of rows, found {type(found).__name__}; run the bench again")
    for number, row in enumerate(found, 1):
        _check(f"{path} row {number}", row, kind)
    return found


def _pareto(folder: Path) -> Pareto | None:
    path = folder / "pareto.json"
    found: Pareto | None = _load(path)
    if found is None:
        return None
    if not isinstance(found, dict) or not {"tasks", "reference", "points", "hypervolume"} <= found.keys():
        raise UserError(f"{path} must hold tasks, reference, points and hypervolume; run the bench again")
    for number, point in enumerate(found["points"], 1):
        _check(f"{path} point {number}", point, ParetoPoint)
        if len(point["scores"]) != 2:
            raise UserError(f"{path} point {number} has {len(point['scores'])} scores; a front in the plane needs 2")
    return found


def _agreement(folder: Path) -> AgreementResult | None:
    path = folder / "judge.json"
    found: AgreementResult | None = _load(path)
    if found is not None:
        _check(str(path), found, AgreementResult)
    return found


def _check(where: str, row: Any, kind: Any) -> None:
    """UserError where a row lacks a field that is needed, or holds something else than a number."""
    if not isinstance(row, dict):
        raise UserError(f"{where} must be an object, found {type(row).__name__}; run the bench again")
    lacking = sorted(kind.__required_keys__ - row.keys())
    if lacking:
        raise UserError(f"{where} lacks {', '.join(lacking)}: written by another version; run the bench again")
    for key, value in _numbers(row, kind):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: {key} must be a number, got {value!r}; run the bench again")
        if kind in _ALWAYS_FINITE and not finite(value):
            raise UserError(f"{where}: {key} must be finite, got {value}; delete the file and run the bench again")


def _numbers(row: Mapping[str, Any], kind: Any) -> Iterator[tuple[str, Any]]:
    for key, annotation in kind.__annotations__.items():
        # Annotations are kept as text in modules that postpone them.
        if getattr(annotation, "__forward_arg__", annotation) in ("float", "int", float, int):
            yield key, row[key]


def finite(*values: float) -> bool:
    """Whether all can be drawn."""
    return all(map(math.isfinite, values))
