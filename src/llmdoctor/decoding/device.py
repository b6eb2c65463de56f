"""What passes between the host, which decides, and the device, which computes.

A GPU works through a queue. Asking it for a number, or sending it one in the usual way, waits until the queue is empty,
and from then on it stands still until more is in it. So settings stay on the host, where asking for them costs nothing,
and go over without waiting; and what the next step depends on comes back in one piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sent(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, or a tensor of them, as a tensor on the device, which is not waited for."""
    # Elsewhere what is sent would have to be kept until it has arrived; CUDA copies it first.
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=device.type == "cuda")


def fetched(*columns: Tensor) -> list[list[float]]:
    """Tensors [B] of one device as lists, in one transfer; whole numbers must be below 2²⁴."""
    return torch.stack([column.float() for column in columns]).tolist()
