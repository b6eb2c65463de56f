"""How far a small model's next-token distribution is from its teacher's. Pure functions of logits and states.

Shapes: M positions, D hidden size, V vocabulary. p is the teacher's distribution, q the small model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmdoctor.models.logps import LogitsHead, chunk_rows


def overlap(logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """[M, V] twice -> acceptance Σ_v min(p_v, q_v) and KL(p ‖ q) in nats, [M] each, float32.

    The acceptance is the chance that a token drawn from q is accepted as one of p's by speculative sampling
    (arXiv 2211.17192, corollary 3.6), and one minus the total variation distance.
    """
    log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
    log_p = torch.log_softmax(teacher_logits, -1, dtype=torch.float32)
    p = log_p.exp()
    return torch.minimum(p, log_q.exp()).sum(-1), (p * (log_p - log_q)).sum(-1)


def loss_and_gradient(logits: Tensor, teacher_logits: Tensor, tv_weight: float) -> tuple[Tensor, Tensor]:
    """(1 − w) KL(p ‖ q) + w TV(p, q), and what it grows by with each logit z of q.

    KL is forward, from teacher to student (arXiv 1503.02531), TV = 1 − Σ_v min(p_v, q_v) (arXiv 2310.08461):

        ∂KL/∂z_v = q_v − p_v          ∂TV/∂z_v = q_v (Σ_u q_u [q_u < p_u] − [q_v < p_v])

    Args:
        logits, teacher_logits: [M, V], any float dtype; worked on in float32.
        tv_weight: w in [0, 1].

    Returns:
        [M] loss in nats (the KL part), [M, V] gradient; both float32.
    """
    log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
    log_p = torch.log_softmax(teacher_logits, -1, dtype=torch.float32)
    p = log_p.exp()
    # In place from here on: fresh blocks of this size cost as much as the arithmetic on them.
    kl = torch.linalg.vecdot(p, log_p.sub_(log_q))
    q = log_q.exp_()
    gradient = torch.sub(q, p, out=log_p)
    tv = torch.linalg.vector_norm(gradient, ord=1, dim=-1) / 2
    gradient.mul_(1 - tv_weight)
    if tv_weight:
        below = p.gt_(q).mul_(q)
        gradient.addcmul_(q, below.sum(-1, keepdim=True), value=tv_weight).sub_(below, alpha=tv_weight)
    return (1 - tv_weight) * kl + tv_weight * tv, gradient


def distillation_loss(hidden: Tensor, teacher_hidden: Tensor, head: LogitsHead, tv_weight: float = 0.0) -> Tensor:
    """`loss_and_gradient` of states under one frozen head, in chunks: no [M, V] tensor outlives its chunk.

    Args:
        hidden, teacher_hidden: [M, D] last hidden states of student and teacher.
        head: the teacher's, which the student shares; it gets no gradient.
        tv_weight: as there.

    Returns:
        [M] float32. Gradients flow to `hidden`.
    """
    loss: Tensor = _SharedHeadDistillation.apply(hidden, teacher_hidden, head, tv_weight)
    return loss


def mean_overlap(hidden: Tensor, teacher_hidden: Tensor, head: LogitsHead) -> tuple[float, float]:
    """Sums over the M positions of acceptance and KL (see `overlap`), from states [M, D], in chunks."""
    accepted = nats = 0.0
    chunk = chunk_rows(head.linear.weight)
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        a, k = overlap(head.logits(hidden[part]), head.logits(teacher_hidden[part]))
        accepted, nats = accepted + float(a.double().sum()), nats + float(k.double().sum())
    return accepted, nats


class _SharedHeadDistillation(torch.autograd.Function):
    """The loss is one number a position, so its gradient to h is a vector, ready while the chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher_hidden: Tensor, head: LogitsHead, tv_weight: float) -> Tensor:
        losses, jacobians = [], []
        chunk = chunk_rows(head.linear.weight)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            teacher_logits = head.logits(teacher_hidden[part])
            with torch.enable_grad():
                h = hidden[part].detach().to(head.linear.weight.dtype).requires_grad_()
                logits = head.logits(h)
            loss, gradient = loss_and_gradient(logits.detach(), teacher_logits, tv_weight)
            jacobians.append(torch.autograd.grad(logits, h, gradient)[0].to(hidden.dtype))
            losses.append(loss)
        ctx.save_for_backward(torch.cat(jacobians) if jacobians else hidden.new_zeros(hidden.shape))
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (jacobian,) = ctx.saved_tensors
        return (grads[0][:, None] * jacobian.float()).to(jacobian.dtype), None, None, None
