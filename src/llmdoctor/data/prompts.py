"""Prompts to answer: from a file of the user's, or those that ship."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdoctor.data.formats import Message, RowError, read_prompt, with_system
from llmdoctor.data.rows import BUILTIN, ROW_SUFFIXES, Located, open_text, read_rows, reading
from llmdoctor.errors import UserError

BUILTIN_PROMPTS = {"builtin:prompts": None, "builtin:prompts/train": "train", "builtin:prompts/test": "test"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a user turn, and a name for it that is unique in its source."""

    id: str
    messages: tuple[Message, ...]


def load_prompts(source: str | os.PathLike[str], limit: int | None = None) -> list[Prompt]:
    """Read the first `limit` prompts (all by default) of a source.

    source: a .txt file (one prompt a line, blank lines skipped), a .jsonl, .json or .parquet file with the column
        `prompt` (text, or messages that end with a user turn) and perhaps `system`, text that stands before it, and
        `id`, text or a whole number (default: the number of the line, item or row), or `builtin:prompts`,
        `builtin:prompts/train`, `builtin:prompts/test`.

    UserError, one line, for a source or row that cannot be used.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}, expected at least 1")
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for located in _rows(source):
        try:
            if isinstance(located.row, RowError):
                raise located.row
            prompt = _prompt(located.row, default_id=str(located.number))
        except RowError as error:
            raise UserError(f"{located.where} {error.detail}") from None
        if prompt.id in places:
            raise UserError(f"{located.where} has the id {prompt.id!r} a second time (first: {places[prompt.id]})")
        places[prompt.id] = located.where
        prompts.append(prompt)
        if len(prompts) == limit:
            break
    return prompts


def _rows(source: str | os.PathLike[str]) -> Iterator[Located]:
    name = os.fspath(source)
    if name.startswith("builtin:"):
        return _builtin_rows(name)
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a file of prompts")
    if path.name.lower().endswith((".txt", ".txt.gz")):
        return _text_rows(path)
    if path.name.lower().endswith(ROW_SUFFIXES):
        return read_rows(path)
    raise UserError(f"{path}: unknown kind of file, expected one of .txt, {', '.join(ROW_SUFFIXES)}")


def _builtin_rows(name: str) -> Iterator[Located]:
    if name not in BUILTIN_PROMPTS:
        raise UserError(f"{name}: no such builtin prompts; there is {', '.join(BUILTIN_PROMPTS)}")
    split = BUILTIN_PROMPTS[name]
    for located in read_rows(BUILTIN / "prompts.jsonl"):
        if split is None or isinstance(located.row, RowError) or located.row.get("split") == split:
            yield located


def _text_rows(path: Path) -> Iterator[Located]:
    found = False
    with reading(path), open_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                found = True
                yield Located(f"{path}: line", number, {"prompt": line.strip()})
    if not found:
        raise UserError(f"{path} is empty: it has no prompts")


def _prompt(row: dict[str, Any], default_id: str) -> Prompt:
    if "prompt" not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise RowError("missing column", f"has no `prompt`; expected prompt and perhaps id, got columns {columns}")
    name = default_id if row.get("id") is None else row["id"]
    if isinstance(name, float) and name.is_integer():
        # A column of numbers in which some are missing comes as floats from many tools.
        name = int(name)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise RowError("wrong type", f"has {name!r} as `id`, expected text or a whole number")
    return Prompt(str(name), with_system(read_prompt(row["prompt"]), row.get("system")))
