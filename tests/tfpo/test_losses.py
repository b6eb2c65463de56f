"""Balance and value losses by hand, and how they fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmdoctor.tfpo.losses import (
    branch_balance_loss,
    leaf_discrimination_loss,
    squared_error_loss,
    subtb_loss,
    value_discrimination_loss,
)


def loss_of(*potential: float, subtb_lambda: float = 1.0) -> float:
    g = torch.tensor([potential])
    return float(subtb_loss(g, torch.ones_like(g), subtb_lambda))


def test_all_sub_trajectories_alike() -> None:
    """g = 0, 1, 3: squares 1, 9, 4 of (0,1), (0,2), (1,2); mean 14/3, which is twice the sample variance 7/3."""
    assert loss_of(0, 1, 3) == pytest.approx(14 / 3)


def test_a_discount_of_one_half() -> None:
    """Weights ½, ¼, ½: (½·1 + ¼·9 + ½·4) / 1.25 = 3.8."""
    assert loss_of(0, 1, 3, subtb_lambda=0.5) == pytest.approx(3.8)


def test_lambda_zero_keeps_single_steps() -> None:
    """Steps 1 and 2: (1 + 4) / 2."""
    assert loss_of(0, 1, 3, subtb_lambda=0.0) == pytest.approx(2.5)
    assert loss_of(0, 1, 3, subtb_lambda=1e-7) == pytest.approx(2.5, rel=1e-5)


@pytest.mark.parametrize("subtb_lambda", [0.0, 0.5, 1.0])
def test_a_single_state_has_nothing_to_balance(subtb_lambda: float) -> None:
    g = torch.tensor([[5.0, 9.0]], requires_grad=True)
    loss = subtb_loss(g, torch.tensor([[1, 0]]), subtb_lambda)
    assert loss.tolist() == [0.0]
    loss.sum().backward()
    assert g.grad is not None
    assert g.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("subtb_lambda", [-0.1, 1.1, float("nan")])
def test_lambda_outside_its_range_is_refused(subtb_lambda: float) -> None:
    with pytest.raises(ValueError, match=r"subtb_lambda must lie in \[0, 1\], got"):
        loss_of(0, 1, subtb_lambda=subtb_lambda)


def test_value_discrimination_is_a_hinge() -> None:
    """γ = 0.5 and differences 1, 0.2, −1: losses 0, 0.3, 1.5; the last row has no pair."""
    preferred = torch.tensor([1.0, 0.2, 0.0, -7.0])
    other = torch.tensor([0.0, 0.0, 1.0, 7.0])
    valid = torch.tensor([True, True, True, False])
    loss = value_discrimination_loss(preferred, other, 0.5, valid)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.3, 1.5, 0.0]))
    assert float(value_discrimination_loss(preferred, other, 0.5)[3]) == 14.5


def test_value_discrimination_pushes_the_two_apart_equally() -> None:
    preferred, other = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    value_discrimination_loss(preferred, other, 0.5, torch.tensor([True, False])).sum().backward()
    assert preferred.grad is not None
    assert other.grad is not None
    assert preferred.grad.tolist() == [-1.0, 0.0]
    assert other.grad.tolist() == [1.0, 0.0]


def test_leaf_discrimination_by_hand() -> None:
    """β (c⁺ − c⁻) = ½ · 4 = 2 and ½ · (−4) = −2: log(1 + e⁻²) = 0.126928 and log(1 + e²) = 2.126928."""
    loss = leaf_discrimination_loss(torch.tensor([3.0, -1.0]), torch.tensor([-1.0, 3.0]), 0.5)
    torch.testing.assert_close(loss, torch.tensor([0.126928, 2.126928]), rtol=0, atol=1e-6)


def test_leaf_discrimination_pulls_the_leaves_apart_until_a_pair_is_done() -> None:
    """The gradient is ∓β σ(−β gap): ½ β at no gap, next to nothing at a gap of 100 nats, where it stays finite."""
    chosen, rejected = torch.tensor([0.0, 100.0], requires_grad=True), torch.zeros(2, requires_grad=True)
    leaf_discrimination_loss(chosen, rejected, 0.5).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.25, 0.0]), rtol=0, atol=1e-9)
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def squared_error(logps: Tensor, mask: list[list[int]]) -> Tensor:
    ref = torch.tensor([[-1.5, -1.0, -3.5], [0.0, 0.0, 0.0]])
    rewards = torch.tensor([[0.5, 0.0, -0.25], [0.0, 0.0, 0.0]])
    return squared_error_loss(logps, ref, rewards, torch.tensor(mask), 0.5)


def test_branch_balance_by_hand() -> None:
    """η = 0.5. c − R/η is 3 − 2 in row 0 and 1 − 4 in row 1, of two tokens: (1 + 3)² over a mean length of 1.5."""
    ratios, rewards = torch.tensor([[3.0, 9.0], [2.0, -1.0]]), torch.tensor([[1.0, 9.0], [0.5, 1.5]])
    mask = torch.tensor([[1, 0], [1, 1]])
    loss = branch_balance_loss(ratios, rewards, mask, 0.5)
    assert loss.tolist() == pytest.approx([16 / 1.5])
    whole = branch_balance_loss(ratios, rewards, mask, 0.5, length_normalize=False)
    assert whole.tolist() == pytest.approx([16.0])


def test_branch_balance_is_zero_at_the_tilted_reference_and_whatever_the_prompt_is_worth() -> None:
    """A constant of the prompt, log Z, drops out; answers of one prompt stand B rows apart."""
    rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, 4)
    log_z = torch.tensor([1.0, -2.0, 5.0]).repeat(2)[:, None] / 4
    assert branch_balance_loss(rewards / 0.3 - log_z, rewards, mask, 0.3).tolist() == pytest.approx([0, 0, 0], abs=1e-8)


def test_squared_error_by_hand() -> None:
    """log π̂/π_ref − r/η = 0.5 − 1, −1, 0.5 + 0.5: squares .25, 1, 1, mean .75; of the first two .625; of none 0."""
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-9.0, -9.0, -9.0]])
    torch.testing.assert_close(squared_error(logps, [[1, 1, 1], [0, 0, 0]]), torch.tensor([0.75, 0.0]))
    torch.testing.assert_close(squared_error(logps, [[1, 1, 0], [0, 0, 0]]), torch.tensor([0.625, 0.0]))


def test_squared_error_is_zero_at_the_tilted_reference() -> None:
    logps = torch.tensor([[-0.5, -1.0, -4.0], [0.0, 0.0, 0.0]])
    assert squared_error(logps, [[1, 1, 1], [1, 1, 1]]).tolist() == [0.0, 0.0]
