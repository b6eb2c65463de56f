from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdoctor.evaluation.ranking import ELO_PER_NAT, bradley_terry


def games(wins, losses, ties=0):
    values = [1.0] * wins + [0.0] * losses + [0.5] * ties
    return {f"p{index}": [value] for index, value in enumerate(values)}


def test_two_methods_by_hand():
    """30 wins, 10 losses, 20 ties: 40 : 20, with half a win added each way 40.5 : 20.5; 400 · log₁₀ of that."""
    ratings = bradley_terry({("new", "old"): games(30, 10, 20)}, "old", resamples=20)
    assert list(ratings) == ["new", "old"]
    assert ratings["new"].elo == pytest.approx(1000 + 400 * math.log10(40.5 / 20.5))
    assert ratings["old"] == (1000.0, 1000.0, 1000.0)


def test_odds_of_ten_to_one_are_400_points():
    ratings = bradley_terry({("a", "b"): games(1000, 100)}, "b", prior=1e-9, resamples=1, anchor_elo=0)
    assert ratings["a"].elo == pytest.approx(400)


def test_strengths_add_up_along_a_chain():
    """a beats b 3 : 1 and b beats c 3 : 1, a and c never meet: a is twice as far from c as b is."""
    outcomes = {("a", "b"): games(30, 10), ("c", "b"): games(10, 30)}
    ratings = bradley_terry(outcomes, "c", resamples=20)
    step = 400 * math.log10(30.5 / 10.5)
    assert [ratings[name].elo for name in "abc"] == pytest.approx([1000 + 2 * step, 1000 + step, 1000])


def test_a_method_that_never_loses_stays_finite():
    """n of n at prior ½: 400 · log₁₀(1 + 2n)."""
    ratings = bradley_terry({("a", "b"): games(300, 0)}, "b", resamples=20)
    assert ratings["a"].elo == pytest.approx(1000 + 400 * math.log10(601))
    assert ratings["a"].low == ratings["a"].high == pytest.approx(ratings["a"].elo)


@given(
    st.integers(2, 5),
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=40),
    st.sampled_from([0.05, 0.5, 2.0]),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_the_likelihood_is_at_its_maximum(count, values, prior, data):
    """At the maximum every method's expected wins equal its observed ones, pseudo-wins included."""
    names = [f"m{index}" for index in range(count)]
    pairs = [(names[index], names[index + 1]) for index in range(count - 1)]
    pairs += data.draw(st.lists(st.sampled_from(list(combinations(names, 2))), max_size=4, unique=True))
    outcomes: dict = {}
    for place, pair in enumerate(dict.fromkeys(pairs)):
        outcomes[pair] = {f"p{index}": [value] for index, value in enumerate(values) if index % (place + 1) == 0}
    ratings = bradley_terry(outcomes, names[0], prior=prior, resamples=1)
    surplus = dict.fromkeys(names, 0.0)
    for (first, second), by_seed in outcomes.items():
        flat = [value for seeds in by_seed.values() for value in seeds]
        expected = 1 / (1 + math.exp((ratings[second].elo - ratings[first].elo) / ELO_PER_NAT))
        gain = sum(flat) + prior - (len(flat) + 2 * prior) * expected
        surplus[first] += gain
        surplus[second] -= gain
    assert list(surplus.values()) == pytest.approx([0.0] * count, abs=1e-4)


def test_true_strengths_are_found_within_their_intervals():
    """Five methods 100 points apart, all pairs, 300 prompts with three seeds: bounds at 0.99 hold each truth."""
    rng = np.random.default_rng(3)
    true = {f"m{index}": 1000 + 100 * index for index in range(5)}
    outcomes = {}
    for one, two in combinations(true, 2):
        chance = 1 / (1 + 10 ** ((true[two] - true[one]) / 400))
        outcomes[one, two] = {f"p{index}": (rng.random(3) < chance).astype(float).tolist() for index in range(300)}
    ratings = bradley_terry(outcomes, "m0", level=0.99, resamples=300)
    assert list(ratings) == ["m4", "m3", "m2", "m1", "m0"]
    for name, elo in true.items():
        assert ratings[name].low <= elo <= ratings[name].high
        assert ratings[name].high - ratings[name].low < 150
    assert ratings == bradley_terry(outcomes, "m0", level=0.99, resamples=300)


def test_which_side_a_pair_is_told_from_does_not_matter():
    outcomes = {("a", "b"): games(7, 3, 2), ("b", "c"): games(5, 5), ("a", "c"): games(9, 2)}
    turned = {
        (second, first): {prompt: [1 - value for value in values] for prompt, values in by_seed.items()}
        for (first, second), by_seed in outcomes.items()
    }
    one, two = bradley_terry(outcomes, "b", resamples=30), bradley_terry(turned, "b", resamples=30)
    for name in "abc":
        assert one[name] == pytest.approx(two[name])


def test_seeds_of_a_prompt_are_drawn_together():
    """Ten equal seeds of 40 prompts: bounds as wide as those of 40 comparisons (but for the prior), not of 400."""
    once = bradley_terry({("a", "b"): games(26, 14)}, "b", prior=1e-6, resamples=300)["a"]
    often = {prompt: values * 10 for prompt, values in games(26, 14).items()}
    assert bradley_terry({("a", "b"): often}, "b", prior=1e-6, resamples=300)["a"] == pytest.approx(once, abs=0.01)


@pytest.mark.parametrize(
    ("outcomes", "anchor", "message"),
    [
        ({("a", "b"): games(1, 1)}, "c", "anchor 'c' is not among the methods: a, b"),
        ({("a", "a"): games(1, 1)}, "a", "'a' cannot play against itself"),
        ({("a", "b"): games(1, 1), ("c", "d"): games(1, 1)}, "a", "links c, d to the anchor 'a'"),
        ({("a", "b"): {"p": [-0.3]}}, "a", "outcomes of 'a' against 'b' of prompt 'p' must be from 0 to 1"),
        ({("a", "b"): {}}, "a", "outcomes of 'a' against 'b' holds no prompt"),
        ({}, "a", "anchor 'a' is not among the methods"),
    ],
)
def test_what_cannot_be_ranked_is_refused(outcomes, anchor, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(outcomes, anchor)


def test_a_prior_of_zero_is_refused():
    with pytest.raises(ValueError, match="prior must be positive, got 0"):
        bradley_terry({("a", "b"): games(1, 1)}, "a", prior=0)
