"""A key-value cache that is written in place, and little larger than what is in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_COUNT_COLUMNS = ("bloom", "mpt", "gpt_neo")

_STEP = 64
"""Columns that a full cache grows by, at least."""


class InPlaceLayer(DynamicLayer):
    """One layer's keys and values in buffers with room to grow.

    transformers' own layer concatenates, which copies the whole cache at every token and leaves the allocator with
    holes of every size. Room for all that may be appended would be as wrong: most answers end long before their limit.

    Args:
        room: tokens that will be appended at most, the first ones included, as far as is known; no more columns than
            that are made.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, H, t, D] states; returns views of everything so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._room -= key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            self._grow(key_states, value_states, end + self._spare(end))
        assert self._buffers is not None
        # Once a layer and token, where `narrow` is noticeably quicker than slices.
        keys, values = self._buffers
        keys.narrow(-2, start, end - start).copy_(key_states)
        values.narrow(-2, start, end - start).copy_(value_states)
        self.keys, self.values = keys.narrow(-2, 0, end), values.narrow(-2, 0, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` only."""
        if self._buffers is not None:
            end = self.get_seq_length()
            # Layers of a model that is spread over several devices are not where its tokens go in.
            indices = indices.to(self._buffers[0].device)
            self._buffers = (self._buffers[0][indices], self._buffers[1][indices])
            self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)

    def join(self, other: InPlaceLayer, voices: int, room: int) -> None:
        """Append the rows of `other` to each of the `voices` that the rows are of; the last columns stand in line.

        At most `room` more tokens will be appended afterwards.
        """
        width = max(self.keys.shape[-2], other.keys.shape[-2])
        self._room = room
        grown = []
        for own, theirs in ((self.keys, other.keys), (self.values, other.values)):
            # Zeros, not whatever memory held: what a row does not see is still multiplied, by weights of zero.
            counts = len(own) // voices, len(theirs) // voices
            buffer = own.new_zeros(voices, sum(counts), own.shape[1], width + self._spare(width), own.shape[3])
            buffer[:, : counts[0], :, width - own.shape[-2] : width] = own.unflatten(0, (voices, -1))
            buffer[:, counts[0] :, :, width - theirs.shape[-2] : width] = theirs.unflatten(0, (voices, -1))
            grown.append(buffer.flatten(0, 1))
        self._buffers = (grown[0], grown[1])
        self.keys, self.values = (buffer[:, :, :width] for buffer in grown)

    def move(self, rows: Tensor, sources: Tensor, targets: Tensor) -> None:
        """Copy the columns `sources` [N] of the rows at `rows` [N] to `targets` [N], all at once."""
        assert self._buffers is not None
        rows, sources, targets = (index.to(self._buffers[0].device) for index in (rows, sources, targets))
        for buffer in self._buffers:
            buffer[rows, :, targets] = buffer[rows, :, sources]

    def select_columns(self, columns: Tensor) -> None:
        """Make each row's columns those at `columns` [B, W], in that order."""
        assert self._buffers is not None
        index = columns.to(self._buffers[0].device)[:, None, :, None]
        states = [buffer.gather(2, index.expand(-1, buffer.shape[1], -1, buffer.shape[3])) for buffer in self._buffers]
        self._buffers = None
        self.keys, self.values = states[0][:, :, :0], states[1][:, :, :0]
        self.update(states[0], states[1])

    def _spare(self, columns: int) -> int:
        """How many columns to allocate behind so many. What is there is copied again at every quarter that is added."""
        # Columns that rows do not use, as guesses leave them, take up more room than was foreseen.
        left = self._room if self._room > 0 else _STEP
        return min(left, max(_STEP, columns // 4))

    def _grow(self, key_states: Tensor, value_states: Tensor, capacity: int) -> None:
        grown = []
        for states, old in ((key_states, self.keys), (value_states, self.values)):
            shape = (*states.shape[:2], capacity, states.shape[-1])
            buffer = torch.empty(shape, dtype=states.dtype, device=states.device)
            if old.numel():
                buffer[:, :, : old.shape[-2]] = old
            grown.append(buffer)
        self._buffers = (grown[0], grown[1])


def new_cache(config: Any, room: int) -> DynamicCache:
    """A cache for a model of `config`; layers of full attention are written in place, `room` tokens at most.

    Layers of other kinds (sliding window, linear attention, …) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [InPlaceLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def sees_everything(cache: DynamicCache, config: Any) -> bool:
    """Whether every layer is one of full attention, whose columns may be masked, dropped and reordered at will.

    Where distance is counted in columns (ALiBi, GPT-Neo's windows) a hole, or a guess beside another, would move what
    stands behind it.
    """
    full = all(isinstance(layer, InPlaceLayer) for layer in cache.layers)
    return full and config.model_type not in _COUNT_COLUMNS and not getattr(config, "alibi", False)
