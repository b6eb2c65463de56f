"""The guided distribution and the warpers on it, as pure functions.

Source: LLMdoctor (arXiv 2601.10416), guided decoding; the ratio form is this project's (docs/concepts.md).
Shapes: B rows, V vocabulary, D doctors. What is one number a row may be on the host: then the device is not waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmdoctor.decoding.device import sent


def guided_scores(
    patient: Tensor,
    doctors: Sequence[Tensor],
    alpha: Tensor,
    betas: Tensor,
    references: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """α · z_patient + Σ_i β_i · (z_doctor_i [− z_ref_i]); its softmax is π_dec.

    Logits stand for log-probabilities here: they differ by a constant per row and model, which the softmax removes.

    Args:
        patient: [B, V] logits.
        doctors: D tensors [B, V] of logits.
        alpha: [B].
        betas: [B, D]. Where a row's β_i is 0, doctor i has no part in it, whatever it says: with α = 1 the row is
            the patient's logits, bit for bit.
        references: D entries; a tensor [B, V] makes doctor i's part the ratio form, None the product form.

    Returns:
        [B, V] float32 scores. A row is NaN where a model's logits are.
    """
    patient = patient.float()
    pairs = list(zip(doctors, references or [None] * len(doctors), strict=True))
    scores = _weighted_sum(patient, pairs, alpha, betas)
    if bool(scores.amax(-1).isfinite().all()) and bool((alpha > 0).all()):
        return scores
    # Somewhere −inf met 0 or −inf and gave NaN. Where a doctor and its reference exclude a token alike, the doctor has
    # nothing to say about it; what the patient excludes stays excluded at any α.
    scores = _weighted_sum(patient, [_without_shared_exclusions(*pair) for pair in pairs], alpha, betas)
    return scores.masked_fill(patient == -torch.inf, -torch.inf)


def _weighted_sum(
    patient: Tensor, pairs: Sequence[tuple[Tensor, Tensor | None]], alpha: Tensor, betas: Tensor
) -> Tensor:
    scores = patient if bool((alpha == 1).all()) else sent(alpha, patient.device)[:, None] * patient
    for index, (doctor, reference) in enumerate(pairs):
        beta = betas[:, index, None]
        silent = beta == 0
        term = doctor.float() if reference is None else doctor.float() - reference.float()
        if bool(silent.any()):
            term = term.masked_fill(sent(silent, term.device), 0.0)
        scores = torch.addcmul(scores, sent(beta, term.device), term)
    return scores


def _without_shared_exclusions(doctor: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if reference is None:
        return doctor, None
    shared = (doctor == -torch.inf) & (reference == -torch.inf)
    return doctor.masked_fill(shared, 0.0), reference.masked_fill(shared, 0.0)


def penalise_repetition(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative scores of `seen` [B, V] by `penalty` [B] (CTRL, arXiv 1909.05858)."""
    penalty = sent(penalty, scores.device)[:, None]
    penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen & (penalty != 1.0), penalised, scores)


def warp(scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Temperature, then top-k, top-p and min-p, each with a value per row; excluded tokens become −inf.

    Args:
        scores: [B, V], up to a constant per row.
        temperature: [B] > 0.
        top_k: [B] tokens kept; 0 is off. Ties with the k-th are kept.
        top_p: [B] in (0, 1]; keeps the smallest set of most likely tokens whose mass reaches it; 1 is off.
        min_p: [B] in [0, 1); drops tokens below this share of the most likely one's probability; 0 is off.

    Returns:
        [B, V] scores whose softmax is the distribution to sample from.
    """
    vocabulary, device = scores.shape[-1], scores.device
    scores = scores / sent(temperature, device)[:, None]
    if bool((top_k > 0).any()):
        widest = min(int(top_k.max()), vocabulary)
        best = scores.topk(widest, dim=-1).values
        kept = sent(top_k, device)[:, None]
        kth = best.gather(-1, kept.clamp(min=1, max=widest) - 1)
        scores = scores.masked_fill((scores < kth) & (kept > 0), -torch.inf)
    rows = (top_p < 1.0).nonzero()[:, 0]
    if rows.numel():
        most = sent(top_p[rows, None], device)
        rows = sent(rows, device)
        ordered, order = scores[rows].sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        drop = before >= most
        drop[:, 0] = False
        ordered = ordered.masked_fill(drop, -torch.inf)
        scores = scores.clone()
        scores[rows] = torch.full_like(ordered, -torch.inf).scatter(-1, order, ordered)
    if bool((min_p > 0).any()):
        # Of a row without such a limit the logarithm is −∞, and nothing is below that.
        limit = scores.amax(-1, keepdim=True) + sent(min_p.log(), device)[:, None]
        scores = scores.masked_fill(scores < limit, -torch.inf)
    return scores
