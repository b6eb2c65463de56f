from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdoctor.data.preferences import PreferencePair
from llmdoctor.errors import UserError
from llmdoctor.evaluation.judges import RewardJudge, ScoreJudge, Verdict, judge_agreement
from llmdoctor.evaluation.scorers import get_scorer


def user(text):
    return ({"role": "user", "content": text},)


def length(texts):
    return [float(len(text)) for text in texts]


def outcomes(judge, first, second, prompts=None):
    prompts = prompts or [user("Hi")] * len(first)
    return [verdict.outcome for verdict in judge.compare(prompts, first, second)]


class PositionJudge:
    """Prefers a longer answer, unless it is told to prefer whichever stands in front."""

    name = "position"

    def __init__(self, biased=lambda index: False, answered=lambda index: True):
        self.biased, self.answered = biased, answered
        self.seen = []

    def compare(self, prompts, first, second, *, progress=None):
        self.seen.extend(first)
        verdicts = []
        for index, (one, two) in enumerate(zip(first, second, strict=True)):
            fair = float(len(one) > len(two))
            orders = (1.0, 0.0) if self.biased(index) else (fair, fair)
            verdicts.append(Verdict.from_orders(*orders, answered=self.answered(index)))
        return verdicts


class Rewards:
    """A reward model of a few lines: the number of the prompt's words that the answer holds."""

    def __init__(self):
        self.calls = []

    def score(self, prompts, texts):
        self.calls.append(len(texts))
        pairs = zip(prompts, texts, strict=True)
        return [float(sum(word in text for word in prompt[-1]["content"].split())) for prompt, text in pairs]


@pytest.mark.parametrize(
    ("orders", "outcome", "consistent"),
    [
        ((1.0,), 1.0, True),
        ((1.0, 1.0), 1.0, True),
        ((0.0, 0.0), 0.0, True),
        ((0.5, 0.5), 0.5, True),
        ((1.0, 0.0), 0.5, False),
        ((1.0, 0.5), 0.5, False),
        ((0.0, 0.5), 0.5, False),
    ],
)
def test_orders_that_disagree_are_a_tie(orders, outcome, consistent):
    verdict = Verdict.from_orders(*orders)
    assert (verdict.outcome, verdict.orders, verdict.consistent) == (outcome, orders, consistent)


def test_a_comparison_that_was_not_answered_is_a_tie_whatever_the_other_order_says():
    assert Verdict.from_orders(1.0, 1.0, answered=False).outcome == 0.5


def test_the_higher_score_wins_and_the_margin_is_a_tie():
    """Lengths 3 against 1, 2 against 3, 1 against 1: gaps 2, −1, 0."""
    first, second = ["aaa", "aa", "a"], ["a", "aaa", "b"]
    assert outcomes(ScoreJudge(length), first, second) == [1.0, 0.0, 0.5]
    assert outcomes(ScoreJudge(length, margin=1), first, second) == [1.0, 0.5, 0.5]
    assert outcomes(ScoreJudge(length, margin=2), first, second) == [0.5, 0.5, 0.5]


@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=200), st.integers(0, 3))
def test_swapping_the_answers_mirrors_the_outcome(pairs, margin):
    first, second = [one for one, _ in pairs], [two for _, two in pairs]
    judge = ScoreJudge(length, margin=margin)
    assert outcomes(judge, first, second) == [1 - outcome for outcome in outcomes(judge, second, first)]
    assert outcomes(judge, first, second) == [
        1.0 if len(one) - len(two) > margin else 0.0 if len(two) - len(one) > margin else 0.5 for one, two in pairs
    ]


def test_a_score_judge_bears_its_scorers_name():
    assert ScoreJudge(get_scorer("brevity")).name == "brevity"
    assert ScoreJudge(length).name == "length"
    assert ScoreJudge(length, name="long").name == "long"
    assert outcomes(ScoreJudge(get_scorer("brevity")), ["Yes."], ["Yes, I most certainly do."]) == [1.0]


def test_a_reward_judge_gives_the_model_each_answer_with_its_own_prompt():
    prompts = [user("red blue"), user("green")]
    assert outcomes(RewardJudge(Rewards()), ["red", "red"], ["red blue", ""], prompts) == [0.0, 0.5]
    assert outcomes(RewardJudge(Rewards()), ["", "green"], ["blue", "red"], prompts) == [0.0, 1.0]
    assert RewardJudge(Rewards()).name == "reward"


def test_long_lists_are_judged_in_blocks_that_progress_adds_up():
    """150 comparisons in blocks of 64: 64, 64, 22; the model reads both answers of a block at once."""
    model, seen = Rewards(), []
    verdicts = RewardJudge(model).compare([user("a")] * 150, ["a"] * 150, ["b"] * 150, progress=seen.append)
    assert [verdict.outcome for verdict in verdicts] == [1.0] * 150
    assert seen == [64, 64, 22]
    assert model.calls == [128, 128, 44]


@pytest.mark.parametrize(
    ("scores", "message"),
    [([1.0], "returned 1 scores for 2 texts"), ([1.0, float("nan")], "returned nan for")],
)
def test_scores_that_are_no_scores_are_one_clear_line(scores, message):
    class Broken:
        def score(self, prompts, texts):
            return scores

    with pytest.raises(UserError, match=f"reward model 'reward' {message}"):
        outcomes(RewardJudge(Broken()), ["a"], ["b"])
    with pytest.raises(UserError, match=f"scorer 'own' {message}"):
        outcomes(ScoreJudge(lambda texts: scores, name="own"), ["a"], ["b"])


@pytest.mark.parametrize("margin", [-1.0, float("nan"), float("inf")])
def test_a_margin_must_be_a_distance(margin):
    with pytest.raises(UserError, match="margin must be a finite number of at least 0"):
        ScoreJudge(length, margin=margin)
    with pytest.raises(UserError, match="margin must be a finite number of at least 0"):
        RewardJudge(Rewards(), margin=margin)


def test_answers_must_match_the_prompts():
    with pytest.raises(ValueError, match="two answers a prompt, got 1 prompts, 2 and 1 answers"):
        ScoreJudge(length).compare([user("Hi")], ["a", "b"], ["c"])


def labelled(*pairs):
    return [PreferencePair(user("Hi"), chosen, rejected) for chosen, rejected in pairs]


def test_agreement_by_hand():
    """Longer wins: right, right, wrong, tie: (1 + 1 + 0 + ½) / 4 = 62.5 %."""
    pairs = labelled(("aaa", "a"), ("aa", "a"), ("a", "aa"), ("a", "b"))
    found = judge_agreement(ScoreJudge(length), pairs)
    assert found.agreement == found.interval.mean == 62.5
    assert 0 <= found.interval.low <= 62.5 <= found.interval.high <= 100
    assert (found.ties, found.unanswered, found.pairs, found.position_consistency) == (1, 0, 4, None)


@pytest.mark.parametrize("seed", range(5))
def test_a_fair_judge_agrees_wholly_in_whatever_order_pairs_are_shown(seed):
    found = judge_agreement(PositionJudge(), labelled(*[("long", "s")] * 40), seed=seed)
    assert (found.agreement, found.position_consistency) == (100.0, 100.0)


def test_the_order_shown_is_drawn_by_seed_and_hides_the_label():
    pairs = labelled(*[("chosen", "rejected")] * 200)
    orders = []
    for seed in (0, 0, 1):
        judge = PositionJudge()
        judge_agreement(judge, pairs, seed=seed)
        orders.append(judge.seen)
    assert orders[0] == orders[1] != orders[2]
    assert 70 < orders[0].count("chosen") < 130


def test_a_judge_that_reads_position_alone_is_at_chance_and_said_to_be_inconsistent():
    found = judge_agreement(PositionJudge(biased=lambda index: True), labelled(*[("long", "s")] * 10))
    assert (found.agreement, found.ties, found.position_consistency) == (50.0, 10, 0.0)


def test_position_consistency_is_over_answered_pairs():
    """Of 8 pairs 2 go unanswered (0, 1); of the other 6 three are biased (2, 3, 4): 50 %, and 5 ties in all."""
    judge = PositionJudge(biased=lambda index: index in (2, 3, 4), answered=lambda index: index > 1)
    found = judge_agreement(judge, labelled(*[("long", "s")] * 8))
    assert (found.position_consistency, found.ties, found.unanswered) == (50.0, 5, 2)
    assert found.agreement == 100 * (3 + 5 / 2) / 8


def test_no_labelled_pairs_is_one_clear_line():
    with pytest.raises(UserError, match="no labelled pairs"):
        judge_agreement(ScoreJudge(length), [])
