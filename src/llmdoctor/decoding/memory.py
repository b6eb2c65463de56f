"""What decoders do where memory does not suffice: fewer rows together, and an error for one that is too long alone."""

from __future__ import annotations

import ctypes
import logging
import sys
from typing import TYPE_CHECKING

import torch

from llmdoctor.errors import UserError

if TYPE_CHECKING:
    from llmdoctor.decoding.row import Row

_log = logging.getLogger(__name__)


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is what the error says."""
    # But for CUDA's own allocator torch raises a plain RuntimeError, whose text is all there is to know it by.
    texts = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def give_back() -> None:
    """Give back what is free but kept for later: torch's memory of a GPU, and the C library's where it can do that.

    What a training step had taken is of no use to the decoding after it, whose tensors have other sizes.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps blocks of up to 32 MiB; other libraries have no such function.
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def let_go(rows: int) -> None:
    """Give free memory back, and say that `rows` rows go on together.

    Call it where the error is gone, and with it the frames that hold the tensors.
    """
    give_back()
    _log.warning("Out of memory: going on with %d rows at a time.", rows)


def give_up(row: Row, error: Exception, *, alone: bool) -> None:
    """End a row that memory cannot hold by itself with an error, and say so.

    Raises:
        UserError: it is `alone`, the only one that was asked for.
    """
    told = (
        f"out of memory with a single prompt of {len(row.prompts[0])} tokens; use a smaller model, a shorter prompt, "
        "fewer doctors, no draft model or bfloat16"
    )
    if alone:
        raise UserError(told) from error
    _log.warning("Prompt %s ends with an error: %s.", row.request.id or row.index + 1, told)
    row.finish("error")
