from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdoctor.evaluation.arena import matchup, matchup_from_outcomes, prompts_needed, score_interval
from llmdoctor.evaluation.metrics import WinTieLoss, bootstrap_ci

OUTCOMES = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=3),
    min_size=1,
    max_size=12,
)


def coins(wins, losses, seeds=1):
    return {f"p{index}": [float(index < wins)] * seeds for index in range(wins + losses)}


def test_matchup_by_hand():
    """Gaps at margin 0.1: p: +0.5 win, +0.1 tie; q: −0.4 loss, 0 tie; r: +1 win, +1 win. Three wins, two ties, one
    loss: (3 + 1) / 6 = 66.7 %. Signs: p up, q down, r up: two of three, p = 1."""
    first = {"p": [0.5, 0.1], "q": [0.0, 0.0], "r": [1.0, 1.0]}
    second = {"r": [0.0, 0.0], "p": [0.0, 0.0], "q": [0.4, 0.0]}
    result = matchup(first, second, margin=0.1)
    assert (result.win, result.tie, result.loss, result.prompts) == (3, 2, 1, 3)
    assert result.win_plus_half_tie == pytest.approx(400 / 6)
    assert result.sign_test_p == 1.0


def test_one_seed_gives_the_figures_of_win_tie_loss():
    outcomes = {f"p{index}": [value] for index, value in enumerate([1.0] * 20 + [0.5] * 5 + [0.0] * 10)}
    result = matchup_from_outcomes(outcomes)
    plain = WinTieLoss(20, 5, 10)
    assert (result.win_plus_half_tie, result.ci_low, result.ci_high) == pytest.approx(plain.interval())
    assert result.win_plus_half_tie == plain.win_plus_half_tie


@pytest.mark.parametrize(("wins", "low"), [(320, 98.81), (1, 20.65)])
def test_an_interval_knows_what_it_has_not_seen(wins, low):
    """Wilson's for n of n wins begins at n / (n + z²), z² = 3.8415: 320 prompts might hide one in eighty, one tells
    little. Every bootstrap sample of them is 100 %."""
    result = matchup_from_outcomes(coins(wins, 0, seeds=3))
    assert (result.ci_low, result.ci_high) == pytest.approx((low, 100.0), abs=0.01)
    mirrored = matchup_from_outcomes(coins(0, wins, seeds=3))
    assert (mirrored.ci_low, mirrored.ci_high) == pytest.approx((0.0, 100 - low), abs=0.01)


def test_wilsons_interval_by_hand_and_where_the_bootstrap_takes_over():
    """9 losses of 100: (0.91 + z²/200 ± z √(0.91 · 0.09 / 100 + z²/40,000)) / (1 + z²/100) = 83.77 … 95.19 %."""
    result = matchup_from_outcomes(coins(91, 9))
    assert (result.ci_low, result.ci_high) == pytest.approx((83.77, 95.19), abs=0.01)
    result = matchup_from_outcomes(coins(90, 10))
    assert (result.ci_low, result.ci_high) == pytest.approx(WinTieLoss(90, 0, 10).interval()[1:])


def test_expected_outcomes_by_hand():
    """¾ of a win and ¼ of a tie; half of either: 2 · (0.875 + 0.5) / 4 = 68.75 %; of four answers 2.5 wins (2 to the
    nearest even number), ½ a tie, 1 loss."""
    outcomes = {prompt: [0.875, 0.5] for prompt in "pq"}
    result = matchup_from_outcomes(outcomes, {prompt: [0.25, 0.0] for prompt in "pq"})
    assert result.win_plus_half_tie == pytest.approx(68.75)
    assert (result.win, result.tie, result.loss) == (2, 1, 1)


def test_repeating_a_prompts_seeds_adds_no_evidence():
    """Ten equal seeds of each of 40 prompts: interval, p and plan are those of the 40 prompts."""
    once, often = matchup_from_outcomes(coins(26, 14)), matchup_from_outcomes(coins(26, 14, seeds=10))
    assert (often.ci_low, often.ci_high) == pytest.approx((once.ci_low, once.ci_high))
    assert (often.sign_test_p, often.prompts_needed) == (once.sign_test_p, once.prompts_needed)
    assert often.win == 10 * once.win


def test_sign_test_by_hand():
    """Eight wins, one loss, three ties: 2 · (9 + 1) / 2⁹ = 20/512. Five of five: 2/32."""
    ties = {f"t{index}": [0.5] for index in range(3)}
    assert matchup_from_outcomes(coins(8, 1) | ties).sign_test_p == pytest.approx(20 / 512)
    assert matchup_from_outcomes(coins(5, 0)).sign_test_p == pytest.approx(1 / 16)
    assert matchup_from_outcomes(ties).sign_test_p == 1.0


def test_prompts_needed_by_hand():
    """60 of 100: m − ½ = 0.1, s² = 100/99 · 0.24, (1.960 + 0.8416)² = 7.849: n = 7.849 · 0.24242 / 0.01 = 190.3."""
    assert prompts_needed(coins(60, 40)) == 191
    assert prompts_needed(coins(40, 60)) == 191


def test_prompts_needed_has_no_answer_without_effect_or_spread():
    assert prompts_needed(coins(5, 5)) is None
    assert prompts_needed({"only": [1.0, 1.0]}) is None
    assert prompts_needed(coins(30, 0)) == 6


def test_the_planned_number_of_prompts_has_the_power_it_says():
    """At a true 65 %, n from the formula: a normal interval excludes 50 % in 0.8 of 2,000 studies (sd 0.009, ± 4)."""
    needed = prompts_needed(coins(650, 350))
    rng = np.random.default_rng(1)
    means = rng.binomial(needed, 0.65, size=2000) / needed
    low = means - 1.96 * np.sqrt(means * (1 - means) / needed)
    assert 0.76 <= np.mean(low > 0.5) <= 0.84


def test_cluster_intervals_cover_the_truth_about_as_often_as_they_say():
    """Seeds of a prompt share its chance of a win (mean 0.6), three seeds, 60 prompts, 200 studies at level 0.9: about
    180 cover 60 % (sd 4.2, ± 4). Drawing seeds as if they were prompts would cover far less."""
    rng = np.random.default_rng(5)
    covered = naive = 0
    for _ in range(200):
        chance = rng.choice([0.2, 1.0], size=60)
        values = (rng.random((60, 3)) < chance[:, None]).astype(float)
        by_seed = {str(index): row.tolist() for index, row in enumerate(values)}
        result = matchup_from_outcomes(by_seed, level=0.9, resamples=400)
        covered += result.ci_low <= 60 <= result.ci_high
        plain = bootstrap_ci(100 * values.ravel(), level=0.9, resamples=400)
        naive += plain.low <= 60 <= plain.high
    assert 163 <= covered <= 197
    assert naive < covered


@given(OUTCOMES)
@settings(deadline=None)
def test_swapping_sides_mirrors_the_matchup(outcomes):
    turned = {prompt: [1 - value for value in values] for prompt, values in outcomes.items()}
    one = matchup_from_outcomes(outcomes, resamples=60)
    two = matchup_from_outcomes(turned, resamples=60)
    assert (one.win, one.tie, one.loss) == (two.loss, two.tie, two.win)
    assert one.win_plus_half_tie + two.win_plus_half_tie == pytest.approx(100)
    assert one.ci_low + two.ci_high == pytest.approx(100)
    assert one.sign_test_p == two.sign_test_p
    assert one == matchup_from_outcomes(outcomes, resamples=60)
    assert 0 <= one.ci_low <= one.ci_high <= 100


@given(OUTCOMES)
@settings(deadline=None)
def test_scores_and_outcomes_agree(outcomes):
    even = {prompt: [0.5] * len(values) for prompt, values in outcomes.items()}
    assert matchup(outcomes, even, resamples=20) == matchup_from_outcomes(outcomes, resamples=20)


def test_score_interval_by_hand():
    """Values 1, 3 and 5: mean 3. Samples of the two prompts have means 2, 3 and 5: at level 0.98 both ends show."""
    assert score_interval({"p": [1.0, 3.0], "q": [5.0]}, level=0.98) == (3.0, 2.0, 5.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matchup({"p": [1.0]}, {"q": [1.0]}), "prompt 'p' is only in first"),
        (lambda: matchup({"p": [1.0]}, {"p": [1.0], "q": [1.0]}), "prompt 'q' is only in second"),
        (lambda: matchup({"p": [1.0]}, {"p": [1.0, 2.0]}), "'p' has 1 seeds in first and 2 in second"),
        (lambda: matchup({"p": [1.0]}, {"p": [math.nan]}), "second of prompt 'p' contains NaN"),
        (lambda: matchup({"p": [1.0]}, {"p": [1.0]}, margin=-1), "margin must not be negative"),
        (lambda: matchup({}, {}), "first holds no prompt"),
        (lambda: matchup_from_outcomes({"p": [1.1]}), r"outcomes of prompt 'p' must be from 0 to 1, got \[1.1\]"),
        (lambda: matchup_from_outcomes({"p": []}), "outcomes of prompt 'p' must be a non-empty"),
        (lambda: score_interval({}), "scores holds no prompt"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
