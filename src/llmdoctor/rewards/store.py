"""Token rewards on disk: a folder with a manifest and Parquet files that `datasets` opens.

    manifest.json           schema version, fingerprints of all inputs, faces, options, counts
    logps/00000.parquet …   shards of face log-likelihoods, the expensive part; each appears whole or not at all
    rewards.parquet         one row a pair: ids, tokens, log-likelihoods, importance, rewards, terminal flags

A row's columns, with `{side}` one of `chosen` and `rejected`: `index`, `prompt` (messages as JSON), `dimension`, and
`{side}_ids`, `{side}_tokens`, `{side}_pos_logps`, `{side}_neg_logps`, `{side}_terminal`; in rewards.parquet also
`{side}_importance` and `{side}_rewards`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmdoctor.errors import UserError, first_line
from llmdoctor.files import digest
from llmdoctor.rewards.faces import NO_FACES

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
REWARDS_NAME = "rewards.parquet"
_ANEW = "Delete that file and run the same `llmdoctor rewards` again: it is made anew from what was scored, in seconds."
SIDES = ("chosen", "rejected")

_FLOATS = pa.list_(pa.float32())
LOGPS_SCHEMA = pa.schema(
    [("index", pa.int64()), ("prompt", pa.string()), ("dimension", pa.string())]
    + [
        (f"{side}_{name}", kind)
        for side in SIDES
        for name, kind in (
            ("ids", pa.list_(pa.int32())),
            ("tokens", pa.list_(pa.string())),
            ("pos_logps", _FLOATS),
            ("neg_logps", _FLOATS),
            ("terminal", pa.bool_()),
        )
    ]
)
REWARDS_SCHEMA = pa.schema(
    list(LOGPS_SCHEMA) + [(f"{side}_{name}", _FLOATS) for side in SIDES for name in ("importance", "rewards")]
)


class RewardStore:
    """Finished token rewards.

    Attributes:
        folder: where they lie.
        manifest: what they were made from and how.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> RewardStore:
        """Read a folder written by stage 1.

        Raises:
            UserError: not such a folder, another schema, a run that has not finished, or a damaged file.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder} holds no token rewards: no {MANIFEST_NAME} (make them with `llmdoctor rewards`)")
        if not manifest.get("complete") or not (folder / REWARDS_NAME).is_file():
            raise UserError(f"{folder} is unfinished: run the same `llmdoctor rewards` again and it goes on")
        with readable(folder / REWARDS_NAME, _ANEW):
            pq.read_metadata(folder / REWARDS_NAME)
        return cls(folder, manifest)

    def __len__(self) -> int:
        return int(self.manifest["pairs"])

    @property
    def fingerprint(self) -> dict[str, str]:
        """Fingerprints of everything the rewards depend on."""
        return {**self.manifest["fingerprint"], "rewards": digest(self.manifest["reward_options"])}

    @property
    def has_token_rewards(self) -> bool:
        """Whether faces have read the pairs; else there are labels only."""
        return bool(self.manifest["faces"] != asdict(NO_FACES))

    @property
    def dimension(self) -> str:
        """What the faces differ in; "" where none has read the pairs."""
        return str(self.manifest["faces"]["name"]) if self.has_token_rewards else ""

    def rows(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Rows in the order of the data, read in blocks; UserError for a damaged file."""
        left = limit if limit is not None else len(self)
        with readable(self.folder / REWARDS_NAME, _ANEW):
            for batch in pq.ParquetFile(self.folder / REWARDS_NAME).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    if left <= 0:
                        return
                    left -= 1
                    yield row

    def dataset(self) -> Any:
        """The rewards as a `datasets.Dataset`; UserError for a damaged file."""
        from datasets import Dataset
        from datasets.exceptions import DatasetGenerationError

        with readable(self.folder / REWARDS_NAME, _ANEW):
            try:
                return Dataset.from_parquet(str(self.folder / REWARDS_NAME))
            except DatasetGenerationError as error:
                # It is raised in place of pyarrow's own.
                raise (error.__cause__ or error) from None


@contextmanager
def readable(path: Path, remedy: str) -> Iterator[None]:
    """Turn what is wrong with a Parquet file that is read inside into one line for the user, with what to do."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}). {remedy}") from error
    except OSError as error:
        # pyarrow's own, which have no number, are of what it read.
        if error.errno is not None:
            raise
        raise UserError(f"{path} is damaged ({first_line(error)}). {remedy}") from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, None if there is none; raises UserError for another schema or broken JSON."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {manifest.get('schema_version')}; this version reads {SCHEMA_VERSION}"
        )
    return manifest
