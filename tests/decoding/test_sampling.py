"""The draw: its distribution, what decides it, and how often two distributions draw alike."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from llmdoctor.decoding.sampling import argmax, candidates, sample, waiting_times

INF = math.inf


def keys(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.getrandbits(64) for _ in range(count)]


def logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def draws(scores: Tensor, numbers: list[int]) -> Tensor:
    """A token of the one distribution for every key."""
    parts = [numbers[start : start + 10_000] for start in range(0, len(numbers), 10_000)]
    return torch.cat([sample(scores.expand(len(part), -1), part, torch.zeros(len(part)).bool()) for part in parts])


def deviations(counts: Tensor, expected: Tensor) -> float:
    """By how many standard deviations χ² exceeds its mean, over what is expected 50 times or more."""
    frequent = expected >= 50
    observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
    wanted = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    chi_square = float(((observed - wanted).square() / wanted.clamp(min=1)).sum())
    freedom = len(wanted) - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocabulary", [1, 3, 256, 257, 700, 49_152])
def test_the_first_of_the_greatest_is_found_as_torch_finds_it(vocabulary: int) -> None:
    scores = logits(40, vocabulary).round()
    assert vocabulary < 256 or bool(((scores == scores.amax(-1, keepdim=True)).sum(-1) > 1).any())
    scores[0] = -INF
    scores[1, vocabulary // 2] = INF
    scores[2, vocabulary // 3 :: 2] = math.nan
    assert torch.equal(argmax(scores), scores.argmax(-1))
    assert torch.equal(argmax(scores[:, : (vocabulary + 1) // 2]), scores[:, : (vocabulary + 1) // 2].argmax(-1))


@pytest.mark.parametrize("vocabulary", [3, 257, 700])
def test_draws_follow_the_softmax(vocabulary: int) -> None:
    scores = logits(1, vocabulary, spread=1.0)
    scores[0, 1] = -INF
    counts = torch.bincount(draws(scores, keys(200_000)), minlength=vocabulary).double()
    assert counts[1] == 0
    assert deviations(counts, 2e5 * scores[0].double().softmax(-1)) < 5


def test_consecutive_keys_are_as_good_as_random_ones() -> None:
    """The keys of a row are random, but nothing here may hang on it."""
    scores = logits(1, 300, spread=1.0)
    counts = torch.bincount(draws(scores, list(range(100_000))), minlength=300).double()
    assert deviations(counts, 1e5 * scores[0].double().softmax(-1)) < 5


def test_draws_of_neighbouring_keys_are_independent() -> None:
    scores = logits(1, 5, spread=0.5)
    drawn = draws(scores, list(range(200_000)))
    pairs = 5 * drawn[0::2] + drawn[1::2]
    masses = scores[0].double().softmax(-1)
    assert deviations(torch.bincount(pairs, minlength=25).double(), 1e5 * torch.outer(masses, masses).flatten()) < 5


def test_waiting_times_are_exponential_down_to_the_smallest() -> None:
    """The smallest of n exponentials is exponential of rate n: the tokens of large vocabularies are drawn by those."""
    words = torch.arange(50_000, dtype=torch.int32)
    smallest = torch.cat([waiting_times(keys(20, seed), words).amin(-1) for seed in range(50)]).double() * 50_000
    assert float(smallest.min()) > 0
    assert float(smallest.mean()) == pytest.approx(1.0, abs=5 / math.sqrt(1000))
    # The Kolmogorov-Smirnov distance of 1,000 numbers from their distribution exceeds 2 / √1000 once in 1,500 times.
    ranks = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert float((1 - (-smallest.sort().values).exp() - ranks).abs().max()) < 2 / math.sqrt(1000)


@pytest.mark.parametrize("seed", range(4))
def test_two_distributions_draw_alike_as_often_as_theory_says(seed: int) -> None:
    """Σ_v 1 / Σ_w max(p_w / p_v, q_w / q_v): v is first in both races (Daliri et al., arXiv 2408.07978)."""
    scores = logits(1, 12, seed)
    others = scores + logits(1, 12, seed + 100, spread=0.5 * seed)
    p, q = scores[0].double().softmax(-1), others[0].double().softmax(-1)
    expected = float((1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(-1)).sum())
    total_variation = float((p - q).abs().sum()) / 2
    assert (1 - total_variation) / (1 + total_variation) - 1e-9 <= expected <= 1 - total_variation + 1e-9
    numbers = keys(100_000, seed)
    alike = float((draws(scores, numbers) == draws(others, numbers)).double().mean())
    assert alike == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 1e5) + 1e-9)


def test_candidates_are_the_tokens_that_come_first_in_the_same_race() -> None:
    """The k-th candidate is what is drawn with the ones before it excluded; a cut vocabulary excludes, too."""
    scores, numbers = logits(1, 50), keys(500)
    tokens = torch.tensor([3, 17, 20, 41])
    sampled = torch.zeros(500).bool()
    guessed = candidates(scores[:, tokens].expand(500, -1), numbers, sampled, 4, tokens)
    left = torch.full_like(scores, -INF).index_copy(1, tokens, scores[:, tokens]).repeat(500, 1)
    for rank in range(4):
        drawn = sample(left, numbers, sampled)
        assert guessed[:, rank].tolist() == drawn.tolist()
        left.scatter_(1, drawn[:, None], -INF)


def test_candidates_of_a_greedy_row_are_the_most_likely() -> None:
    scores = logits(2, 40)
    guessed = candidates(scores, keys(2), torch.tensor([True, False]), 5, torch.arange(40))
    assert guessed[0].tolist() == scores[0].topk(5).indices.tolist() != guessed[1].tolist()


@pytest.mark.parametrize("vocabulary", [4, 300])
def test_excluded_tokens_are_never_drawn(vocabulary: int) -> None:
    scores = torch.full((1, vocabulary), -INF)
    scores[0, 2] = 1.0
    assert set(draws(scores, keys(3000)).tolist()) == {2}


def test_greedy_takes_the_mode_and_the_first_of_equals() -> None:
    scores = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert sample(scores, keys(2), torch.tensor([True, True])).tolist() == [1, 0]


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    scores = torch.tensor([[0.0, 0.1]] * 64)
    greedy = torch.arange(64) % 2 == 0
    drawn = sample(scores, keys(64), greedy)
    assert bool((drawn[greedy] == 1).all())
    assert 0 in drawn[~greedy].tolist()


def test_a_rows_draw_does_not_depend_on_its_neighbours() -> None:
    scores, numbers = logits(8, 70_000), keys(8)
    greedy = torch.tensor([False, True] * 4)
    together = sample(scores, numbers, greedy)
    alone = [sample(scores[i : i + 1], numbers[i : i + 1], greedy[i : i + 1]).item() for i in range(8)]
    assert together.tolist() == alone
