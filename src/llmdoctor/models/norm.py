"""Root mean square norm (arXiv 1910.07467), in few steps."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / √(mean x² + ε) · w over the last axis: [..., D] -> [..., D].

    Where nothing is learnt, torch's own takes twice as many small steps on a CPU (2.13), and those of all norms are a
    twentieth of a pass over a few rows. The numbers are the same but for the last bit.
    """
    if not x.is_cpu or torch.is_grad_enabled():
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    normed = x * torch.addcmul(_constant(eps), scale, scale, value=1 / x.shape[-1]).rsqrt_()
    if weight is not None:
        normed.mul_(weight)
    return normed.to(x.dtype)


@lru_cache(maxsize=8)
def _constant(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64)
