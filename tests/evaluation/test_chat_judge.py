"""The chat judge against a real HTTP server on loopback that also misbehaves."""

from __future__ import annotations

import email.utils
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from tests.chat_server import ANSWERS, Judging, Say, longer, serving
from tests.tiny import pair

from llmdoctor.errors import UserError
from llmdoctor.evaluation.chat_client import retry_after
from llmdoctor.evaluation.chat_endpoint import ChatEndpoint
from llmdoctor.evaluation.chat_judge import ChatJudge
from llmdoctor.evaluation.judge_cache import JudgeCache, Reply
from llmdoctor.evaluation.judge_prompt import REMINDER, JudgePrompt, conversation, read_verdict
from llmdoctor.evaluation.judge_report import Prices
from llmdoctor.evaluation.judges import judge_agreement


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def endpoint(url, **options):
    return ChatEndpoint("wise", url, **{"backoff_s": 0.01, "timeout_s": 10, "concurrency": 1, **options})


def judge_of(url, *, prompt=None, cache=None, attempts=3, prices=None, **options):
    return ChatJudge(endpoint(url, **options), prompt=prompt, cache=cache, attempts=attempts, prices=prices)


def some(count):
    """Comparisons with the outcomes 1, 0, 1, 0, …: the longer answer stands first in every second one."""
    prompts = [[{"role": "user", "content": f"Question {index}?"}] for index in range(count)]
    first = ["long answer" if index % 2 == 0 else "short" for index in range(count)]
    second = ["short" if index % 2 == 0 else "long answer" for index in range(count)]
    return prompts, first, second


def wanted(count):
    return [1.0 - index % 2 for index in range(count)]


def outcomes(verdicts):
    return [verdict.outcome for verdict in verdicts]


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


def test_equal_answers_and_equal_comparisons_are_not_asked_about_twice():
    """Three comparisons of which two are the same and one is of equal answers: 2 requests, not 6."""
    prompts, first, second = some(1)
    seen = []
    with serving(Judging()) as server:
        judge = judge_of(server.url)
        found = judge.compare(prompts * 3, [*first, *first, "same"], [*second, *second, "same"], progress=seen.append)
    assert outcomes(found) == [1.0, 1.0, 0.5]
    assert len(server.bodies) == 2
    assert sum(seen) == 3
    report = judge.report()
    assert (report.comparisons, report.identical, report.asked) == (3, 1, 2)


def test_nothing_to_compare_asks_nothing():
    with serving(Judging()) as server:
        assert judge_of(server.url).compare([], [], []) == []
    assert not server.bodies


def test_a_rerun_asks_nothing_twice(tmp_path):
    cache = tmp_path / "made" / "cache.sqlite"
    with serving(Judging()) as server:
        before = judge_of(server.url, cache=cache)
        assert outcomes(before.compare(*some(4))) == wanted(4)
        before.close()
        again = judge_of(server.url, cache=cache)
        assert outcomes(again.compare(*some(5))) == wanted(5)
    assert len(server.bodies) == 10
    report = again.report()
    assert (report.asked, report.cached, report.comparisons) == (2, 8, 5)
    assert [path.name for path in cache.parent.iterdir()] == ["cache.sqlite"]


@pytest.mark.parametrize("change", [{"params": {"seed": 1}}, {"model": "wiser"}, {"prompt": "{first}{second}{prompt}"}])
def test_another_model_parameter_or_prompt_is_another_question(tmp_path, change):
    prompt = None
    if "prompt" in change:
        prompt = tmp_path / "prompt.txt"
        prompt.write_text(change["prompt"])
    with serving(Judging(answer=lambda question: Say('{"verdict": "tie"}'))) as server:
        one = judge_of(server.url, cache=tmp_path / "cache")
        one.compare(*some(1))
        changed = ChatEndpoint(change.get("model", "wise"), server.url, params=change.get("params", {}))
        two = ChatJudge(changed, prompt=prompt, cache=tmp_path / "cache")
        two.compare(*some(1))
    assert len(server.bodies) == 4
    assert one.fingerprint != two.fingerprint


_JOB = """
import json, sys
from llmdoctor.evaluation.chat_endpoint import ChatEndpoint
from llmdoctor.evaluation.chat_judge import ChatJudge
ChatJudge(ChatEndpoint("wise", sys.argv[1], concurrency=2), cache=sys.argv[2]).compare(*json.loads(sys.argv[3]))
"""


def test_killed_half_way_it_goes_on_where_it_stopped(tmp_path):
    """40 questions, killed with SIGKILL at the 15th with 2 in flight: 13 or more are kept, at most 2 asked again."""
    judging = Judging(answer=lambda question: Say(longer(question).text, delay=0.02))
    judging.reach = 15
    with serving(judging) as server:
        cache = tmp_path / "cache"
        job = subprocess.Popen([sys.executable, "-c", _JOB, server.url, str(cache), json.dumps(some(20))])
        try:
            assert server.reached.wait(30)
        finally:
            job.kill()
            job.wait()
        judge = judge_of(server.url, cache=cache)
        assert outcomes(judge.compare(*some(20))) == wanted(20)
    report = judge.report()
    assert report.asked + report.cached == 40
    assert report.cached >= 13
    assert 0 <= len(server.bodies) - 40 <= 2


def test_429_waits_as_long_as_it_is_told():
    limited = Say("slow down", status=429, headers={"Retry-After": "0.4"})
    with serving(Judging(limited)) as server:
        judge = judge_of(server.url)
        assert outcomes(judge.compare(*some(1))) == [1.0]
    assert server.times[1] - server.times[0] >= 0.4
    assert (judge.report().retried, judge.report().asked) == (1, 2)


def test_429_holds_every_thread():
    """The two requests in flight beside the refused one end after 0.2 s; the next begins no sooner than at 0.6 s."""
    limited = Say("slow down", status=429, headers={"Retry-After": "0.6"})
    with serving(Judging(limited, answer=lambda question: Say(longer(question).text, delay=0.2))) as server:
        judge_of(server.url, concurrency=3).compare(*some(2))
    assert sum(moment - server.times[0] < 0.6 for moment in server.times) <= 3


def test_a_wait_that_is_too_long_ends_the_run():
    asks = r"429: come back; the server asks to wait 900 s, longest_wait_s is 300"
    with (
        serving(Judging(Say("come back", status=429, headers={"Retry-After": "900"}))) as server,
        pytest.raises(UserError, match=asks),
    ):
        judge_of(server.url).compare(*some(1))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "failure",
    [
        Say("oops", status=500),
        Say("oops", status=502, body="<html>bad gateway</html>", headers={"Content-Type": "text/html"}),
        Say("busy", status=503),
        Say(body='{"choices": [{"mess'),
        Say(body='{"error": {"message": "upstream"}}'),
        Say(body='"choices"'),
        Say(body=""),
        Say(hang_up=True),
    ],
    ids=["500", "502", "503", "broken", "error in 200", "string", "empty", "hang up"],
)
def test_a_failure_that_passes_is_tried_again(failure):
    with serving(Judging(failure, failure)) as server:
        judge = judge_of(server.url)
        assert outcomes(judge.compare(*some(1))) == [1.0]
    assert len(server.bodies) == 4
    assert (judge.report().retried, judge.report().asked) == (2, 2)


def test_a_slow_server_is_tried_again():
    with serving(Judging(Say(delay=0.6))) as server:
        judge = judge_of(server.url, timeout_s=0.3)
        assert outcomes(judge.compare(*some(1))) == [1.0]
    assert judge.report().retried == 1


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (Say("no,\nreally", status=500), "status 500: no, really; gave up after 3 tries; finished answers are kept"),
        (Say(body="<html>hi"), "the reply is no chat completion: <html>hi; gave up after 3 tries; does the URL serve"),
        (Say(delay=0.3), "no answer within 0.1 s; gave up after 3 tries; is the server overloaded"),
        (Say(hang_up=True), r"no connection \(.*\); gave up after 3 tries; is the server running"),
    ],
    ids=["500", "no json", "slow", "hang up"],
)
def test_a_judge_that_stays_down_is_one_clear_line(failure, message):
    with serving(Judging(answer=lambda question: failure)) as server:
        judge = judge_of(server.url, retries=2, timeout_s=0.1)
        with pytest.raises(UserError, match=message) as caught:
            judge.compare(*some(1))
        assert str(caught.value).startswith(f"judge 'wise' at {server.url}: ")
    assert "\n" not in str(caught.value)
    assert len(server.bodies) == 3


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        judge = judge_of(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=1)
        with pytest.raises(UserError, match=r"no connection \(.*refused.*\); gave up after 2 tries; is the server"):
            judge.compare(*some(3))


def test_what_was_answered_before_the_judge_went_down_is_kept(tmp_path):
    good = [longer(question) for question in _asked(2)]
    with serving(Judging(*good, answer=lambda question: Say("gone", status=503))) as server:
        judge = judge_of(server.url, cache=tmp_path / "cache", retries=1)
        with pytest.raises(UserError, match=r"4 of 10 questions are answered and kept in .*cache: run again to go on"):
            judge.compare(*some(5))
        assert judge.report().asked == 4
        server.answer = longer
        again = judge_of(server.url, cache=tmp_path / "cache")
        assert outcomes(again.compare(*some(5))) == wanted(5)
        assert (again.report().asked, again.report().cached) == (6, 4)


def _asked(count):
    """The questions of `some(count)` in the order in which one thread asks them."""
    render = JudgePrompt().render
    return [
        question
        for prompt, one, two in zip(*some(count), strict=True)
        for question in (render(prompt, one, two), render(prompt, two, one))
    ]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            Say("bad temperature", status=400),
            "status 400: bad temperature; if the model does not take these parameters",
        ),
        (Say("no key", status=401), "status 401: no key; check the key in the environment variable OPENAI_API_KEY"),
        (Say("not you", status=403), "status 403: not you; the key in the environment variable OPENAI_API_KEY may not"),
        (Say(status=404, body='{"detail": "Not Found"}'), "status 404: Not Found; check the model's name and that the"),
        (Say("odd", status=422), "status 422: odd; see the server's message"),
        (Say("pay", status=429, message={"code": "insufficient_quota"}), "status 429: pay; the account has no credit"),
    ],
)
def test_a_refused_request_is_fatal_at_once(failure, message):
    with (
        serving(Judging(answer=lambda question: failure)) as server,
        pytest.raises(UserError, match=message) as caught,
    ):
        judge_of(server.url).compare(*some(4))
    assert "\n" not in str(caught.value)
    assert len(server.bodies) == 1


def test_an_error_stops_threads_that_wait():
    """One thread waits 30 s for a busy server when the other's request is refused: both end at once."""
    busy = Say("busy", status=503, headers={"Retry-After": "30"}, delay=0.2)
    with serving(Judging(busy, Say("no key", status=401, delay=0.4))) as server:
        began = time.monotonic()
        with pytest.raises(UserError, match="401"):
            judge_of(server.url, concurrency=2).compare(*some(4))
    assert time.monotonic() - began < 10
    assert len(server.bodies) == 2


def test_an_interrupt_ends_every_thread_and_keeps_what_was_in_flight(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with serving(Judging(answer=lambda question: Say(longer(question).text, delay=0.05))) as server:
        judge = judge_of(server.url, cache=tmp_path / "cache", concurrency=3)
        with pytest.raises(KeyboardInterrupt):
            judge.compare(*some(20), progress=interrupt)
        asked = len(server.bodies)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("judge")]
        assert len(JudgeCache(tmp_path / "cache")) == asked < 20


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with (
        serving(Judging(longer(_asked(1)[0]), Say("bad key sk-secret", status=401))) as server,
        pytest.raises(UserError, match=r"bad key \*\*\*; check the key in the environment variable MY_KEY"),
    ):
        judge_of(server.url, api_key_env="MY_KEY").compare(*some(1))
    assert server.keys == ["Bearer sk-secret"] * 2


def test_a_key_that_is_needed_and_not_set_is_named():
    with pytest.raises(UserError, match=r"variable MY_KEY is not set; put the key for http://127.0.0.1:1/v1 there"):
        judge_of("http://127.0.0.1:1/v1", api_key_env="MY_KEY")
    with pytest.raises(UserError, match=r"variable OPENAI_API_KEY is not set; put the key for https://api.openai.com"):
        ChatJudge(ChatEndpoint("wise"))


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"needs the openai package: pip install 'llmdoctor\[judge\]'"):
        judge_of("http://127.0.0.1:1/v1")


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


def test_requests_per_minute_are_spaced_over_all_threads():
    """1200 a minute are 50 ms apart: the last of 8 begins at least 350 ms after the first."""
    with serving(Judging()) as server:
        judge_of(server.url, requests_per_minute=1200, concurrency=4).compare(*some(4))
    assert server.times[-1] - server.times[0] >= 0.33


def test_so_many_questions_are_in_flight_and_no_more():
    with serving(Judging(answer=lambda question: Say(longer(question).text, delay=0.05))) as server:
        assert outcomes(judge_of(server.url, concurrency=3).compare(*some(6))) == wanted(6)
    assert server.most_at_once == 3


def test_tokens_and_cost_by_hand():
    """2 requests of 100 and 10 tokens at 3 and 15 $/Mtok: (200 · 3 + 20 · 15) / 10⁶ = 0.0009 $."""
    with serving(Judging()) as server:
        judge = judge_of(server.url, prices=Prices(3.0, 15.0))
        judge.compare(*some(1))
        report = judge.report()
        assert (report.input_tokens, report.output_tokens, report.unmetered) == (200, 20, 0)
        assert report.cost == pytest.approx(0.0009)
        judge.compare(*some(1))
        assert judge.report().cost == report.cost
        assert judge.report().cached == 2
        assert judge_of(server.url).report().cost is None


def test_a_reply_in_parts_is_the_text_of_its_parts():
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": 'Because. {"verdict":'}]
    says = [Say(message={"content": [*parts, {"type": "text", "text": f' "{letter}"}}'}]}) for letter in "AB"]
    with serving(Judging(*says)) as server:
        judge = judge_of(server.url, concurrency=1)
        (verdict,) = judge.compare(*some(1))
    assert (verdict.outcome, verdict.consistent) == (1.0, True)
    assert judge.report().asked == 2


def test_tokens_nobody_counted_are_a_quarter_of_the_characters():
    says = [Say('{"verdict": "A"}', usage=False), Say('{"verdict": "B"}', usage=False)]
    with serving(Judging(*says)) as server:
        judge = judge_of(server.url)
        judge.compare(*some(1))
    report = judge.report()
    assert report.unmetered == 2
    assert report.input_tokens == sum(-(-len(question) // 4) for question in server.questions)
    assert report.output_tokens == 2 * 4


def test_the_estimate_is_what_will_be_asked(tmp_path):
    with serving(Judging()) as server:
        judge = judge_of(server.url, cache=tmp_path / "cache", prices=Prices(4.0, 8.0), params={"max_tokens": 50})
        judge.compare(*some(1))
        prompts, first, second = some(3)
        estimate = judge.estimate([*prompts, prompts[0]], [*first, "same"], [*second, "same"])
        assert len(server.bodies) == 2
        judge.compare(prompts, first, second)
    assert (estimate.requests, estimate.uncached) == (6, 4)
    assert len(server.bodies) == 2 + estimate.uncached
    assert estimate.input_tokens == sum(-(-len(question) // 4) for question in server.questions[2:])
    assert estimate.output_tokens == 4 * 50
    assert estimate.price == pytest.approx((estimate.input_tokens * 4 + 200 * 8) / 1e6)
    assert estimate.attempts == 3


def test_an_estimate_says_what_it_does_not_know():
    unlimited = judge_of("http://127.0.0.1:1/v1", params={"max_tokens": None}, prices=Prices(1, 1)).estimate(*some(1))
    assert (unlimited.output_tokens, unlimited.price) == (None, None)
    assert judge_of("http://127.0.0.1:1/v1").estimate(*some(1)).price is None


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
        ("As an AI, I am unable to evaluate these.", "refused"),
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


def test_a_cache_of_another_kind_is_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("my notes, which are longer than the header of a database " * 20)
    with pytest.raises(UserError, match=r"notes.txt: cannot be opened \(file is not a database\)"):
        JudgeCache(text)
    assert text.read_text().startswith("my notes")
    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE mine (x)")
    connection.close()
    with pytest.raises(UserError, match=r"other.db: this is another program's database"):
        JudgeCache(other)
    newer = tmp_path / "newer.db"
    JudgeCache(newer).close()
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(UserError, match=r"newer.db: has schema 9, this version reads 1"):
        JudgeCache(newer)
    with pytest.raises(UserError, match="cannot be opened"):
        JudgeCache(text / "below")


def test_threads_share_a_cache(tmp_path):
    caches = [JudgeCache(tmp_path / "cache") for _ in range(2)]

    def fill(start):
        for index in range(start, start + 25):
            caches[index % 2].put(str(index % 40), Reply(str(index % 40), False, 1, 2, True))

    threads = [threading.Thread(target=fill, args=(start,)) for start in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(cache) for cache in caches] == [40, 40]
    assert caches[0].get("7") == Reply("7", False, 1, 2, True)
    assert caches[0].get("none") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "needs a model's name"),
        ({"base_url": "localhost:8000"}, "base_url must look like https://api.openai.com/v1, got 'localhost:8000'"),
        ({"timeout_s": 0}, "timeout_s must be greater than 0, got 0"),
        ({"requests_per_minute": -1}, "requests_per_minute must be greater than 0"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"params": {"stream": True}}, "params must not set stream"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        ChatEndpoint(**{"model": "wise", "base_url": "http://127.0.0.1:1/v1", **options})


def test_attempts_are_checked():
    with pytest.raises(UserError, match="attempts must be at least 1, got 0"):
        judge_of("http://127.0.0.1:1/v1", attempts=0)


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("2.5") == 2.5
    assert retry_after("-1") == 0.0
    assert retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)
    assert [retry_after(header) for header in (None, "", "soon", "nan")] == [None] * 4
