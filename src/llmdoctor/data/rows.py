"""Rows of data files, of data sets on the Hugging Face hub, and in memory, each with the place it came from."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO, cast

from llmdoctor.data.formats import RowError
from llmdoctor.errors import UserError
from llmdoctor.files import sha256_file

BUILTIN = Path(__file__).with_name("builtin")
GIVEN = "pairs in memory"
"""What rows that came from no file are called."""
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


class Located(NamedTuple):
    """A row, or why there is none at this place."""

    part: str
    """The source and what is counted in it: `FILE: line`."""
    number: int
    row: dict[str, Any] | RowError

    @property
    def where(self) -> str:
        """The place, as an error names it."""
        return f"{self.part} {self.number}"


class RowSource(Protocol):
    """Rows that can be read again and again, each time from the first."""

    def __iter__(self) -> Iterator[Located]: ...

    def identity(self) -> dict[str, str]:
        """What the rows are, for a fingerprint."""
        ...


def open_rows(source: str | os.PathLike[str], *, split: str, streaming: bool) -> RowSource:
    """Rows of a file, a folder of files, `builtin:NAME`, or a hub data set `owner/name[/folder][:config][@revision]`.

    `split` picks the files of a folder whose names tell a split, or the split of a hub data set; a single file is
    read whole. `streaming=False` downloads a hub data set first. UserError if there is no such source.
    """
    text = os.fspath(source)
    if text.startswith("builtin:"):
        return FileRows([_builtin_file(text)])
    path = Path(text).expanduser()
    with reading(path):
        if path.is_dir():
            return FileRows(_files_of_split(path, split), root=path)
        if path.exists():
            return FileRows([path])
    hub = _HUB_ID.fullmatch(text) if isinstance(source, str) else None
    if hub and not text.lower().endswith((*ROW_SUFFIXES, ".txt", ".gz")):
        return HubRows(hub, split=split, streaming=streaming)
    raise UserError(f"{text}: no such file or folder (a data set on the Hugging Face hub is written owner/name)")


class FileRows:
    """Rows of local files, one file after the other."""

    def __init__(self, paths: list[Path], root: Path | None = None) -> None:
        for path in paths:
            if not path.name.lower().endswith(ROW_SUFFIXES):
                raise UserError(f"{path}: unknown kind of file, expected one of {', '.join(ROW_SUFFIXES)}")
        self._paths = paths
        self._root = root
        self._digests: dict[tuple[Path, int, int], str] = {}

    def __iter__(self) -> Iterator[Located]:
        for path in self._paths:
            yield from read_rows(path)

    def identity(self) -> dict[str, str]:
        """SHA-256 of each file's content, keyed by its name inside the folder (a lone file's name does not count)."""
        return {
            path.relative_to(self._root).as_posix() if self._root else "file": self._digest(path)
            for path in self._paths
        }

    def _digest(self, path: Path) -> str:
        with reading(path):
            status = path.stat()
            key = (path, status.st_size, status.st_mtime_ns)
            if key not in self._digests:
                self._digests[key] = sha256_file(path)
        return self._digests[key]


class SizedRows(Protocol):
    """Rows in memory: a list of mappings, or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class GivenRows:
    """Rows that are in memory already; they are not copied."""

    def __init__(self, rows: SizedRows) -> None:
        expected = f"expected a path, a name, a list of rows or a datasets.Dataset, not this {type(rows).__name__}"
        if isinstance(rows, Mapping):
            raise UserError(
                f"{expected}; of several splits name one, as in data['train'], and put a single row in a list"
            )
        if not isinstance(rows, Iterable):
            raise UserError(expected)
        if not isinstance(rows, Sized):
            raise UserError(f"{expected}, which may be read only once; make it a list first: list(…)")
        self._rows = rows

    def __iter__(self) -> Iterator[Located]:
        if not len(self._rows):
            raise UserError(f"{GIVEN}: there are none")
        for number, row in enumerate(self._rows, start=1):
            problem = RowError("not a mapping", f"is a {type(row).__name__}, expected named columns", malformed=True)
            yield Located(f"{GIVEN}: row", number, dict(row) if isinstance(row, Mapping) else problem)

    def identity(self) -> dict[str, str]:
        """A digest of the rows as they are now."""
        total = hashlib.sha256()
        for row in self._rows:
            columns = dict(row) if isinstance(row, Mapping) else row
            total.update(json.dumps(columns, sort_keys=True, default=str).encode() + b"\n")
        return {"given": total.hexdigest()}


# owner/name, then optionally a folder of it, a configuration and a revision.
_HUB_ID = re.compile(
    r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<folder>[\w./-]+))?(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
)


class HubRows:
    """Rows of one split of a data set on the Hugging Face hub, pinned to the commit that it had when opened."""

    def __init__(self, spec: re.Match[str], *, split: str, streaming: bool) -> None:
        self._name = spec.string
        self._where = {"id": spec["id"], "folder": spec["folder"] or "", "config": spec["config"] or "", "split": split}
        with self._hub_errors():
            import datasets
            from huggingface_hub import HfApi

            # A full commit id needs no look-up, so a data set in the cache works offline.
            pinned = spec["revision"] if re.fullmatch(r"[0-9a-f]{40}", spec["revision"] or "") else None
            self._revision: str = pinned or HfApi().dataset_info(spec["id"], revision=spec["revision"]).sha or "main"
            self._rows = datasets.load_dataset(
                spec["id"],
                name=spec["config"],
                data_dir=spec["folder"],
                split=split,
                revision=self._revision,
                streaming=streaming,
            )

    def __iter__(self) -> Iterator[Located]:
        index = 0
        with self._hub_errors():
            for index, row in enumerate(self._rows, start=1):
                yield Located(f"{self._name}: row", index, row)
        if not index:
            raise UserError(f"{self._name}: no rows in the split {self._where['split']!r}")

    def identity(self) -> dict[str, str]:
        """Id, folder, configuration, split and commit."""
        return {**self._where, "revision": self._revision}

    @contextmanager
    def _hub_errors(self) -> Iterator[None]:
        try:
            yield
        except (UserError, TypeError, AttributeError, NameError, ImportError):
            raise
        # The hub's libraries raise errors of four packages and of the HTTP client of the day, with no common base.
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            if type(error).__name__ in ("DatasetNotFoundError", "RepositoryNotFoundError", "GatedRepoError"):
                reason = "no such file or folder here, and no data set of this name on the Hugging Face hub that you"
                raise UserError(f"{self._name}: {reason} may read (`hf auth login` opens private ones)") from error
            if isinstance(error, ValueError) and "split" in said.lower():
                raise UserError(f"{self._name}: {said}") from error
            reason = "not a local file or folder, and it could not be read from the Hugging Face hub"
            raise UserError(f"{self._name}: {reason} ({type(error).__name__}: {said[:200]})") from error


def read_rows(path: Path) -> Iterator[Located]:
    """Rows of one .json (an array, or one object a line), .jsonl or .parquet file; UserError if it has none."""
    count = 0
    with reading(path):
        for located in _parquet_rows(path) if path.name.lower().endswith(".parquet") else _text_rows(path):
            count += 1
            yield located
    if not count:
        raise UserError(f"{path} is empty: it has no rows")


def open_text(path: Path) -> TextIO:
    """Open a text file, gzipped or not, as UTF-8 with or without a byte order mark."""
    if path.name.lower().endswith(".gz"):
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig"))
    return path.open(encoding="utf-8-sig")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is read into one line for the user."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _text_rows(path: Path) -> Iterator[Located]:
    # Files named .json hold an array or, just as often, one object a line.
    if path.name.lower().endswith((".json", ".json.gz")):
        with open_text(path) as handle:
            scanner = _Scanner(handle)
            if scanner.peek() == "[":
                yield from _array_rows(path, scanner)
                return
    with open_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield Located(f"{path}: line", number, _parse_line(line))


def _parse_line(line: str) -> dict[str, Any] | RowError:
    try:
        # Without the line break an error's column is the one in the file.
        return _as_object(json.loads(line.rstrip("\r\n")))
    except (ValueError, RecursionError) as error:
        return RowError("not JSON", f"is not JSON ({_json_problem(error)})", malformed=True)


def _as_object(row: Any) -> dict[str, Any] | RowError:
    if isinstance(row, dict):
        return row
    return RowError("not an object", "is not a JSON object with named columns", malformed=True)


def _array_rows(path: Path, scanner: _Scanner) -> Iterator[Located]:
    """Objects of a JSON array, one at a time. A syntax error ends all: what follows it cannot be told apart."""
    number = 0
    try:
        scanner.take()
        separator = scanner.peek()
        while separator != "]":
            number += 1
            yield Located(f"{path}: item", number, _as_object(scanner.value()))
            separator = scanner.peek()
            if separator not in (",", "]"):
                found = f"found {separator!r}" if separator else "the file ends"
                raise ValueError(f"expected a comma or the end of the array, {found}")
            if separator == ",":
                scanner.take()
        scanner.take()
        if scanner.peek():
            raise ValueError("text after the end of the array")
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        # The scanner holds a part of the line, so it cannot name the column.
        problem = error.msg if isinstance(error, json.JSONDecodeError) else _json_problem(error)
        raise UserError(f"{path}: line {scanner.line(error)} is not JSON ({problem})") from None


class _Scanner:
    """Reads one JSON value at a time from a text file, and never holds more than that value and one block."""

    _BLOCK = 1 << 16
    _SPACE = re.compile(r"[ \t\r\n]*")

    def __init__(self, handle: TextIO) -> None:
        self._handle = handle
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._lines = 1

    def peek(self) -> str:
        """The next character that is not white space, or nothing at the end of the file."""
        while True:
            space = self._SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(self._BLOCK):
                return ""

    def take(self) -> None:
        """Step over the character that `peek` shows."""
        self.peek()
        self._at += 1

    def value(self) -> Any:
        """The next JSON value; ValueError if there is none."""
        self.peek()
        block = self._BLOCK
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                # Further text can mend only what goes wrong where the text stops.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                if not cut or not self._more(block):
                    raise
                block *= 2

    def line(self, error: Exception) -> int:
        """The line of `error`, or of where the scanner stands."""
        position = error.pos if isinstance(error, json.JSONDecodeError) else self._at
        return self._lines + self._text.count("\n", 0, position)

    def _more(self, size: int) -> bool:
        block = self._handle.read(size)
        if not block:
            return False
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + block
        self._at = 0
        return True


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _parquet_rows(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield Located(f"{path}: row", number, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _builtin_file(name: str) -> Path:
    stem = name.removeprefix("builtin:")
    paths = (path for path in sorted(BUILTIN.iterdir()) if path.name.endswith((".jsonl", ".jsonl.gz")))
    files = {path.name.partition(".")[0]: path for path in paths}
    if stem not in files:
        raise UserError(f"{name}: no such builtin data; there is {', '.join(f'builtin:{known}' for known in files)}")
    return files[stem]


# The words by which `datasets` knows a split in a name, and the split that each stands for.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Data files under a folder: those that are named after `split` or lie in a folder that is, or all where no name
    tells a split.
    """
    with reading(folder):
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.name.lower().endswith(ROW_SUFFIXES)
            # What `llmdoctor pairs` writes beside its pairs.
            and not path.name.endswith(".recipe.json")
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
    if not files:
        raise UserError(f"{folder}: no data files in this folder, expected some of {', '.join(ROW_SUFFIXES)}")
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    found = {name for name in splits.values() if name}
    if not found:
        return files
    wanted = _SPLITS.get(split, split)
    if wanted not in found:
        raise UserError(f"{folder}: no files of the split {split!r}, there is {', '.join(sorted(found))}")
    return [path for path in files if splits[path] == wanted]


def _split_of(path: Path) -> str | None:
    """The split that a path inside a folder tells, as `datasets` reads it: by a word of the innermost folder that has
    one (`hh/test`, `dev-2`), else of the file's name (`train-00000-of-00002.parquet`, `my_test.jsonl`).

    What the hub's files append to the word is a split of its own: `train_sft-00000-of-00001.parquet`.
    """
    for folder in reversed(path.parts[:-1]):
        if split := _split_word(folder):
            return split
    own = re.match(r"([a-z]+)_[a-z]\w*", path.name.lower())
    return own[0] if own and own[1] in _SPLITS else _split_word(path.name)


def _split_word(name: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)
