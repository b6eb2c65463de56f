"""The guided distribution, its warpers against transformers' own, and the draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmdoctor.decoding.guidance import guided_scores, penalise_repetition, warp

INF = math.inf


def logits(rows: int, vocabulary: int = 40, seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def column(*values: float) -> Tensor:
    return torch.tensor(values)


def log_softmax(scores: Tensor) -> Tensor:
    return scores.double().log_softmax(-1)


# The product and the ratio


def test_the_product_and_the_ratio_are_the_formula() -> None:
    """π_dec ∝ π_patient^α · π_1^β₁ · (π_2 / π_ref)^β₂, in float64; logits in place of log-probs change nothing."""
    patient, one, two, ref = (logits(3, seed=seed) + 10 * seed for seed in range(4))
    alpha, betas = column(1.0, 0.5, 2.0), torch.tensor([[1.0, 0.5], [0.0, 2.0], [-0.5, 0.25]])
    scores = guided_scores(patient, [one, two], alpha, betas, [None, ref])
    expected = (
        alpha[:, None].double() * log_softmax(patient)
        + betas[:, :1].double() * log_softmax(one)
        + betas[:, 1:].double() * (log_softmax(two) - log_softmax(ref))
    ).log_softmax(-1)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(log_softmax(scores), expected, rtol=1e-5, atol=1e-4)


def test_by_hand() -> None:
    """Patient (½, ½), doctor (0.8, 0.2), reference (0.4, 0.6), β = 1: product 4 : 1, ratio 2 : ⅓ = 6 : 1."""
    patient, doctor, reference = (column(*p).log()[None] for p in ((0.5, 0.5), (0.8, 0.2), (0.4, 0.6)))
    one = column(1.0)
    product = guided_scores(patient, [doctor], one, one[:, None]).softmax(-1)
    torch.testing.assert_close(product, torch.tensor([[0.8, 0.2]]))
    ratio = guided_scores(patient, [doctor], one, one[:, None], [reference]).softmax(-1)
    torch.testing.assert_close(ratio, torch.tensor([[6 / 7, 1 / 7]]))


@pytest.mark.parametrize("doctor", [0.0, INF, -INF, math.nan], ids=str)
def test_beta_zero_is_the_patient_bit_for_bit_whatever_the_doctor_says(doctor: float) -> None:
    """Also beside a row that is guided, and with −inf among the patient's logits."""
    patient = logits(2)
    patient[:, 3] = -INF
    doctors = [torch.full((2, 40), doctor), logits(2, seed=1)]
    doctors[0][1] = 0.0
    scores = guided_scores(patient, doctors, torch.ones(2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), [None, None])
    assert torch.equal(scores[0], patient[0])
    assert not torch.equal(scores[1], patient[1])
    ratio = guided_scores(patient, doctors[:1], torch.ones(2), torch.zeros(2, 1), [doctors[0]])
    assert torch.equal(ratio, patient)


def test_no_doctor_is_the_patient_bit_for_bit() -> None:
    patient = logits(2)
    assert torch.equal(guided_scores(patient, [], torch.ones(2), torch.zeros(2, 0)), patient)


def test_half_and_half_of_equal_models_is_the_model() -> None:
    model = logits(2)
    scores = guided_scores(model, [model], column(0.5, 0.5), torch.full((2, 1), 0.5))
    torch.testing.assert_close(scores.softmax(-1), model.softmax(-1))


def test_the_product_of_equal_models_is_sharper_by_alpha_plus_beta() -> None:
    """α = β = 1 is the patient at temperature ½."""
    model = logits(1)
    scores = guided_scores(model, [model + 7.0], torch.ones(1), torch.ones(1, 1))
    torch.testing.assert_close(scores.softmax(-1), (2 * model).softmax(-1))


@pytest.mark.parametrize("beta", [0.5, 3.0, -2.0])
def test_a_doctor_that_equals_its_reference_cancels(beta: float) -> None:
    patient, doctor = logits(2), logits(2, seed=1)
    scores = guided_scores(patient, [doctor], torch.ones(2), torch.full((2, 1), beta), [doctor + 5.0])
    torch.testing.assert_close(scores.softmax(-1), patient.softmax(-1))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_the_patient_excludes_stays_excluded(alpha: float) -> None:
    """At any α, in both forms, and where the ratio alone would be infinite."""
    patient, doctor, reference = logits(1), logits(1, seed=1), logits(1, seed=2)
    patient[0, :3] = -INF
    reference[0, 1] = -INF
    doctor[0, 2] = reference[0, 2] = -INF
    for references in (None, [reference]):
        scores = guided_scores(patient, [doctor], column(alpha), torch.ones(1, 1), references)
        assert scores[0, :3].tolist() == [-INF] * 3
        assert bool(scores[0, 3:].isfinite().all())


def test_what_the_doctor_excludes_is_excluded_while_it_has_a_say() -> None:
    patient, doctor = logits(2), logits(2, seed=1)
    doctor[:, 0] = -INF
    scores = guided_scores(patient, [doctor], torch.ones(2), torch.tensor([[0.5], [0.0]]))
    assert scores[0, 0] == -INF
    assert scores[1, 0] == patient[1, 0]
    assert not bool(scores.isnan().any())


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_where_doctor_and_reference_exclude_alike_the_others_decide(alpha: float) -> None:
    """Token 0 is out for doctor 1 and its reference: its score is α·z + β₂·z₂, on the scale of the other tokens."""
    patient, one, ref, two = (logits(2, seed=seed) for seed in range(4))
    one[0, 0] = ref[0, 0] = -INF
    scores = guided_scores(patient, [one, two], torch.full((2,), alpha), torch.full((2, 2), 0.5), [ref, None])
    torch.testing.assert_close(scores[0, 0], alpha * patient[0, 0] + 0.5 * two[0, 0])
    finite = guided_scores(
        patient[:, 1:],
        [one[:, 1:], two[:, 1:]],
        torch.full((2,), alpha),
        torch.full((2, 2), 0.5),
        [ref[:, 1:], None],
    )
    torch.testing.assert_close(scores[:, 1:], finite)


def test_a_broken_doctor_shows_in_its_rows_only() -> None:
    patient, doctor = logits(3), logits(3, seed=1)
    whole = guided_scores(patient, [doctor], torch.ones(3), torch.ones(3, 1))
    doctor[1, 5] = math.nan
    scores = guided_scores(patient, [doctor], torch.ones(3), torch.ones(3, 1))
    assert bool(scores[1].isnan().any())
    assert torch.equal(scores[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_mixed_in_float32(dtype: torch.dtype) -> None:
    patient, doctor = logits(2).to(dtype), logits(2, seed=1).to(dtype)
    alpha, betas = torch.full((2,), 0.7), torch.full((2, 1), 0.3)
    scores = guided_scores(patient, [doctor], alpha, betas, [patient])
    assert torch.equal(scores, guided_scores(patient.float(), [doctor.float()], alpha, betas, [patient.float()]))


# Warpers


def settings(rows: int, **values: float) -> dict[str, Tensor]:
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return {name: torch.tensor([values.get(name, default)] * rows) for name, default in neutral.items()}


WARPERS: list[tuple[dict[str, float], Callable[[], list[Any]]]] = [
    ({"temperature": 0.7}, lambda: [TemperatureLogitsWarper(0.7)]),
    ({"top_k": 1}, lambda: [TopKLogitsWarper(1)]),
    ({"top_k": 7}, lambda: [TopKLogitsWarper(7)]),
    ({"top_k": 1000}, lambda: [TopKLogitsWarper(1000)]),
    ({"top_p": 0.9}, lambda: [TopPLogitsWarper(0.9)]),
    ({"top_p": 0.01}, lambda: [TopPLogitsWarper(0.01)]),
    ({"min_p": 0.1}, lambda: [MinPLogitsWarper(0.1)]),
    (
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
        lambda: [TemperatureLogitsWarper(1.5), TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.02)],
    ),
]


@pytest.mark.parametrize(("values", "reference"), WARPERS)
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_warpers_equal_those_of_transformers(
    values: dict[str, float], reference: Callable[[], list[Any]], spread: float
) -> None:
    scores = logits(16, spread=spread)
    expected = LogitsProcessorList(reference())(torch.zeros(16, 1, dtype=torch.long), scores.clone())
    torch.testing.assert_close(warp(scores, **settings(16, **values)), expected)


def test_warping_leaves_its_input_alone() -> None:
    scores = logits(2)
    before = scores.clone()
    warp(scores, **settings(2, temperature=0.5, top_k=5, top_p=0.5, min_p=0.1))
    assert torch.equal(scores, before)


def test_settings_that_are_off_change_nothing() -> None:
    scores = logits(2)
    assert torch.equal(warp(scores, **settings(2)), scores)


def test_settings_per_row_equal_row_by_row() -> None:
    scores = logits(6)
    mixed = {
        "temperature": column(1.0, 0.5, 2.0, 1.0, 1.0, 0.7),
        "top_k": torch.tensor([0, 3, 0, 1, 50, 10]),
        "top_p": column(1.0, 0.5, 0.9, 1.0, 0.3, 0.8),
        "min_p": column(0.0, 0.1, 0.0, 0.5, 0.0, 0.05),
    }
    together = warp(scores, **mixed)
    for row in range(6):
        alone = warp(scores[row : row + 1], **{name: value[row : row + 1] for name, value in mixed.items()})
        assert torch.equal(together[row], alone[0])
    assert torch.equal(together[0], scores[0])


def test_ties_with_the_kth_token_are_kept() -> None:
    warped = warp(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), **settings(1, top_k=1))
    assert warped.tolist() == [[-INF, 2.0, 2.0, -INF]]


def test_top_p_by_hand() -> None:
    """Masses .5, .3, .2: 0.5 is reached by the first alone, 0.51 needs the second."""
    scores = column(0.2, 0.5, 0.3).log()[None]
    assert warp(scores, **settings(1, top_p=0.5)).isfinite().tolist() == [[False, True, False]]
    assert warp(scores, **settings(1, top_p=0.51)).isfinite().tolist() == [[False, True, True]]


def test_excluded_tokens_stay_excluded_through_every_warper() -> None:
    scores = logits(2)
    scores[:, :5] = -INF
    warped = warp(scores, **settings(2, temperature=2.0, top_k=38, top_p=0.99, min_p=1e-6))
    assert bool((warped[:, :5] == -INF).all())
    assert not bool(warped.isnan().any())


def test_a_constant_per_row_changes_no_warped_distribution() -> None:
    scores = logits(4)
    values = settings(4, temperature=0.8, top_k=12, top_p=0.9, min_p=0.05)
    shifted = warp(scores + 25.0, **values).softmax(-1)
    torch.testing.assert_close(shifted, warp(scores, **values).softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3])
def test_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    scores = logits(3)
    scores[0, 4] = 0.0
    ids = torch.tensor([[4, 4, 9], [0, 1, 2], [39, 38, 39]])
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores.clone())
    torch.testing.assert_close(penalise_repetition(scores, seen, torch.full((3,), penalty)), expected)


def test_repetition_penalties_per_row() -> None:
    scores, seen = torch.tensor([[2.0, -2.0, -INF]] * 3), torch.tensor([[True, True, True]] * 3)
    penalised = penalise_repetition(scores, seen, column(1.0, 2.0, 4.0))
    assert penalised.tolist() == [[2.0, -2.0, -INF], [1.0, -4.0, -INF], [0.5, -8.0, -INF]]
