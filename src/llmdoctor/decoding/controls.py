"""The settings of a batch as tensors on the host, where asking for them does not wait for a device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmdoctor.decoding.device import sent
from llmdoctor.decoding.row import Row


class Controls:
    """Per-row settings as tensors [B] (betas [B, D]); seen tokens [B, V] are on the device of the logits."""

    _NAMES = ("alpha", "betas", "temperature", "greedy", "top_k", "top_p", "min_p", "penalty", "onset")

    def __init__(self, rows: Sequence[Row], names: Sequence[str], device: torch.device, width: int) -> None:
        requests = [row.request for row in rows]
        params = [request.sampling for request in requests]

        def tensor(values: list[Any], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype)

        self.device = device
        self.alpha = tensor([request.alpha for request in requests])
        self.betas = tensor([[request.beta_of(name) for name in names] for request in requests])
        self.betas = self.betas.view(len(requests), len(names))
        self.onset = tensor([request.onset for request in requests])
        self.grows = any(request.onset for request in requests)
        self.temperature = tensor([p.temperature or 1.0 for p in params])
        self.greedy = tensor([p.temperature == 0 for p in params], torch.bool)
        self.top_k = tensor([p.top_k for p in params], torch.long)
        self.top_p = tensor([p.top_p for p in params])
        self.min_p = tensor([p.min_p for p in params])
        self.penalty = tensor([p.repetition_penalty for p in params])
        self.warps = any(
            p.temperature != 1 or p.top_k or p.top_p < 1 or p.min_p or p.repetition_penalty != 1 for p in params
        )
        self.penalises = any(p.repetition_penalty != 1.0 for p in params)
        self.seen = torch.zeros(len(rows), width if self.penalises else 0, dtype=torch.bool, device=device)
        if self.penalises:
            for place, row in enumerate(rows):
                self.seen[place, row.prompts[0] + row.completion.token_ids] = True

    def of(self, places: slice | list[int]) -> Controls:
        """The settings of some of the rows."""
        part = copy.copy(self)
        part.keep(places)
        return part

    def at(self, lengths: Sequence[int]) -> Controls:
        """The settings for the next token of rows that have said so many: their βs may still be growing."""
        if not self.grows:
            return self
        part = copy.copy(self)
        said = torch.tensor(lengths, dtype=self.betas.dtype)
        part.betas = self.betas * ((said + 1) / (self.onset + 1)).clamp(max=1.0)[:, None]
        return part

    def keep(self, places: slice | list[int]) -> None:
        """Drop the rows that are not in `places`."""
        for name in self._NAMES:
            setattr(self, name, getattr(self, name)[places])
        if self.penalises:
            self.seen = self.seen[places if isinstance(places, slice) else sent(places, self.device)]
