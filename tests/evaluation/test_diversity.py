from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdoctor.errors import UserError
from llmdoctor.evaluation.diversity import diversity, self_bleu
from llmdoctor.evaluation.metrics import distinct_n, words

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=7).map(" ".join), min_size=2, max_size=6)
ARROWS = {"right": [1.0, 0.0], "up": [0.0, 2.0], "left": [-3.0, 0.0]}


def arrows(texts):
    return [ARROWS[text] for text in texts]


def slow_bleu(references, own, n):
    """BLEU as Papineni et al. define it, zero matches counted as 0.1 (Chen & Cherry, method 1)."""
    if not own:
        return float([] in references)

    def grams(tokens, order):
        return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))

    orders = min(n, len(own))
    logs = 0.0
    for order in range(1, orders + 1):
        mine = grams(own, order)
        matches = sum(min(count, max(grams(ref, order)[gram] for ref in references)) for gram, count in mine.items())
        if order == 1 and not matches:
            return 0.0
        logs += math.log((matches or 0.1) / (len(own) - order + 1)) / orders
    closest = min((abs(len(ref) - len(own)), len(ref)) for ref in references)[1]
    return math.exp(logs) * (1.0 if len(own) > closest else math.exp(1 - closest / len(own)))


@given(TEXTS, st.integers(1, 5))
@settings(deadline=None)
def test_self_bleu_is_bleu_of_each_against_all_others(texts, n):
    tokens = [words(text) for text in texts]
    slow = np.mean([slow_bleu(tokens[:i] + tokens[i + 1 :], own, n) for i, own in enumerate(tokens)])
    assert self_bleu(texts, n) == pytest.approx(slow, abs=1e-12)
    assert self_bleu(texts, n, references=1) == self_bleu(texts, n, references=1)


def test_self_bleu_by_hand():
    """ "a b" against "a c": unigrams 1 of 2, bigrams 0.1 of 1, equal lengths: √(0.5 · 0.1); so the other way."""
    assert self_bleu(["A b!", "a c"]) == pytest.approx(math.sqrt(0.05))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["the very same words again", "the very same words again"], 1.0),
        (["one two three four", "five six seven eight"], 0.0),
        (["yes", "yes"], 1.0),
        (["", ""], 1.0),
        (["", "something"], 0.0),
    ],
)
def test_self_bleu_at_its_ends(texts, expected):
    assert self_bleu(texts) == pytest.approx(expected)


def test_sampled_references_estimate_the_whole():
    """Half the texts repeat one sentence, half share no word. All 20 references of a text of the first half miss that
    sentence with a chance of C(30, 20) / C(59, 20), about 10⁻⁸, so self-BLEU is ½ however they are drawn."""
    texts = ["again and again the same"] * 30 + [f"w{i} x{i} y{i} z{i}" for i in range(30)]
    assert self_bleu(texts, references=20) == pytest.approx(0.5)
    assert self_bleu(texts, references=59) == pytest.approx(0.5)


def test_more_texts_than_references_take_seconds():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.zipf(1.3, 48) % 5000) for _ in range(320)]
    start = time.process_time()
    assert 0 < self_bleu(texts) < 1
    assert time.process_time() - start < 10


def test_diversity_by_hand():
    """Set: right, right, up, left, up: 3 distinct of 5 words. Within prompt 1 (same word) BLEU 1 and distance 0;
    prompt 2 (up, left, up): BLEU of the two "up" 1, of "left" 0; cosines 0, 1, 0: distance 2/3. The lone answer counts
    in the set alone, where "left" and nothing else is new: 4/5."""
    figures = diversity([["right", "right"], ["up", "left", "up"]], arrows)
    assert figures.distinct_1 == 3 / 5
    assert (figures.distinct_2, figures.distinct_3, figures.distinct_4) == (0, 0, 0)
    assert figures.self_bleu == pytest.approx(4 / 5)
    assert figures.self_bleu_within == pytest.approx((1 + 2 / 3) / 2)
    assert figures.pairwise_distance == pytest.approx((0 + 2 / 3) / 2)


def test_opposite_answers_are_two_apart():
    assert diversity([["left", "right"], ["up"]], arrows).pairwise_distance == pytest.approx(2)


def test_one_answer_a_prompt_has_no_figures_within():
    figures = diversity([["left"], ["right"]], arrows)
    assert figures.self_bleu_within is None
    assert figures.pairwise_distance is None
    assert diversity([["left", "left"]]).pairwise_distance is None


@given(st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_figures_of_any_texts_lie_in_their_ranges(samples):
    def counts(texts):
        return [[1.0 + text.count(letter) for letter in "abc"] for text in texts]

    figures = diversity(samples, counts)
    assert figures.distinct_4 == distinct_n([text for answers in samples for text in answers], 4)
    assert 0 <= figures.self_bleu <= 1 + 1e-9
    assert 0 <= figures.self_bleu_within <= 1 + 1e-9
    directions = [np.array(counts(answers)) for answers in samples]
    directions = [rows / np.linalg.norm(rows, axis=1)[:, None] for rows in directions]
    slow = [np.mean([1 - a @ b for i, a in enumerate(rows) for b in rows[i + 1 :]]) for rows in directions]
    assert figures.pairwise_distance == pytest.approx(np.mean(slow), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: self_bleu(["alone"]), "at least two texts, got 1"),
        (lambda: self_bleu(["a", "b"], 0), "must be at least 1, got 0 and 64"),
        (lambda: self_bleu(["a", "b"], references=0), "must be at least 1, got 4 and 0"),
        (lambda: diversity([[], []]), "at least two texts, got 0"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_embedder_without_direction_is_named():
    with pytest.raises(UserError, match=r"no direction .* to 'b'"):
        diversity([["a", "b"]], lambda texts: [[1.0, 0.0], [0.0, 0.0]])
