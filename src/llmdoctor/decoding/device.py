"""What passes between the host, which decides, and the device, which computes.

A GPU works through a queue. Asking it for a number, or sending it one in the usual way, waits until the queue is empty,
and from then on it stands still until more is in it. So settings stay on the host, where asking for them costs nothing,
and go over without waiting; and what the next step depends on comes back in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CPU_BLOCK = 16
"""Rows whose scores are worked on together on a CPU: a block's vocabulary-wide tensors then stay in its cache."""


def sent(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, or a tensor of them, as a tensor on the device, which is not waited for."""
    # Elsewhere what is sent would have to be kept until it has arrived; CUDA copies it first.
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=device.type == "cuda")


def blocks(scores: Tensor) -> Iterator[slice]:
    """Of scores [B, V] the rows to be worked on together: `CPU_BLOCK` of them on a CPU, elsewhere all."""
    size = CPU_BLOCK if scores.device.type == "cpu" else len(scores)
    for start in range(0, len(scores), size):
        yield slice(start, start + size)


def fetched(*columns: Tensor) -> list[list[float]]:
    """Tensors [B] of one device as lists, in one transfer; whole numbers must be below 2²⁴."""
    return torch.stack([column.float() for column in columns]).tolist()
