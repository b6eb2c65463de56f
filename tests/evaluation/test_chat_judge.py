"""The chat judge against a real HTTP server on loopback: what it asks, and what it reads in replies."""

from __future__ import annotations

import pytest
from tests.chat_server import ANSWERS, Judging, Say, serving
from tests.evaluation.chat_judging import judge_of, outcomes, own_environment, some
from tests.tiny import pair

from llmdoctor.errors import UserError
from llmdoctor.evaluation.judge_prompt import REMINDER, JudgePrompt, conversation, read_verdict
from llmdoctor.evaluation.judges import judge_agreement

__all__ = ["own_environment"]


def test_both_orders_are_asked_with_fixed_parameters():
    seen = []
    with serving(Judging()) as server:
        judge = judge_of(server.url)
        verdicts = judge.compare(*some(2), progress=seen.append)
    assert outcomes(verdicts) == [1.0, 0.0]
    assert [verdict.orders for verdict in verdicts] == [(1.0, 1.0), (0.0, 0.0)]
    assert all(verdict.consistent and verdict.answered for verdict in verdicts)
    assert seen == [1, 1]
    shown = [ANSWERS.search(question).groups() for question in server.questions]
    assert shown[:2] == [("long answer", "short"), ("short", "long answer")]
    assert all("Question 0?" in question for question in server.questions[:2])
    body = {key: value for key, value in server.bodies[0].items() if key != "messages"}
    assert body == {"model": "wise", "temperature": 0, "seed": 0, "max_tokens": 512}
    assert judge.name == "chat:wise"


def test_parameters_can_be_added_and_removed():
    with serving(Judging()) as server:
        judge_of(server.url, params={"temperature": None, "seed": 7, "top_k": 1}).compare(*some(1))
    body = {key: value for key, value in server.bodies[0].items() if key != "messages"}
    assert body == {"model": "wise", "seed": 7, "max_tokens": 512, "top_k": 1}


def test_a_judge_that_always_says_a_gives_inconsistent_ties():
    with serving(Judging(answer=lambda question: Say('{"verdict": "A"}'))) as server:
        judge = judge_of(server.url)
        verdicts = judge.compare(*some(3))
    assert [(v.outcome, v.orders, v.consistent, v.answered) for v in verdicts] == [(0.5, (1.0, 0.0), False, True)] * 3
    assert judge.report().inconsistent == 3


def test_ties_are_ties():
    with serving(Judging(answer=lambda question: Say('{"verdict": "tie"}'))) as server:
        judge = judge_of(server.url)
        [verdict] = judge.compare(*some(1))
    assert (verdict.outcome, verdict.orders, verdict.consistent) == (0.5, (0.5, 0.5), True)
    assert judge.report().inconsistent == 0


def test_nothing_to_compare_asks_nothing():
    with serving(Judging()) as server:
        assert judge_of(server.url).compare([], [], []) == []
    assert not server.bodies


def test_a_reply_without_a_verdict_is_asked_for_again_in_other_words(tmp_path):
    """The first order needs three replies, the second one: 4 requests with seeds 0, 1, 2, 0."""
    with serving(Judging(Say('{"verdict": '), Say("Hm."))) as server:
        judge = judge_of(server.url, cache=tmp_path / "cache")
        assert outcomes(judge.compare(*some(1))) == [1.0]
        assert [body["seed"] for body in server.bodies] == [0, 1, 2, 0]
        assert [question.endswith(REMINDER) for question in server.questions] == [False, True, True, False]
        assert (judge.report().asked, judge.report().reasked, judge.report().unparsed) == (4, 2, 0)
        again = judge_of(server.url, cache=tmp_path / "cache")
        assert outcomes(again.compare(*some(1))) == [1.0]
        assert (again.report().asked, again.report().cached, again.report().reasked) == (0, 4, 2)


def test_a_reply_that_never_holds_a_verdict_is_a_counted_tie(tmp_path):
    with serving(Judging(answer=lambda question: Say("Both have merits."))) as server:
        judge = judge_of(server.url, cache=tmp_path / "cache", attempts=2)
        [verdict] = judge.compare(*some(1))
        assert (verdict.outcome, verdict.orders, verdict.answered) == (0.5, (0.5, 0.5), False)
        report = judge.report()
        assert (report.unparsed, report.refused, report.inconsistent, report.asked) == (1, 0, 0, 4)
        assert judge_of(server.url, cache=tmp_path / "cache", attempts=2).estimate(*some(1)).uncached == 0
    assert len(server.bodies) == 4


@pytest.mark.parametrize(
    "refusal",
    [
        Say("I'm sorry, but I can't help with that."),
        Say("", message={"content": None, "refusal": "No."}),
        Say("", finish_reason="content_filter"),
        Say("filtered", status=400, message={"code": "content_filter"}),
        Say("flagged", status=400, message={"code": "invalid_prompt"}),
        Say("too long", status=400, message={"code": "context_length_exceeded"}),
        Say("too large", status=413),
    ],
)
def test_a_refusal_is_a_counted_tie_and_not_asked_again(refusal):
    """One order refused, the other in favour of the first answer: still a tie."""
    with serving(Judging(refusal)) as server:
        judge = judge_of(server.url)
        [verdict] = judge.compare(*some(1))
    assert (verdict.outcome, verdict.orders, verdict.answered) == (0.5, (0.5, 1.0), False)
    report = judge.report()
    assert (report.refused, report.unparsed, report.inconsistent, report.asked) == (1, 0, 0, 2)
    assert len(server.bodies) == 2


def test_a_reply_in_parts_is_the_text_of_its_parts():
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": 'Because. {"verdict":'}]
    says = [Say(message={"content": [*parts, {"type": "text", "text": f' "{letter}"}}'}]}) for letter in "AB"]
    with serving(Judging(*says)) as server:
        judge = judge_of(server.url, concurrency=1)
        (verdict,) = judge.compare(*some(1))
    assert (verdict.outcome, verdict.consistent) == (1.0, True)
    assert judge.report().asked == 2


def test_agreement_with_labels_through_the_server():
    """The longer answer is chosen in 3 of 4 pairs."""
    pairs = [pair("longer one", "short", prompt=f"{index}") for index in range(3)] + [pair("short", "longer one")]
    with serving(Judging()) as server:
        found = judge_agreement(judge_of(server.url), pairs)
    assert (found.agreement, found.ties, found.position_consistency, found.pairs) == (75.0, 0, 100.0, 4)


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ('{"verdict": "A"}', "A"),
        ('Because it is right.\n{"verdict": "B"}', "B"),
        ('```json\n{"reason": "x", "verdict": "tie"}\n```', "tie"),
        ('{"Verdict": "Answer B", "why": {"a": [1]}} Hope that helps!', "B"),
        ('Not {"verdict": "A"} but {"verdict": "b"}', "B"),
        ("A set {1, 2} is better. Verdict: A", "A"),
        ("**Verdict: B**", "B"),
        ("Verdict:\nthe answer is [[B]]", "B"),
        ("The verdict is a tie. Verdict: a tie.", "tie"),
        ("[[C]]", "tie"),
        ('{"verdict": "A"', "A"),
        ("{'verdict': 'B'}", "B"),
        ('<think>{"verdict": "A"}</think>{"verdict": "B"}', "B"),
        ('<think>{"verdict": "A"} and so on', "unparsed"),
        ('{"verdict": "…"}', "unparsed"),
        ('{"verdict": 1}', "unparsed"),
        ('{"verdict": "A or B"}', "unparsed"),
        ("", "unparsed"),
        ("Verdict: A\nbut on the other hand B", "unparsed"),
        ("I can't decide which one I like.", "unparsed"),
        ("{" * 5000, "unparsed"),
        ("I’m sorry, but this is not something I rate.", "refused"),
        ("I cannot help with this request.", "refused"),
        ("As an AI, I am unable to discuss these.", "refused"),
        ("Both are fine. I cannot choose.", "unparsed"),
        ('I\'m sorry for both. {"verdict": "A"}', "A"),
    ],
)
def test_verdicts_are_read_from_whatever_stands_around_them(text, reading):
    assert read_verdict(text) == reading


def test_texts_that_look_like_placeholders_stay_as_they_are(tmp_path):
    path = tmp_path / "judge.txt"
    path.write_text('{prompt} | {first} | {second} | {"verdict": {other}}')
    prompt = [{"role": "user", "content": "{first}?"}]
    assert JudgePrompt(path).render(prompt, "{second}", "\\1 {prompt}") == (
        '{first}? | {second} | \\1 {prompt} | {"verdict": {other}}'
    )


def test_a_conversation_is_shown_turn_by_turn():
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    assert conversation([{"role": role, "content": text} for role, text in turns]) == (
        "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye"
    )
    assert conversation([{"role": "user", "content": "Hi"}]) == "Hi"


def test_a_prompt_file_that_cannot_serve_is_one_clear_line(tmp_path):
    path = tmp_path / "judge.txt"
    path.write_text("{prompt} {first}")
    with pytest.raises(UserError, match=r"judge.txt: \{second\} missing; .* put in for \{prompt\}, \{first\}"):
        JudgePrompt(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"judge.txt: cannot be read \(it is not UTF-8\)"):
        JudgePrompt(path)
    with pytest.raises(UserError, match=r"none.txt: cannot be read \(No such file"):
        JudgePrompt(tmp_path / "none.txt")


def test_attempts_are_checked():
    with pytest.raises(UserError, match="attempts must be at least 1, got 0"):
        judge_of("http://127.0.0.1:1/v1", attempts=0)
