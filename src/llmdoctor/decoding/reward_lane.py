"""A reward model that follows a search token by token.

Shapes: B rows, K candidates, N tokens of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from llmdoctor.decoding.guides import LaneSpec
from llmdoctor.decoding.lane import Lane
from llmdoctor.models.reward_model import RewardModel

_TREE_PIECE = 64
"""Tokens of a tree that are read at once: who sees whom is a table of them by all columns."""


class RewardLane:
    """A reward model with its cache over the rows alive. Call inside `torch.inference_mode()`.

    Args:
        model: the reward model.
        prompts: B lists of its encoder's ids.
        room: tokens that will be appended.

    Attributes:
        rewards: [B] of the prompts alone.
    """

    def __init__(self, model: RewardModel, prompts: list[list[int]], room: int) -> None:
        self._lane = Lane(LaneSpec(model.model, model.encoder, cast(Any, model.head)), prompts, room)
        self.rewards: Tensor = self._lane.prefill()[:, 0]
        self._candidates: Tensor | None = None
        self._fork: tuple[Lane, list[int]] | None = None

    def peek(self, candidates: Tensor) -> Tensor:
        """Rewards [B, K] of appending each of K tokens [B, K] to each row, in one forward pass; nothing is appended."""
        self._settle()
        hidden = self._lane.peek(candidates)
        self._candidates = candidates
        return self._lane.outputs(hidden)[..., 0]

    def advance(self, tokens: Tensor) -> None:
        """Append one token [B] to every row; one that was just peeked at costs nothing."""
        if self._candidates is not None:
            same = self._candidates == tokens[:, None]
            if bool(same.any(-1).all()):
                self._lane.accept(same.int().argmax(-1))
                self._candidates = None
                return
        self._settle()
        self._lane.step(tokens)

    def weigh(self, tokens: Tensor, parents: Sequence[int]) -> Tensor:
        """Rewards [B, N] of each row with the branches behind it that end at N tokens [B, N]; nothing is appended.

        `parents` has of each token, after those before it, its parent's number in the tree; −1 follows the row.
        """
        self._settle()
        found = []
        for start in range(0, len(parents), _TREE_PIECE):
            part = slice(start, start + _TREE_PIECE)
            found.append(self._lane.outputs(self._lane.grow(tokens[:, part], parents[part]))[..., 0])
        self._lane.forget()
        return torch.cat(found, dim=1)

    def extend(self, places: list[int], segments: list[list[int]]) -> Tensor:
        """Rewards [M] of appending M segments, none empty, to the rows at M places; nothing is appended as yet."""
        self._settle()
        width = max(map(len, segments))
        tokens = torch.zeros(len(segments), width, dtype=torch.long)
        mask = torch.zeros(len(segments), width, dtype=torch.long)
        for order, segment in enumerate(segments):
            tokens[order, : len(segment)] = torch.tensor(segment)
            mask[order, : len(segment)] = 1
        fork = self._lane.fork(places, width)
        hidden = fork.feed(tokens, mask.to(self._lane.device))
        last = torch.tensor([len(segment) - 1 for segment in segments], device=hidden.device)
        self._fork = fork, places
        return self._lane.outputs(hidden[torch.arange(len(segments), device=hidden.device), last])[:, 0]

    def commit(self, orders: list[int]) -> None:
        """Append, of the segments of the last `extend`, those with these numbers; at most one to each row."""
        if self._fork is not None and orders:
            fork, places = self._fork
            self._lane.absorb(fork, orders, [places[order] for order in orders])
            if self._lane.has_holes:
                self._lane.pack()
        self._fork = None

    def keep(self, places: list[int]) -> None:
        """Make the rows those at `places`."""
        self._settle()
        self._lane.keep(places)

    def _settle(self) -> None:
        if self._candidates is not None:
            self._lane.forget()
            self._candidates = None
        self._fork = None
