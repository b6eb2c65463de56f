"""How much a set of texts differs, over the set and among several answers to one prompt.

Shapes: N texts, D dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmdoctor.evaluation.embedders import Embedder, unit_vectors
from llmdoctor.evaluation.metrics import Floats, distinct_n, words


@dataclass(frozen=True, slots=True)
class Diversity:
    """Figures of one method's answers. For distinct and distance more is more diverse, for BLEU less is.

    Distinct-n falls as a set grows, so compare sets of equal size.
    """

    distinct_1: float
    distinct_2: float
    distinct_3: float
    distinct_4: float
    """Share of distinct word n-grams over the whole set (0…1)."""
    self_bleu: float
    """Over the whole set (0…1): answers to different prompts that say the same."""
    self_bleu_within: float | None
    """Among the answers to one prompt, mean over prompts (0…1). None where no prompt has two answers."""
    pairwise_distance: float | None
    """1 − cosine (0…2) among the answers to one prompt, mean over prompts. None without embedder or second answers."""


def diversity(
    samples: Sequence[Sequence[str]], embedder: Embedder | None = None, *, references: int = 64, seed: int = 0
) -> Diversity:
    """Diversity of `samples[i]`, the answers to prompt i.

    Args:
        samples: at least two texts in all; prompts may have different numbers of them.
        embedder: see `get_embedder`; asked once, for all texts of prompts with two or more.
        references: see `self_bleu`.
        seed: see `self_bleu`.
    """
    texts = [text for answers in samples for text in answers]
    within, distance = diversity_within(samples, embedder, references=references, seed=seed)
    return Diversity(
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        distinct_3=distinct_n(texts, 3),
        distinct_4=distinct_n(texts, 4),
        self_bleu=self_bleu(texts, references=references, seed=seed),
        self_bleu_within=within,
        pairwise_distance=distance,
    )


def diversity_within(
    samples: Sequence[Sequence[str]], embedder: Embedder | None = None, *, references: int = 64, seed: int = 0
) -> tuple[float | None, float | None]:
    """`Diversity.self_bleu_within` and `pairwise_distance` alone: what compares all texts takes far longer."""
    several = [answers for answers in samples if len(answers) > 1]
    if not several:
        return None, None
    within = [self_bleu(answers, references=references, seed=seed) for answers in several]
    return float(np.mean(within)), _mean_distance(several, embedder) if embedder else None


def self_bleu(texts: Sequence[str], n: int = 4, *, references: int = 64, seed: int = 0) -> float:
    """Mean BLEU-n of each text against the others (0…1); 1.0: all say the same (Zhu et al. 2018, Texygen).

    BLEU is nltk's, over `words`, with uniform weights and smoothing method 1 (Chen & Cherry 2014): an order without a
    match counts 0.1 of a match. A text of fewer than n words is judged by the orders it has; one without any
    word is 1 if another is like it, else 0.

    Args:
        texts: at least two.
        n: longest n-gram.
        references: a text is compared with at most so many of the others, drawn anew for each text. It bounds the time
            (0.1 ms a reference), and lets sets of different sizes, all larger than this, be compared.
        seed: of that draw.
    """
    if len(texts) < 2:
        raise ValueError(f"self-BLEU needs at least two texts, got {len(texts)}")
    if n < 1 or references < 1:
        raise ValueError(f"n and references must be at least 1, got {n} and {references}")
    rng = np.random.default_rng(seed)
    tokens = [words(text) for text in texts]
    scores = []
    for index, own in enumerate(tokens):
        others = np.delete(np.arange(len(tokens)), index)
        if others.size > references:
            others = rng.choice(others, references, replace=False)
        scores.append(_bleu([tokens[other] for other in others], own, n))
    return float(np.mean(scores))


def _bleu(references: list[list[str]], own: list[str], n: int) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if not own:
        return float([] in references)
    orders = min(n, len(own))
    return float(sentence_bleu(references, own, [1 / orders] * orders, SmoothingFunction().method1))


def _mean_distance(several: Sequence[Sequence[str]], embedder: Embedder) -> float:
    directions = unit_vectors(embedder, [text for answers in several for text in answers])
    ends = np.cumsum([len(answers) for answers in several])
    return float(np.mean([_distance(block) for block in np.split(directions, ends[:-1])]))


def _distance(directions: Floats) -> float:
    """Mean of 1 − cosine over all pairs of unit vectors [N, D], N ≥ 2."""
    count = len(directions)
    total = directions.sum(axis=0)
    return float(1 - (total @ total - count) / (count * (count - 1)))
