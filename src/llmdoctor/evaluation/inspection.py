"""What a set of token rewards looks like: one pass over its rows, numbers out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from llmdoctor.errors import UserError
from llmdoctor.rewards.store import SIDES

THETAS = np.round(np.linspace(0.0, 1.0, 101), 2)
HISTOGRAM_BINS = 25
_COLUMNS = ("ids", "tokens", "pos_logps", "neg_logps", "importance", "rewards")

Row = Mapping[str, Any]
Counts = npt.NDArray[np.int64]


@dataclass(slots=True)
class SideStats:
    """Counts over the responses of one side, or of both.

    `above_theta[i]` is the number of tokens with importance > THETAS[i]; `histogram` counts importance in equal bins
    of 0…1.
    """

    responses: int = 0
    complete: int = 0
    tokens: int = 0
    kept: int = 0
    agreeing: int = 0
    kept_agreeing: int = 0
    above_theta: Counts = field(default_factory=lambda: np.zeros(len(THETAS), np.int64))
    histogram: Counts = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, np.int64))

    @property
    def kept_ratio(self) -> float:
        """Share of tokens with a reward; NaN without tokens."""
        return self.kept / self.tokens if self.tokens else float("nan")

    @property
    def agreement(self) -> float:
        """Share of kept tokens that the good face likes in a chosen response, or the bad face in a rejected one."""
        return self.kept_agreeing / self.kept if self.kept else float("nan")

    @property
    def agreement_all(self) -> float:
        """As `agreement`, over all tokens."""
        return self.agreeing / self.tokens if self.tokens else float("nan")

    @property
    def kept_at(self) -> list[float]:
        """Share of tokens with importance > θ, for each θ of THETAS."""
        return [int(number) / max(1, self.tokens) for number in self.above_theta]

    def add(self, row: Row, side: str) -> None:
        """Count one response."""
        pos, neg, importance, rewards = (
            np.asarray(row[f"{side}_{name}"], np.float64)
            for name in ("pos_logps", "neg_logps", "importance", "rewards")
        )
        kept = rewards != 0
        agrees = np.sign(pos - neg) == (1 if side == "chosen" else -1)
        self.responses += 1
        self.complete += bool(row[f"{side}_terminal"])
        self.tokens += len(rewards)
        self.kept += int(kept.sum())
        self.agreeing += int(agrees.sum())
        self.kept_agreeing += int((agrees & kept).sum())
        below = np.bincount(np.searchsorted(THETAS, importance, side="left"), minlength=len(THETAS) + 1)
        self.above_theta += len(importance) - np.cumsum(below)[:-1]
        self.histogram += np.histogram(importance, bins=HISTOGRAM_BINS, range=(0.0, 1.0))[0]

    def __add__(self, other: SideStats) -> SideStats:
        """Counts of both."""
        return SideStats(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True, slots=True)
class TokenType:
    """A vocabulary entry: its surface text, how often it occurs, its mean reward over all occurrences (kept or not)."""

    text: str
    count: int
    mean_reward: float


class _TokenTypes:
    """Counts and reward sums by token id."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.counts: Counts = np.zeros(0, np.int64)
        self.sums: npt.NDArray[np.float64] = np.zeros(0)

    def add(self, ids: list[int], tokens: list[str], rewards: list[float]) -> None:
        if not ids:
            return
        size = max(max(ids) + 1, len(self.counts))
        self.counts = np.pad(self.counts, (0, size - len(self.counts)))
        self.sums = np.pad(self.sums, (0, size - len(self.sums)))
        self.counts += np.bincount(ids, minlength=size)
        self.sums += np.bincount(ids, weights=rewards, minlength=size)
        for token_id, text in zip(ids, tokens, strict=True):
            self.texts.setdefault(token_id, text)

    def ranked(self, min_count: int) -> list[TokenType]:
        """Types seen at least `min_count` times, most rewarded first."""
        frequent = np.flatnonzero(self.counts >= max(1, min_count)).tolist()
        types = [TokenType(self.texts[i], int(self.counts[i]), float(self.sums[i] / self.counts[i])) for i in frequent]
        return sorted(types, key=lambda token: (-token.mean_reward, -token.count, token.text))


@dataclass(frozen=True, slots=True)
class Inspection:
    """The figures of a rewards store, and some of its rows drawn at random."""

    chosen: SideStats
    rejected: SideStats
    most_rewarded: list[TokenType]
    most_punished: list[TokenType]
    min_count: int
    examples: list[Row]

    @property
    def pairs(self) -> int:
        """Number of preference pairs."""
        return self.chosen.responses

    @property
    def overall(self) -> SideStats:
        """Both sides together."""
        return self.chosen + self.rejected


def _check(row: Row, number: int) -> None:
    for side in SIDES:
        missing = [name for name in (*_COLUMNS, "terminal") if f"{side}_{name}" not in row]
        if missing or "prompt" not in row:
            lacking = "prompt" if "prompt" not in row else f"{side}_{missing[0]}"
            raise UserError(f"rewards row {number} has no column `{lacking}`; got {', '.join(sorted(row))}")
        lengths = {name: len(row[f"{side}_{name}"]) for name in _COLUMNS}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise UserError(f"rewards row {number}: columns of the {side} response differ in length ({shown})")


def inspect_rewards(
    rows: Iterable[Row], *, examples: int = 12, top: int = 12, min_count: int | None = None, seed: int = 0
) -> Inspection:
    """Go once over the rows of a rewards store, which may be larger than memory.

    Args:
        examples: how many rows to keep as examples, drawn uniformly with `seed`, in file order.
        top: length of the lists of most rewarded and most punished token types.
        min_count: occurrences below which a token type is not listed; by default 5, or 1 in 5,000 tokens if more.

    Raises:
        UserError: no rows, a column is missing, or columns of one response differ in length.
    """
    stats = {side: SideStats() for side in SIDES}
    types = _TokenTypes()
    rng = random.Random(seed)
    sample: list[tuple[int, Row]] = []
    number = 0
    for number, row in enumerate(rows, start=1):
        _check(row, number)
        for side in SIDES:
            stats[side].add(row, side)
            types.add(row[f"{side}_ids"], row[f"{side}_tokens"], row[f"{side}_rewards"])
        if len(sample) < examples:
            sample.append((number, row))
        elif (place := rng.randrange(number)) < examples:
            sample[place] = (number, row)
    if number == 0:
        raise UserError("the rewards store is empty: there are no pairs to inspect")
    least = max(5, (stats["chosen"].tokens + stats["rejected"].tokens) // 5000) if min_count is None else min_count
    ranked = types.ranked(least)
    return Inspection(
        chosen=stats["chosen"],
        rejected=stats["rejected"],
        most_rewarded=[token for token in ranked if token.mean_reward > 0][:top],
        most_punished=[token for token in reversed(ranked) if token.mean_reward < 0][:top],
        min_count=least,
        examples=[row for _, row in sorted(sample, key=lambda entry: entry[0])],
    )
