"""Pairs and their token rewards to padded tensors.

Shapes: B pairs, 2B responses, P prompt tokens (left-padded), L completion tokens (right-padded), T columns: P + L, or
when packed the longest prompt with both of its responses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.rewards.store import SIDES

SCORES_A_TOKEN = 1000
"""Attention scores that cost as much as the rest of a token's training step, measured on the shipped model with eager
attention on a CPU: there 50 prompt and 2 × 256 completion tokens take longer in one row than in two. For wider models
and fused attention it is more, so packing would pay a little longer than it is used."""

SCORES_A_TOKEN_IN_MEMORY = 256
"""Attention scores that take as much memory, kept for the backward pass by eager attention, as the rest of a token
does: about 10 bytes a head and 40 a hidden dimension and layer, for heads of 64. Wider heads are fewer, and take
less."""


class RewardCollator:
    """Rows of a reward store to one batch: the B chosen responses first, then the B rejected ones.

    Prompts are encoded without any face, as the doctor will see them when it decodes, padded on the left; completions
    are padded on the right. So completions begin in the same column of every row.

    Example, one pair with a prompt of ids [5, 6] and responses [7, 8, 2] and [9]:

        in:  {"prompt": "[…]", "chosen_ids": [7, 8, 2], "chosen_rewards": [0.9, 0, 0.7], "chosen_terminal": True,
              "rejected_ids": [9], "rejected_rewards": [-0.8], "rejected_terminal": False}
        out: {"input_ids": [[5, 6, 7, 8, 2], [5, 6, 9, 0, 0]],
              "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
              "completion_mask": [[1, 1, 1], [1, 0, 0]],
              "token_rewards": [[0.9, 0, 0.7], [-0.8, 0, 0]],
              "terminal": [True, False],
              "divergence": [0],       # number of tokens that both responses of a pair share at their start
              "prompt_width": 2}

    Packed, the pair is one row (see `models.packing`), and all else stays as it is:

        out: {"input_ids": [[5, 6, 7, 8, 2, 9]],
              "attention_mask": [[1, 1, 1, 1, 1, 1]],
              "prompt_width": None, …}

    `ref_logps` [2B, L] is added where rows carry `chosen_ref_logps` and `rejected_ref_logps`.

    Args:
        encoder: of the doctor's tokenizer.
        max_prompt_length: keep only the last so many prompt tokens.
        packed: put both responses of a pair behind one prompt, for models that read such rows (`Doctor.packs_pairs`),
            in the batches where that costs less: in all where responses are not much longer than prompts.
    """

    def __init__(self, encoder: ChatEncoder, max_prompt_length: int | None = None, packed: bool = False) -> None:
        self.encoder = encoder
        self.max_prompt_length = max_prompt_length
        self.packed = packed

    def prompt_ids(self, row: dict[str, Any]) -> list[int]:
        """Ids of the row's prompt, cut from the left to `max_prompt_length`."""
        ids = self.encoder.prompt_ids(json.loads(row["prompt"]))
        return ids if self.max_prompt_length is None else ids[-self.max_prompt_length :]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate B rows."""
        prompts = [self.prompt_ids(row) for row in rows]
        chosen, rejected = ([list(row[f"{side}_ids"]) for row in rows] for side in SIDES)
        length = max(map(len, chosen + rejected))
        width = max(map(len, prompts))
        alone = [[*prompt, *completion] for prompt, completion in zip(prompts * 2, chosen + rejected, strict=True)]
        behind = [[*row, *completion] for row, completion in zip(alone[: len(rows)], rejected, strict=True)]
        side_by_side = tokens_worth(len(alone), width + length)
        packed = self.packed and tokens_worth(len(behind), max(map(len, behind))) < side_by_side
        if packed:
            input_ids, attention_mask = _filled(behind)
        else:
            input_ids, attention_mask = _filled(alone, [width - len(prompt) for prompt in prompts * 2])
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": _filled(chosen + rejected)[1].bool(),
            "token_rewards": self._padded(rows, "rewards", length),
            "terminal": torch.tensor([bool(row[f"{side}_terminal"]) for side in SIDES for row in rows]),
            "divergence": torch.tensor([_common_prefix(row["chosen_ids"], row["rejected_ids"]) for row in rows]),
            "prompt_width": None if packed else width,
        }
        if f"{SIDES[0]}_ref_logps" in rows[0]:
            batch["ref_logps"] = self._padded(rows, "ref_logps", length)
        return batch

    @staticmethod
    def _padded(rows: Sequence[dict[str, Any]], name: str, length: int) -> Tensor:
        values = [row[f"{side}_{name}"] for side in SIDES for row in rows]
        padded = torch.zeros(len(values), length)
        for index, value in enumerate(values):
            padded[index, : len(value)] = torch.as_tensor(value, dtype=torch.float32)
        return padded


def in_parts(
    batch: dict[str, Any], most_tokens: int, *, keeps_scores: bool = False
) -> list[tuple[list[int], dict[str, Any]]]:
    """A collated batch as several, each of at most about `most_tokens` tokens with their padding, or of one pair.

    Pairs of similar length come together, and padding that a part does not need is left off. A mean over the batch's
    pairs is the parts' means, weighted by how many pairs each has.

    Args:
        batch: what a `RewardCollator` made.
        most_tokens: how many.
        keeps_scores: attention keeps all scores of a row, as eager attention does; then a token of a row of c columns
            counts as 1 + c / 256.

    Returns:
        Of each part the places of its pairs in the batch, and the part.
    """
    scores = SCORES_A_TOKEN_IN_MEMORY if keeps_scores else math.inf
    pairs = len(batch["completion_mask"]) // 2
    if tokens_worth(len(batch["input_ids"]), batch["input_ids"].shape[1], scores) <= most_tokens:
        return [(list(range(pairs)), batch)]
    packed = batch["prompt_width"] is None
    rows = 1 if packed else 2
    lengths = batch["attention_mask"].sum(-1).view(rows, pairs).amax(0)
    parts: list[list[int]] = []
    longest = 0
    for place in lengths.argsort(descending=True, stable=True).tolist():
        if not parts or tokens_worth((len(parts[-1]) + 1) * rows, longest, scores) > most_tokens:
            parts.append([])
            longest = int(lengths[place])
        parts[-1].append(place)
    return [(part, _part(batch, torch.tensor(part), pairs)) for part in parts]


def tokens_worth(rows: int, columns: int, scores_a_token: float = SCORES_A_TOKEN) -> float:
    """What reading a batch takes, in tokens of a short one. Scores grow with the square of a row's columns."""
    return rows * columns * (1 + columns / scores_a_token)


def _part(batch: dict[str, Any], pairs: Tensor, count: int) -> dict[str, Any]:
    """The batch of some of the `count` pairs."""
    both = torch.cat([pairs, count + pairs])
    width = batch["prompt_width"]
    rows = both if width is not None else pairs
    completion = batch["completion_mask"][both]
    length = int(completion.sum(-1).max())
    used = batch["attention_mask"][rows].any(0).nonzero()[:, 0]
    # Of rows that are not packed the labels are the columns behind the prompt, as many as the longest completion has.
    columns = slice(int(used[0]), int(used[-1]) + 1 if width is None else width + length)
    part: dict[str, Any] = {
        "input_ids": batch["input_ids"][rows, columns],
        "attention_mask": batch["attention_mask"][rows, columns],
        "completion_mask": completion[:, :length],
        "token_rewards": batch["token_rewards"][both, :length],
        "terminal": batch["terminal"][both],
        "divergence": batch["divergence"][pairs],
        "prompt_width": None if width is None else width - columns.start,
    }
    if "ref_logps" in batch:
        part["ref_logps"] = batch["ref_logps"][both, :length]
    return part


def _filled(rows: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, columns] with every row from its column in `starts` on, zeros around."""
    starts = starts or [0] * len(rows)
    ids = torch.zeros(
        len(rows), max(start + len(row) for start, row in zip(starts, rows, strict=True)), dtype=torch.long
    )
    mask = torch.zeros_like(ids)
    for index, (start, row) in enumerate(zip(starts, rows, strict=True)):
        ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, start : start + len(row)] = 1
    return ids, mask


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
