"""Rows of an unfinished run, so that a kill loses none: one JSON line each, as they finish, after a fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self, TextIO

from llmdoctor.cli.options import check_output
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.files import write_json, write_text

SCHEMA_VERSION = 1
_REMEDY = "Give another output, or --overwrite to replace it."


def check_target(target: Path, overwrite: bool = False) -> None:
    """UserError where no rows can be written to `target`: a folder, a closed place, or a file of something else's."""
    if target.is_dir():
        raise UserError(f"{target} is a folder; the answers need a file, such as {target / 'answers.jsonl'}")
    check_output(target, folder=False)
    if target.exists() and not overwrite and not _recipe_of(target).is_file():
        raise UserError(f"{target} is there already, made by something else. {_REMEDY}")


class ResultFile:
    """A JSONL file that is written whole at the end, from a `NAME.partial` that grows row by row.

    Args:
        target: the finished file; `NAME.recipe.json` beside it says how it was made.
        recipe: how the rows are made; its `fingerprint` decides whether rows of an earlier run belong to this one, and
            its `settings` say what stands behind some of that.

    Raises:
        FingerprintMismatch: the finished file, or the rows of an unfinished run, were made in another way.
        UserError: the file is there and nothing says how it was made.
    """

    def __init__(self, target: Path, recipe: dict[str, Any], *, overwrite: bool = False) -> None:
        check_target(target, overwrite)
        self.target = target
        self.recipe = {"schema_version": SCHEMA_VERSION, **recipe}
        self.partial = target.with_name(f"{target.name}.partial")
        self.recipe_path = _recipe_of(target)
        self.rows: dict[int, dict[str, Any]] = {}
        if overwrite:
            self.partial.unlink(missing_ok=True)
        self.finished = target.exists() and not overwrite
        if self.finished:
            self._check_finished()
        self._handle: TextIO | None = None

    def __enter__(self) -> Self:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        good = self._read_partial()
        self._handle = self.partial.open("a", encoding="utf-8", newline="\n")
        # A kill may have cut the last line.
        self._handle.truncate(good)
        if good == 0:
            self._append({name: self.recipe[name] for name in ("fingerprint", "settings") if name in self.recipe})
        return self

    def check(self) -> None:
        """Only compare, also with a recipe that lacks what is not known yet; FingerprintMismatch as above."""
        self._read_partial()

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Keep the row of this number; it survives whatever happens next."""
        self._append({"number": number, "row": row})
        self.rows[number] = row

    def finish(self, count: int) -> None:
        """Write rows 0 … count − 1 in order, and the recipe; the partial file goes."""
        rows = [self.rows[number] for number in range(count)]
        # In this order a kill leaves no target beside a recipe that is not its own: without a target, what the partial
        # file holds is taken up again.
        self.target.unlink(missing_ok=True)
        write_json(self.recipe_path, self.recipe)
        write_text(self.target, "".join(_line(row) for row in rows))
        self.partial.unlink(missing_ok=True)

    def _append(self, value: Any) -> None:
        if self._handle is None:
            raise RuntimeError("the result file is not open")
        self._handle.write(_line(value))
        self._handle.flush()

    def _read_partial(self) -> int:
        """Take over the whole lines of an earlier run; returns the size in bytes of that part."""
        if not self.partial.is_file():
            return 0
        data = self.partial.read_bytes()
        good = data.rfind(b"\n") + 1
        lines = data[:good].splitlines()
        if not lines:
            return 0
        try:
            entries = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise UserError(f"{self.partial} is damaged ({error}); delete it to start anew") from error
        # Former versions wrote the fingerprint alone.
        made_of = entries[0] if "fingerprint" in entries[0] else {"fingerprint": entries[0]}
        self._compare(self.partial, made_of, "Delete that file to start anew, or give another output.")
        self.rows = {entry["number"]: entry["row"] for entry in entries[1:]}
        return good

    def _check_finished(self) -> None:
        try:
            stored = json.loads(self.recipe_path.read_text(encoding="utf-8"))
            dict(stored["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.recipe_path} is broken ({error!r}). {_REMEDY}") from error
        self._compare(self.target, stored, _REMEDY)

    def _compare(self, path: Path, stored: dict[str, Any], remedy: str) -> None:
        now = self.recipe["fingerprint"]
        was = {name: value for name, value in stored["fingerprint"].items() if name in now}
        if was != now:
            settings = stored.get("settings"), self.recipe.get("settings")
            raise FingerprintMismatch(str(path), was, now, remedy, *settings)


def _recipe_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.recipe.json")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
