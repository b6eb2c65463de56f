"""Peak memory of the process that asks, and of its device."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_of_process() -> int:
    """Bytes that were resident at most. Linux's own counter, because getrusage's begins with the parent's peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_where(device: torch.device) -> int:
    """Bytes at most so far where models on that device are: allocated on a GPU, else resident in this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_of_process()
