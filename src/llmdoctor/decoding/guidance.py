"""The guided distribution and the warpers on it, as pure functions.

Source: LLMdoctor (arXiv 2601.10416), guided decoding; the ratio form is this project's (docs/concepts.md).
Shapes: B rows, V vocabulary, D doctors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    scores = patient if bool((alpha == 1).all()) else alpha[:, None] * patient
    for index, (doctor, reference) in enumerate(pairs):
        beta = betas[:, index, None]
        term = doctor.float() if reference is None else doctor.float() - reference.float()
        silent = beta == 0
        if bool(silent.any()):
            term = term.masked_fill(silent, 0.0)
        scores = torch.addcmul(scores, beta, term)
    return scores


def _without_shared_exclusions(doctor: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if reference is None:
        return doctor, None
    shared = (doctor == -torch.inf) & (reference == -torch.inf)
    return doctor.masked_fill(shared, 0.0), reference.masked_fill(shared, 0.0)


def penalise_repetition(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative scores of `seen` [B, V] by `penalty` [B] (CTRL, arXiv 1909.05858)."""
    penalised = torch.where(scores > 0, scores / penalty[:, None], scores * penalty[:, None])
    return torch.where(seen & (penalty != 1.0)[:, None], penalised, scores)


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
    scores = scores / temperature[:, None]
    vocabulary = scores.shape[-1]
    if bool((top_k > 0).any()):
        widest = min(int(top_k.max()), vocabulary)
        best = scores.topk(widest, dim=-1).values
        kth = best.gather(-1, (top_k.clamp(min=1, max=widest) - 1)[:, None])
        scores = scores.masked_fill((scores < kth) & (top_k > 0)[:, None], -torch.inf)
    rows = (top_p < 1.0).nonzero()[:, 0]
    if rows.numel():
        ordered, order = scores[rows].sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        drop = before >= top_p[rows, None]
        drop[:, 0] = False
        kept = ordered.masked_fill(drop, -torch.inf)
        scores = scores.clone()
        scores[rows] = torch.full_like(kept, -torch.inf).scatter(-1, order, kept)
    if bool((min_p > 0).any()):
        limit = scores.amax(-1, keepdim=True) + min_p.clamp(min=torch.finfo(scores.dtype).tiny).log()[:, None]
        scores = scores.masked_fill((scores < limit) & (min_p > 0)[:, None], -torch.inf)
    return scores
