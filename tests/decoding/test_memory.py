"""Memory: what is free is given back."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import pytest
import torch

from llmdoctor.decoding.memory import give_back


def resident() -> int:
    """Bytes of this process that stand in memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is free and can give it back")
def test_what_the_c_library_keeps_is_given_back() -> None:
    # A larger tensor that was freed makes it keep blocks of up to that size, and one that stays keeps the heap's end.
    large = torch.ones(1 << 22)
    del large
    blocks = [torch.ones(1 << 20) for _ in range(64)]
    stays = torch.ones(1 << 20)
    full = resident()
    blocks.clear()
    kept = resident()
    give_back()
    assert full - kept < 64 << 20, "nothing was kept that could have been given back"
    assert full - resident() > 200 << 20
    assert float(stays.sum()) == 1 << 20
