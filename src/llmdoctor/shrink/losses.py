"""How far a student's next-token distribution is from its teacher's. Pure functions of logits and states.

Where the student has a head for some tokens only, V are these. The teacher's p is then not normalised over them: what
it gives to all other tokens is lost to the student whatever it says. Σ_v runs over V, P = Σ_v p_v is 1 without a cut.

Shapes: M positions, D hidden size, V vocabulary. p is the teacher's distribution, q the student's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmdoctor.models.draft import CutHead
from llmdoctor.models.logps import LogitsHead, chunk_rows

Head = LogitsHead | CutHead


def overlap(
    logits: Tensor, teacher_logits: Tensor, log_normalisers: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """[M, V] twice -> acceptance Σ_v min(p_v, q_v), Σ_v p_v log(p_v / q_v) in nats, and P, [M] each, float32.

    The acceptance is the chance that a token drawn from q is accepted as one of p's by speculative sampling
    (arXiv 2211.17192, corollary 3.6), and without a cut one minus the total variation distance, where the second is
    KL(p ‖ q).

    Args:
        logits, teacher_logits: [M, V], any float dtype.
        log_normalisers: [M] the teacher's, over its whole vocabulary; None where V is the whole.
    """
    log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
    log_p = _log_p(teacher_logits, log_normalisers)
    p = log_p.exp()
    return torch.minimum(p, log_q.exp()).sum(-1), (p * (log_p - log_q)).sum(-1), p.sum(-1)


def loss_and_gradient(
    logits: Tensor, teacher_logits: Tensor, tv_weight: float, log_normalisers: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(1 − w) KL(p ‖ q) + w TV(p, q), and what it grows by with each logit z of q.

    KL is forward, from teacher to student (arXiv 1503.02531), TV = Σ_v max(p_v − q_v, 0) (arXiv 2310.08461), which
    falls short of the chance of a rejection by the constant 1 − P:

        ∂KL/∂z_v = P q_v − p_v        ∂TV/∂z_v = q_v (Σ_u q_u [q_u < p_u] − [q_v < p_v])

    Args:
        logits, teacher_logits: [M, V], any float dtype; worked on in float32.
        tv_weight: w in [0, 1].
        log_normalisers: as in `overlap`.

    Returns:
        [M] loss in nats (the KL part), [M, V] gradient; both float32.
    """
    log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
    log_p = _log_p(teacher_logits, log_normalisers)
    p = log_p.exp()
    # In place from here on: fresh blocks of this size cost as much as the arithmetic on them.
    kl = torch.linalg.vecdot(p, log_p.sub_(log_q))
    q = log_q.exp_()
    gradient = torch.sub(q, p, out=log_p)
    tv = torch.linalg.vector_norm(gradient, ord=1, dim=-1) / 2
    gradient.mul_(1 - tv_weight)
    if log_normalisers is not None:
        lost = 1 - p.sum(-1)
        # Σ_v max(p_v − q_v, 0) is less than Σ_v max(q_v − p_v, 0) by what p lacks.
        tv -= lost / 2
        gradient.addcmul_(q, lost[:, None], value=tv_weight - 1)
    if tv_weight:
        below = p.gt_(q).mul_(q)
        gradient.addcmul_(q, below.sum(-1, keepdim=True), value=tv_weight).sub_(below, alpha=tv_weight)
    return (1 - tv_weight) * kl + tv_weight * tv, gradient


def distillation_loss(
    hidden: Tensor,
    teacher_hidden: Tensor,
    head: Head,
    tv_weight: float = 0.0,
    log_normalisers: Tensor | None = None,
) -> Tensor:
    """`loss_and_gradient` of states under one frozen head, in chunks: no [M, V] tensor outlives its chunk.

    Args:
        hidden, teacher_hidden: [M, D] last hidden states of student and teacher.
        head: the teacher's, whole or cut, which the student shares; it gets no gradient.
        tv_weight, log_normalisers: as there.

    Returns:
        [M] float32. Gradients flow to `hidden`.
    """
    loss: Tensor = _SharedHeadDistillation.apply(hidden, teacher_hidden, head, tv_weight, log_normalisers)
    return loss


def mean_overlap(
    hidden: Tensor, teacher_hidden: Tensor, head: Head, log_normalisers: Tensor | None = None
) -> tuple[float, float, float]:
    """Sums over the M positions of what `overlap` gives, from states [M, D], in chunks."""
    total = torch.zeros(3, dtype=torch.float64)
    for part in _chunks(hidden, head):
        found = overlap(head.logits(hidden[part]), head.logits(teacher_hidden[part]), _of(log_normalisers, part))
        # Some devices have no float64.
        total += torch.stack([each.cpu().double().sum() for each in found])
    accepted, nats, mass = total.tolist()
    return accepted, nats, mass


def log_normalisers(hidden: Tensor, head: LogitsHead) -> Tensor:
    """States [M, D] -> [M] float32: log Σ_v exp of their logits, in chunks."""
    found = [head.logits(hidden[part]).logsumexp(-1) for part in _chunks(hidden, head)]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def _log_p(logits: Tensor, log_normalisers: Tensor | None) -> Tensor:
    if log_normalisers is None:
        return torch.log_softmax(logits, -1, dtype=torch.float32)
    return logits.float() - log_normalisers[:, None]


def _chunks(hidden: Tensor, head: Head) -> list[slice]:
    size = chunk_rows(head.weight)
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def _of(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]


class _SharedHeadDistillation(torch.autograd.Function):
    """The loss is one number a position, so its gradient to h is a vector, ready while the chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher_hidden: Tensor, head: Head, tv_weight: float, log_normalisers: Tensor | None
    ) -> Tensor:
        losses, jacobians = [], []
        for part in _chunks(hidden, head):
            teacher_logits = head.logits(teacher_hidden[part])
            with torch.enable_grad():
                h = hidden[part].detach().to(head.weight.dtype).requires_grad_()
                logits = head.logits(h)
            loss, gradient = loss_and_gradient(logits.detach(), teacher_logits, tv_weight, _of(log_normalisers, part))
            jacobians.append(torch.autograd.grad(logits, h, gradient)[0].to(hidden.dtype))
            losses.append(loss)
        ctx.save_for_backward(torch.cat(jacobians) if jacobians else hidden.new_zeros(hidden.shape))
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (jacobian,) = ctx.saved_tensors
        return (grads[0][:, None] * jacobian.float()).to(jacobian.dtype), None, None, None, None
