"""Faces: pairs of system prompts that make one patient behave well and badly."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from llmdoctor.errors import UserError
from llmdoctor.files import digest


@dataclass(frozen=True, slots=True)
class FacePair:
    """A positive and a negative system prompt that differ in one dimension of behaviour.

    Attributes:
        name: dimension and number of the paraphrase, e.g. "positive" or "positive#2".
    """

    name: str
    positive: str
    negative: str

    def fingerprint(self) -> str:
        """Fingerprint of the two texts; the name does not count."""
        return digest([self.positive, self.negative])


NO_FACES = FacePair("none", "", "")
"""Of pairs that no face reads: they have labels and no token rewards."""


def face_pairs(dimension: str, path: str | Path | None = None) -> list[FacePair]:
    """All paraphrases of a dimension's faces: from the shipped list, or from the user's YAML file of the same shape.

    Raises:
        UserError: unknown dimension, unreadable file, or an entry without `positive` and `negative` text.
    """
    source = str(path) if path else "the shipped faces"
    table = _read(Path(path)) if path else _shipped()
    if dimension not in table:
        raise UserError(
            f"no faces for the dimension {dimension!r} in {source}; it has: {', '.join(sorted(map(str, table)))}"
        )
    pairs = []
    for number, entry in enumerate(table[dimension], start=1):
        texts = [entry.get(key) if isinstance(entry, dict) else None for key in ("positive", "negative")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{source}: {dimension}, entry {number} needs two texts, `positive` and `negative`")
        positive, negative = (str(text).strip() for text in texts)
        if positive == negative:
            raise UserError(f"{source}: {dimension}, entry {number}: both faces are the same text")
        pairs.append(FacePair(dimension if number == 1 else f"{dimension}#{number}", positive, negative))
    return pairs


def _shipped() -> dict[str, Any]:
    text = files("llmdoctor.rewards").joinpath("faces.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no faces file {path}")
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if (
        not isinstance(table, dict)
        or not table
        or not all(isinstance(entries, list) and entries for entries in table.values())
    ):
        raise UserError(f"{path} must map each dimension to a list of {{positive: …, negative: …}} pairs")
    return table
