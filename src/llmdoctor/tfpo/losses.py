"""The losses of stage 2, as pure functions that return one value per response or pair.

Sub-trajectory balance and its no-flow ablation, value discrimination, and what is asked of the two ends of a pair: by
the label (leaf) or by their rewards (branch).

Shapes: B responses or pairs, L completion tokens, N = L + 1 states. Source: LLMdoctor (arXiv 2601.10416), which has
neither leaf nor branch loss; SubTB(λ) after Madan et al. 2023 (arXiv 2209.12782). Every residual of a sub-trajectory
s_m … s_n is g_n − g_m (see `flows`), which makes the sum over all O(L²) of them a sum over states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def subtb_loss(potential: Tensor, states: Tensor, subtb_lambda: float = 1.0) -> Tensor:
    """Weighted mean of (g_n − g_m)² over all sub-trajectories 0 ≤ m < n ≤ L, weight λ^(n−m). Exact, O(N).

    λ = 1 weighs all alike and equals twice the sample variance of g; λ → 0 keeps single steps (detailed balance).

    Args:
        potential: [B, N] g_t.
        states: [B, N] mask of real states, a prefix of true in every row.
        subtb_lambda: λ in [0, 1]; 0 is taken as its limit, single steps.

    Returns:
        [B] float32, ≥ 0; 0 for a response with a single state.
    """
    if not 0.0 <= subtb_lambda <= 1.0:
        raise ValueError(f"subtb_lambda must lie in [0, 1], got {subtb_lambda}")
    mask = states.to(torch.bool)
    if subtb_lambda == 1.0:
        loss: Tensor = _MeanSquaredDifference.apply(potential.float(), mask)
        return loss
    g = potential.float().masked_fill(~mask, 0.0)
    if subtb_lambda == 0.0:
        both = mask[:, 1:] & mask[:, :-1]
        squared = (g[:, 1:] - g[:, :-1]).square().masked_fill(~both, 0.0)
        return squared.sum(-1) / both.sum(-1).clamp(min=1)
    count = mask.sum(-1)
    # Only differences count, and of centred values they keep the most digits.
    g = (g - g.sum(-1, keepdim=True) / count.clamp(min=1)[:, None]).masked_fill(~mask, 0.0)
    # float64: g drifts by hundreds of nats while its steps stay small, so g_n² − 2 g_n g_m + g_m² cancels.
    g = g.double()
    weight, first, second = _discounted_prefix_sums(g, mask, subtb_lambda)
    total = (g.square() * weight - 2.0 * g * first + second).masked_fill(~mask, 0.0).sum(-1).clamp(min=0.0)
    norm = weight.masked_fill(~mask, 0.0).sum(-1)
    return torch.where(count > 1, total / norm.clamp(min=torch.finfo(torch.float32).tiny), 0.0).float()


class _MeanSquaredDifference(torch.autograd.Function):
    """Mean of (g_n − g_m)² over all pairs of states, 2 Σ (g_t − ḡ)² / (N − 1), whose gradient is 4 (g_t − ḡ) / (N − 1).

    At the length of a response the time goes into calls, not arithmetic; as one node it takes two thirds of it.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(-1, keepdim=True)
        # Seen from the first state, then centred: N·Σg² − (Σg)² cancels catastrophically in float32, and so does the
        # mean of values that lie far from 0.
        g = torch.where(mask, g - g[:, :1], 0.0)
        centred = torch.where(mask, g - g.sum(-1, keepdim=True) / count, 0.0)
        scale = 2.0 / (count - 1).clamp(min=1)
        ctx.save_for_backward(centred, scale)
        return torch.linalg.vecdot(centred, centred) * scale[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        centred, scale = ctx.saved_tensors
        return centred * (2.0 * grad[:, None] * scale), None


def _discounted_prefix_sums(g: Tensor, mask: Tensor, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_{m<n} λ^{n−m} · (1, g_m, g_m²) for every n, each [B, N].

    The recurrence x_n = λ (x_{n−1} + u_{n−1}) is run in blocks: inside a block it is one small triangular product,
    between blocks a loop of N / block steps. No N × N tensor, and no division by λ^n that would underflow.
    """
    inputs = torch.stack([mask.to(g.dtype), g, g.square()])
    rows = inputs.shape[-1]
    block = min(128, rows)
    padding = (-rows) % block
    inputs = F.pad(inputs, (0, padding)).unflatten(-1, (-1, block))
    steps = torch.arange(block, device=g.device, dtype=g.dtype)
    lag = steps[:, None] - steps[None, :]
    # λ^{n−m} for m < n inside a block; exponents stay below the block length.
    kernel = torch.where(lag > 0, decay ** lag.clamp(min=0), torch.zeros_like(lag))
    inside = torch.einsum("nm,sbkm->sbkn", kernel, inputs)
    end = torch.einsum("m,sbkm->sbk", decay ** (block - steps), inputs)
    carry = torch.zeros_like(end[..., 0])
    carries = []
    for index in range(inputs.shape[2]):
        carries.append(carry)
        carry = carry * decay**block + end[..., index]
    carried = torch.stack(carries, dim=-1)[..., None] * decay**steps
    sums = (inside + carried).flatten(-2)[..., :rows]
    return sums[0], sums[1], sums[2]


def value_discrimination_loss(
    preferred_log_v: Tensor, dispreferred_log_v: Tensor, margin: float, valid: Tensor | None = None
) -> Tensor:
    """Hinge max(0, γ − (log V(s_t, y_w) − log V(s_t, y_l))) for two next tokens at the *same* state: [B].

    Args:
        preferred_log_v: [B] log V after the preferred token.
        dispreferred_log_v: [B] log V after the other token at that state.
        margin: γ in nats.
        valid: [B] false where no such pair exists; the loss is 0 there.
    """
    loss = F.relu(margin - (preferred_log_v.float() - dispreferred_log_v.float()))
    return loss if valid is None else loss.masked_fill(~valid.to(torch.bool), 0.0)


def leaf_discrimination_loss(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, beta: float) -> Tensor:
    """−log σ(β (c⁺ − c⁻)), c = Σ_t log π̂/π_ref of a response: [B].

    Both responses of a pair grow from one root, so a sub-trajectory leads from one leaf to the other through it. Its
    balance, c⁺ − c⁻ = (R⁺ − R⁻)/η at complete responses, holds no V: nothing absorbs what is asked there. The label
    says which side is larger, not by how much, hence the logistic loss in place of the square. As a function of the
    policy it is DPO's (arXiv 2305.18290, equation 7).

    Args:
        chosen_log_ratio: [B] c⁺ in nats.
        rejected_log_ratio: [B] c⁻ in nats.
        beta: how soon a pair counts as told apart; smaller asks for a larger difference.
    """
    return -F.logsigmoid(beta * (chosen_log_ratio.float() - rejected_log_ratio.float()))


def branch_balance_loss(
    log_ratios: Tensor, token_rewards: Tensor, completion_mask: Tensor, eta: float, *, length_normalize: bool = True
) -> Tensor:
    """(c − c′ − (R − R′)/η)², the balance of the sub-trajectory from one end of a pair to the other: [B].

    c = Σ_t log π̂/π_ref and R = Σ_t r_t of a response. It leads through the prompt that both share, so it holds no V;
    exact where both are complete, and where answers are cut at a length that is the same for all. On answers that the
    policy drew itself its gradient is REINFORCE's with the other answer as the baseline (Kool et al. 2019), towards
    π_ref · exp(R/η).

    Args:
        log_ratios, token_rewards: [2B, L] log π̂/π_ref and r_t; row i and row B + i answer the same prompt.
        completion_mask: [2B, L] true on real tokens.
        eta: reward temperature η.
        length_normalize: divide by the mean length of the two.
    """
    mask = completion_mask.to(torch.bool)
    open_balance = (log_ratios.float() - token_rewards.float() / eta).masked_fill(~mask, 0.0).sum(-1)
    one, other = open_balance.view(2, -1)
    loss = (one - other).square()
    if not length_normalize:
        return loss
    return loss / mask.sum(-1).view(2, -1).float().mean(0).clamp(min=1.0)


def squared_error_loss(
    per_token_logps: Tensor, ref_logps: Tensor, token_rewards: Tensor, completion_mask: Tensor, eta: float
) -> Tensor:
    """The no-flow ablation: mean over tokens of (log π̂/π_ref − r/η)², [B]. All inputs [B, L]."""
    mask = completion_mask.to(torch.bool)
    error = per_token_logps.float() - ref_logps.float() - token_rewards.float() / eta
    return error.square().masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
