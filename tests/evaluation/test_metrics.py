from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdoctor.evaluation.metrics import (
    WinTieLoss,
    bootstrap_ci,
    cluster_bootstrap_ci,
    distinct_n,
    perplexity,
    rank_correlation,
    resampled_counts,
    sequence_kl,
    words,
)

FINITE = st.floats(-100, 100)
VALUES = st.lists(FINITE, min_size=1, max_size=30)


def test_words_drop_case_and_punctuation_and_keep_apostrophes():
    assert words("Don't — STOP, it’s 3 o'clock!") == ["don't", "stop", "it’s", "3", "o'clock"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("我喜欢GPT-4，很好。", ["我", "喜", "欢", "gpt", "4", "很", "好"]),
        ("東京タワー人々", ["東", "京", "タ", "ワ", "ー", "人", "々"]),
        ("ที่นี่ดี", ["ที่", "นี่", "ดี"]),
        ("한국어 단어 two", ["한국어", "단어", "two"]),
    ],
)
def test_without_spaces_each_character_is_a_word(text, found):
    assert words(text) == found


@given(st.text(st.characters(max_codepoint=0x0DFF)))
def test_words_of_scripts_with_spaces_are_as_ever(text):
    assert words(text) == re.findall(r"\w+(?:['’]\w+)*", text.lower())


def test_chinese_that_repeats_itself_is_not_distinct():
    """4-grams of 好好好好好: 2 alike. As one word there would be none."""
    assert distinct_n(["好好好好好"], 4) == 1 / 2


def test_distinct_2_by_hand():
    """Bigrams: [a b, b a, a b] and [a b]; 2 distinct of 4. "b|a" across the two texts would make it different."""
    assert distinct_n(["A b, a b.", "a b"], 2) == 2 / 4


def test_distinct_n_never_crosses_texts():
    """Joined, "a b" "c d" would hold the bigram "b c": 3 of 3 instead of the 2 of 2 of [a b], [c d], [a b]: 2/3."""
    assert distinct_n(["a b", "c d", "a b"], 2) == pytest.approx(2 / 3)


def test_distinct_n_without_any_ngram_is_zero():
    assert distinct_n(["one two three", "", "!?"], 4) == 0.0


def test_distinct_n_refuses_n_below_one():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct_n(["a"], 0)


@given(st.lists(st.text("ab ", max_size=20), max_size=8), st.integers(1, 4))
def test_distinct_n_is_a_share_and_saying_all_twice_halves_it(texts, n):
    once = distinct_n(texts, n)
    assert 0 <= once <= 1
    assert distinct_n(texts * 2, n) == pytest.approx(once / 2)


def test_bootstrap_of_a_coin_matches_the_binomial():
    """100 tosses, half heads: the mean's standard error is 0.05, so the 95 % interval is 0.5 ± 0.098 (± one step)."""
    interval = bootstrap_ci([0.0, 1.0] * 50)
    assert interval.mean == 0.5
    assert interval.low == pytest.approx(0.402, abs=0.011)
    assert interval.high == pytest.approx(0.598, abs=0.011)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    """200 samples of 40 standard normals; at level 0.8 about 160 intervals hold 0 (binomial sd 5.7, so ± 4 sd)."""
    rng = np.random.default_rng(7)
    intervals = [bootstrap_ci(rng.normal(size=40), level=0.8, resamples=400) for _ in range(200)]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals)
    assert 137 <= covered <= 183


def test_bootstrap_in_several_blocks_draws_every_resample():
    """300,000 values force blocks of 6 resamples; 20 resamples of a constant-free ramp still bracket its mean."""
    ramp = np.arange(300_000) / 300_000
    interval = bootstrap_ci(ramp, resamples=20)
    assert interval.low < interval.mean < interval.high
    assert interval.high - interval.low < 0.005


@given(VALUES, st.integers(0, 5))
def test_bootstrap_stays_within_the_values_and_repeats(values, seed):
    interval = bootstrap_ci(values, resamples=50, seed=seed)
    slack = 1e-9 * max(1, max(map(abs, values)))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
    assert interval == bootstrap_ci(values, resamples=50, seed=seed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_ci([]), "non-empty"),
        (lambda: bootstrap_ci([1.0, math.nan]), "values contains NaN"),
        (lambda: bootstrap_ci([1.0], level=1.0), "level must lie between 0 and 1, got 1.0"),
        (lambda: bootstrap_ci([1.0], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: bootstrap_ci([1.0], resamples=10, level=0), "level must lie between 0 and 1, got 0"),
        (lambda: cluster_bootstrap_ci([]), "groups must not be empty"),
        (lambda: cluster_bootstrap_ci([[1.0], []]), "group 1 must be a non-empty flat sequence"),
        (lambda: WinTieLoss.from_scores([1.0, 2.0], [1.0]), "equal length, got 2 and 1"),
        (lambda: WinTieLoss.from_scores([1.0], [1.0], margin=-0.1), "margin must not be negative"),
        (lambda: WinTieLoss(0, 0, 0).win_plus_half_tie, "nothing was compared"),
        (lambda: perplexity([[], []]), "non-empty"),
        (lambda: sequence_kl([[1.0]], [[1.0, 2.0]]), "same tokens of the same sequences"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(VALUES, st.integers(1, 4), st.integers(0, 5))
def test_equal_values_of_a_group_tell_no_more_than_one_of_them(values, copies, seed):
    """k equal seeds a prompt: the interval is that of one seed a prompt, and no narrower."""
    slack = 1e-9 * max(1, max(map(abs, values)))
    once = bootstrap_ci(values, resamples=50, seed=seed)
    many = cluster_bootstrap_ci([[value] * copies for value in values], resamples=50, seed=seed)
    assert many == pytest.approx(once, abs=slack)


def test_clusters_of_unequal_size_match_a_loop_over_drawn_groups():
    """The mean is over values, not over groups: (1+2+3+10)/4 = 4, and so in every sample of the groups."""
    groups = [[1.0, 2.0, 3.0], [10.0]]
    means = [
        np.mean([value for group, count in zip(groups, row, strict=True) for value in group * int(count)])
        for block in resampled_counts(2, 400, seed=3)
        for row in block
    ]
    interval = cluster_bootstrap_ci(groups, level=0.4, resamples=400, seed=3)
    assert interval.mean == 4.0
    assert interval[1:] == pytest.approx(np.quantile(means, [0.3, 0.7]))
    assert {round(mean, 9) for mean in means} == {2.0, 4.0, 10.0}


def test_resampled_counts_come_in_blocks_and_each_row_draws_as_many_as_there_are():
    blocks = list(resampled_counts(700_000, 5))
    assert [block.shape for block in blocks] == [(2, 700_000), (2, 700_000), (1, 700_000)]
    assert all((block.sum(axis=1) == 700_000).all() for block in blocks)


def test_win_tie_loss_by_hand():
    """Differences +0.5, +0.1, 0, −0.1, −0.4 at margin 0.1: one win, three ties, one loss; (1 + 1.5) / 5 = 50 %."""
    outcome = WinTieLoss.from_scores([0.5, 0.1, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1, 0.4], margin=0.1)
    assert outcome == WinTieLoss(win=1, tie=3, loss=1)
    assert outcome.win_plus_half_tie == 50.0


def test_the_papers_win_plus_half_tie():
    """LLMdoctor against DPO is reported as 57.8/6.4/35.8, that is 61.0."""
    assert WinTieLoss(578, 64, 358).win_plus_half_tie == pytest.approx(61.0)


def test_win_interval_matches_the_binomial():
    """75 wins of 100: standard error √(.75·.25/100) = 4.33 points, so 75 ± 8.5."""
    interval = WinTieLoss(75, 0, 25).interval()
    assert interval.mean == 75
    assert interval.low == pytest.approx(66.5, abs=1.1)
    assert interval.high == pytest.approx(83.5, abs=1.1)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=20), st.floats(0, 50))
def test_swapping_sides_mirrors_the_outcome(pairs, margin):
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    one, two = WinTieLoss.from_scores(ours, theirs, margin), WinTieLoss.from_scores(theirs, ours, margin)
    assert (one.win, one.tie, one.loss) == (two.loss, two.tie, two.win)
    assert one.win_plus_half_tie + two.win_plus_half_tie == pytest.approx(100)


def test_perplexity_weighs_tokens_not_sequences():
    """One token at 1/2 and three at 1/8: mean −log is (1 + 3·3)/4 = 2.5 bits, so 2^2.5."""
    assert perplexity([[math.log(1 / 2)], [math.log(1 / 8)] * 3]) == pytest.approx(2**2.5)


def test_perplexity_of_an_impossible_token_is_infinite():
    assert perplexity([[-1.0, -math.inf]]) == math.inf


@given(st.integers(2, 1000), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_perplexity_of_a_uniform_model_is_its_vocabulary(size, lengths):
    assert perplexity([[-math.log(size)] * length for length in lengths]) == pytest.approx(size)


def test_sequence_kl_by_hand():
    """Sequence sums: (−1−2)−(−2−3) = 2 and (−1)−(−1) = 0; mean 1 nat, and the interval reaches both ends."""
    assert sequence_kl([[-1.0, -2.0], [-1.0]], [[-2.0, -3.0], [-1.0]]) == (1.0, 0.0, 2.0)


def test_rank_correlation_by_hand_with_ties():
    """x ranks 1, 2.5, 2.5, 4; y ranks 1, 3, 2, 4: Σdxdy = 2.25+0+0+2.25 = 4.5, Σdx² = 4.5, Σdy² = 5."""
    assert rank_correlation([10, 20, 20, 30], [1, 5, 2, 9]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_rank_correlation_of_a_constant_is_undefined():
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=20, unique=True), st.randoms(use_true_random=False))
def test_rank_correlation_sees_only_order(values, random):
    other = random.sample(values, len(values))
    rho = rank_correlation(values, other)
    assert -1 <= rho <= 1
    assert rank_correlation([math.exp(v / 20) for v in values], other) == pytest.approx(rho)
    assert rank_correlation([-v for v in values], other) == pytest.approx(-rho)
    assert rank_correlation(values, values) == pytest.approx(1)
