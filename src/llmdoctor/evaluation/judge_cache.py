"""Replies of a chat judge on disk, so that no question is paid for twice."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmdoctor.errors import UserError

_APPLICATION = 0x6C6C6D64  # "llmd", so that another program's database is told from ours
_SCHEMA = 1
_BUSY_S = 60.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a chat model answered. `declined`: the endpoint itself says that it was refused or filtered.

    `metered` is False where the endpoint did not count tokens and the counts are a quarter of the characters.
    """

    text: str
    declined: bool
    input_tokens: int
    output_tokens: int
    metered: bool


class JudgeCache:
    """Replies by key in one SQLite file, which threads and processes may share. A reply is on disk once `put` returns.

    A process killed at any moment leaves whole replies only.

    Args:
        path: made if absent, with its folder; None keeps replies in memory.

    Raises:
        UserError: the file is no cache of ours, has another schema, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            # The default journal, not WAL: the cache stays one file that can be copied.
            self._connection = sqlite3.connect(
                self.path or ":memory:", timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._claim()
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"judge cache {path}: cannot be opened ({error}); name another file") from error

    def get(self, key: str) -> Reply | None:
        """The reply stored under `key`."""
        found = self._run("SELECT reply FROM replies WHERE key = ?", key)
        return Reply(**json.loads(found[0][0])) if found else None

    def put(self, key: str, reply: Reply) -> None:
        """Store a reply; one that another process stored first under the same key stays."""
        self._run("INSERT OR IGNORE INTO replies VALUES (?, ?)", key, json.dumps(asdict(reply)))

    def __len__(self) -> int:
        return int(self._run("SELECT COUNT(*) FROM replies")[0][0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _run(self, statement: str, *values: str) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"judge cache {self.path}: cannot be used ({error})") from error

    def _claim(self) -> None:
        # One writer at a time decides whether the file is new.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            application, schema = (
                self._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            if not self._connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                self._connection.execute(
                    "CREATE TABLE replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"
                )
                self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                self._connection.execute(f"PRAGMA user_version = {_SCHEMA}")
            elif application != _APPLICATION:
                raise UserError(f"judge cache {self.path}: this is another program's database; name another file")
            elif schema != _SCHEMA:
                raise UserError(
                    f"judge cache {self.path}: has schema {schema}, this version reads {_SCHEMA}; name another file"
                )
        except BaseException:
            self._connection.execute("ROLLBACK")
            self._connection.close()
            raise
        self._connection.execute("COMMIT")
