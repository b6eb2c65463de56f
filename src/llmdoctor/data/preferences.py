"""Preference pairs from any source, streamed; and pairs written to a file."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from llmdoctor.data.formats import FORMATS, Message, PreferencePair, RowError, detect_format
from llmdoctor.data.rows import GIVEN, GivenRows, Located, RowSource, SizedRows, open_rows
from llmdoctor.errors import UserError
from llmdoctor.files import atomic_path, digest

__all__ = ["Message", "OnBad", "PreferencePair", "PreferenceSource", "load_preferences", "write_pairs"]

OnBad = Literal["auto", "error", "skip"]

_log = logging.getLogger(__name__)


def load_preferences(
    source: str | os.PathLike[str] | SizedRows,
    *,
    split: str = "train",
    format: str = "auto",
    dimension: str | None = None,
    limit: int | None = None,
    streaming: bool = True,
    on_bad: OnBad = "auto",
) -> PreferenceSource:
    """Open preference pairs; they are read when iterated.

    source: a .json, .jsonl (either may be .gz) or .parquet file, a folder of them, `builtin:NAME`, or a data set on the
        Hugging Face hub: `owner/name`, optionally with `/folder`, `:config` and `@revision` after it. Or rows in
        memory: a list of mappings, or a `datasets.Dataset`.
    split: of a hub data set, or of a folder whose files or sub-folders are named after splits; a single file is read
        whole, and so are rows in memory.
    format: `standard`, `hh`, `pku`, `ultrafeedback`, or `auto` to tell by the first row.
    dimension: keep only pairs with this label; pairs without a label are given it.
    limit: at most so many pairs. streaming: False downloads a hub data set before it is read.
    on_bad: `error` stops at the first bad row. `skip` drops bad rows and counts them. `auto` stops at rows that break
        their format (no JSON, a column missing, a wrong type), and at pairs that teach nothing (empty or identical
        responses, two different prompts) only in the `standard` format: the published sets have such pairs.

    UserError, one line, for a source, option or first row that cannot be used; for a later row, while iterating.
    """
    if format != "auto" and format not in FORMATS:
        raise UserError(f"unknown format {format!r}, expected one of auto, {', '.join(FORMATS)}")
    if on_bad not in get_args(OnBad):
        raise UserError(f"unknown on_bad {on_bad!r}, expected one of {', '.join(get_args(OnBad))}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}, expected at least 1")
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        rows = open_rows(source, split=split, streaming=streaming)
    else:
        name, rows = GIVEN, GivenRows(source)
    if format == "auto":
        format = _first_format(name, rows, skip_malformed=on_bad == "skip")
    return PreferenceSource(name, rows, format=format, dimension=dimension, limit=limit, on_bad=on_bad)


class PreferenceSource:
    """Preference pairs of one source. Each `iter()` reads it again from the start and holds one row at a time."""

    def __init__(
        self, name: str, rows: RowSource, *, format: str, dimension: str | None, limit: int | None, on_bad: OnBad
    ) -> None:
        self.name = name
        """The source as it was given, or what rows in memory are called."""
        self.format = format
        self.skipped: Counter[str] = Counter()
        """Rows dropped so far in the latest pass, by reason."""
        self._rows = rows
        self._dimension = dimension
        self._limit = limit
        self._on_bad = on_bad
        self._first_skipped: dict[str, str] = {}
        self._rows_seen = 0
        self._reported = False

    def __iter__(self) -> Iterator[PreferencePair]:
        self.skipped, self._first_skipped, self._rows_seen = Counter(), {}, 0
        other: set[str] = set()
        count = 0
        for pair in itertools.chain.from_iterable(map(self._pairs_of, self._rows)):
            if self._dimension is not None and pair.dimension not in ("", self._dimension):
                other.add(pair.dimension)
                continue
            count += 1
            yield pair if self._dimension is None else replace(pair, dimension=self._dimension)
            if count == self._limit:
                break
        if not count:
            raise UserError(self._nothing_found(other))
        if self.skipped and not self._reported:
            self._reported = True
            _log.warning(self.skip_report())

    def fingerprint(self) -> str:
        """Short hash of what the pairs are: content (or commit and split of the hub), format, dimension, limit."""
        # Not on_bad: two policies give the same pairs up to where one of them stops, so work done stays valid.
        options = [self.format, self._dimension, self._limit]
        return digest({"rows": self._rows.identity(), "options": options})

    def skip_report(self) -> str:
        """One line that says what the latest pass dropped, and where first; empty if nothing."""
        if not self.skipped:
            return ""
        reasons = ", ".join(
            f"{count} × {reason} (first: {self._first_skipped[reason]})" for reason, count in self.skipped.most_common()
        )
        return f"{self.name}: skipped {self.skipped.total()} of {self._rows_seen} rows: {reasons}"

    def _pairs_of(self, located: Located) -> list[PreferencePair]:
        self._rows_seen += 1
        try:
            if isinstance(located.row, RowError):
                raise located.row
            return FORMATS[self.format].parse(located.row)
        except RowError as error:
            if not self._skips(error):
                raise UserError(f"{located.where} {error.detail}") from None
            self.skipped[error.reason] += 1
            self._first_skipped.setdefault(error.reason, located.where.removeprefix(f"{self.name}: "))
            return []

    def _skips(self, error: RowError) -> bool:
        if self._on_bad == "auto":
            return FORMATS[self.format].published and not error.malformed
        return self._on_bad == "skip"

    def _nothing_found(self, other_dimensions: set[str]) -> str:
        if other_dimensions:
            found = ", ".join(sorted(other_dimensions))
            return f"{self.name}: no pairs of the dimension {self._dimension!r}, there is {found}"
        return f"{self.name}: no usable pairs; {self.skip_report().removeprefix(f'{self.name}: ')}"


def write_pairs(path: str | os.PathLike[str], pairs: Iterable[PreferencePair]) -> int:
    """Write pairs as JSON lines, gzipped if the name ends in .gz, whole or not at all; return how many.

    The bytes depend on the pairs alone. `load_preferences` reads them back, and so does `datasets`. UserError for
    another kind of name, or for no pairs.
    """
    target = Path(path)
    if not target.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{target}: pairs are written as .jsonl or .jsonl.gz")
    count = 0
    with atomic_path(target) as temporary, temporary.open("wb") as raw:
        # A gzip header holds a file name and a time unless they are blanked.
        packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if target.name.lower().endswith(".gz") else raw
        with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as handle:
            for pair in pairs:
                count += 1
                handle.write(json.dumps(pair.to_row(), ensure_ascii=False) + "\n")
        if not count:
            raise UserError(f"{target}: there are no pairs to write")
    return count


def _first_format(name: str, rows: RowSource, *, skip_malformed: bool) -> str:
    """Format of the first row that can be read as one."""
    for located in rows:
        try:
            if isinstance(located.row, RowError):
                raise located.row
            return detect_format(located.row)
        except RowError as error:
            if not skip_malformed:
                raise UserError(f"{located.where} {error.detail}") from None
    raise UserError(f"{name}: no row of a known format ({', '.join(FORMATS)})")
