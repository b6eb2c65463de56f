from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdoctor.evaluation.equal_kl import equal_kl_mixture


def flat(kl, prompts=40, seeds=3):
    """The same KL for every prompt and seed."""
    return {f"p{index:03}": [kl] * seeds for index in range(prompts)}


def test_mixture_by_hand():
    """Target 5 between 2 and 6: weight (5 − 2) / (6 − 2) = ¾, so 90 of 120 answers and a mean KL of just 5."""
    mixture = equal_kl_mixture(5.0, [(flat(0.0), 0), (flat(2.0), 1), (flat(6.0), 2), (flat(9.0), 3)])
    assert (mixture.low, mixture.high, mixture.kl_low, mixture.kl_high) == (1, 2, 2.0, 6.0)
    assert mixture.weight == 0.75
    assert sum(map(sum, mixture.from_high.values())) == 90
    assert mixture.mean_kl == pytest.approx(5.0)
    assert not mixture.clamped


@pytest.mark.parametrize(
    ("target", "name", "clamped"),
    [(-1.0, "mild", True), (12.0, "strong", True), (1.0, "mild", False), (9.0, "strong", False)],
)
def test_beyond_the_points_the_nearest_stands_and_at_a_point_that_one(target, name, clamped):
    mixture = equal_kl_mixture(target, [(flat(1.0), "mild"), (flat(4.0), "middle"), (flat(9.0), "strong")])
    assert (mixture.low, mixture.high, mixture.clamped) == (name, name, clamped)
    assert mixture.mean_kl == mixture.kl_low == mixture.kl_high
    assert not any(map(any, mixture.from_high.values()))


@pytest.mark.parametrize(
    ("means", "target", "low", "high"),
    [
        ([0, 3, 2, 5], 2.5, 0, 1),  # the third spends less than the second did before it
        ([0, 3, 2, 5], 4, 1, 3),
        ([0, 3, 3, 5], 4, 1, 3),
        ([5, 2, 3, 0], 4, 2, 0),  # the same curve, knob the other way round
    ],
)
def test_the_staircase_leaves_out_points_that_go_back(means, target, low, high):
    mixture = equal_kl_mixture(target, [(flat(float(mean)), index) for index, mean in enumerate(means)])
    assert (mixture.low, mixture.high) == (low, high)


@given(
    st.dictionaries(st.text("xyz", min_size=1, max_size=3), st.integers(1, 4), min_size=1, max_size=15),
    st.floats(0.01, 0.99),
    st.integers(0, 50),
)
def test_shares_are_off_by_less_than_one_answer_and_repeat(sizes, weight, seed):
    points = [({prompt: [kl] * size for prompt, size in sizes.items()}, kl) for kl in (0.0, 1.0)]
    mixture = equal_kl_mixture(weight, points, seed=seed)
    assert mixture.weight == pytest.approx(weight)
    for prompt, size in sizes.items():
        assert len(mixture.from_high[prompt]) == size
        assert abs(sum(mixture.from_high[prompt]) - weight * size) < 1 + 1e-9
    total = sum(sizes.values())
    drawn = sum(map(sum, mixture.from_high.values()))
    assert abs(drawn - weight * total) < 1 + 1e-9
    assert mixture.mean_kl == pytest.approx(drawn / total)
    turned = [({prompt: kl[prompt] for prompt in sorted(kl, reverse=True)}, name) for kl, name in points]
    assert equal_kl_mixture(weight, turned, seed=seed) == mixture


def test_every_answer_is_equally_likely_to_come_from_the_higher_point():
    """400 lots at weight ⅓: each of 3 seeds of 5 prompts is high about 133 times (sd 9.4, ± 4), no seed favoured."""
    points = [(flat(0.0, prompts=5), 0), (flat(3.0, prompts=5), 1)]
    lots = [equal_kl_mixture(1.0, points, seed=seed).from_high for seed in range(400)]
    counts = np.sum([[lot[prompt] for prompt in sorted(lot)] for lot in lots], axis=0)
    assert counts.min() >= 133 - 38
    assert counts.max() <= 133 + 38


def test_one_lot_spreads_over_all_seeds():
    """Weight ⅓ of 3 seeds: each prompt gives one answer to the higher point, and not always that of the same seed."""
    mixture = equal_kl_mixture(1.0, [(flat(0.0), 0), (flat(3.0), 1)])
    by_seed = np.sum(list(mixture.from_high.values()), axis=0)
    assert by_seed.sum() == 40
    assert by_seed.min() >= 5


def test_the_realised_kl_is_near_the_target_and_is_that_of_the_answers_taken():
    """KL estimates as spread as real ones (sd as large as the mean), 320 prompts, 3 seeds, weight ½: the realised mean
    has an sd of about √(½ · 5² + ½ · 10² + 2.5²) / √960 = 0.27, so it is within 1.1 of the target."""
    rng = np.random.default_rng(2)
    low = {f"p{index}": rng.normal(5, 5, 3).tolist() for index in range(320)}
    high = {f"p{index}": rng.normal(10, 10, 3).tolist() for index in range(320)}
    mixture = equal_kl_mixture(7.5, [(low, "low"), (high, "high")])
    taken = [value for values in mixture.take(low, high).values() for value in values]
    assert mixture.mean_kl == pytest.approx(np.mean(taken))
    assert mixture.mean_kl == pytest.approx(7.5, abs=1.1)


def test_take_picks_the_texts_of_the_chosen_points():
    points = [(flat(0.0, 2, 2), "low"), (flat(1.0, 2, 2), "high")]
    mixture = equal_kl_mixture(0.5, points)
    texts = [{prompt: [f"{name} {prompt} {seed}" for seed in range(2)] for prompt in kl} for kl, name in points]
    for prompt, picked in mixture.take(*texts).items():
        for seed, text in enumerate(picked):
            side = "high" if mixture.from_high[prompt][seed] else "low"
            assert text == f"{side} {prompt} {seed}"


def test_a_mixtures_kl_is_at_most_the_mixture_of_kls():
    """What the bound rests on, by exact sums over random distributions of 6 outcomes."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        low, high, patient = rng.dirichlet(np.ones(6), size=3)
        weight = rng.random()
        mixed = (1 - weight) * low + weight * high

        def kl(policy, patient=patient):
            return np.sum(policy * np.log(policy / patient))

        assert kl(mixed) <= (1 - weight) * kl(low) + weight * kl(high) + 1e-12


@pytest.mark.parametrize(
    ("target", "points", "message"),
    [
        (math.nan, [(flat(1.0), 0)], "kl_target must be finite, got nan"),
        (1.0, [], "at least one point"),
        (1.0, [({}, 0)], "KL estimates at point 0 holds no prompt"),
        (1.0, [({"p": [math.nan]}, 0)], "KL estimates at point 0 of prompt 'p' contains NaN"),
        (1.0, [({"p": [1.0]}, 0), ({"p": [math.inf]}, 1)], "mean KLs must be finite"),
        (1.0, [({"p": [1.0]}, 0), ({"q": [1.0]}, 1)], "prompt 'p' is only in point 0"),
        (1.0, [({"p": [1.0]}, 0), ({"p": [1.0, 2.0]}, 1)], "'p' has 1 seeds in point 0 and 2 in point 1"),
    ],
)
def test_what_cannot_be_mixed_is_refused(target, points, message):
    with pytest.raises(ValueError, match=message):
        equal_kl_mixture(target, points)
