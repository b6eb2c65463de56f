"""The norm against its definition in float64, and row by row."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llmdoctor.models.norm import rms_norm


def states(width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    scales = torch.logspace(-4, 3, 12, dtype=torch.float64)[:, None, None]
    # Not contiguous, as a part of a fused projection is not.
    return (torch.randn(12, 3, width + 32, generator=generator, dtype=torch.float64) * scales).to(dtype)[..., :width]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 64, 80, 576, 4096])
@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_what_it_is_defined_as(width: int, dtype: torch.dtype, weighted: bool) -> None:
    x, eps = states(width, dtype), 1e-5
    weight = torch.linspace(-1, 2, width, dtype=dtype) if weighted else None
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    exact = exact if weight is None else exact * weight.double()
    with torch.inference_mode():
        found = rms_norm(x, weight, eps)
    assert found.dtype == dtype
    assert found.shape == x.shape
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1.01 * torch.finfo(dtype).eps / 2)
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=1e-7 if dtype == torch.float16 else 0)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight = states(576, torch.bfloat16), torch.linspace(-1, 2, 576, dtype=torch.bfloat16)
    with torch.inference_mode():
        together = rms_norm(x, weight, 1e-5)
        for row in range(len(x)):
            assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-5)[0], together[row])
            assert torch.equal(rms_norm(x[row : row + 1, :1].contiguous(), weight, 1e-5)[0, 0], together[row, 0])


def test_zeros_stay_zeros_and_the_input_is_left_alone() -> None:
    x = states(64, torch.float32)
    x[0] = 0
    before = x.clone()
    with torch.inference_mode():
        found = rms_norm(x, torch.ones(64), 1e-5)
    assert not found[0].any()
    assert torch.equal(x, before)


def test_gradients_are_those_of_torch() -> None:
    weight = torch.linspace(-1, 2, 64, requires_grad=True)
    x = states(64, torch.float32).clone().requires_grad_()
    grads = [torch.autograd.grad(y.square().sum(), (x, weight))
             for y in (rms_norm(x, weight, 1e-5), F.rms_norm(x, (64,), weight, 1e-5))]  # fmt: skip
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)
