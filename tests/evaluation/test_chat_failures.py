"""The chat judge where the server misbehaves: too many requests, errors, silence, refused keys, interrupts."""

from __future__ import annotations

import email.utils
import socket
import sys
import threading
import time

import pytest
from tests.chat_server import Judging, Say, longer, serving
from tests.evaluation.chat_judging import judge_of, outcomes, own_environment, some, wanted

from llmdoctor.errors import UserError
from llmdoctor.evaluation.chat_client import retry_after
from llmdoctor.evaluation.chat_endpoint import ChatEndpoint
from llmdoctor.evaluation.chat_judge import ChatJudge
from llmdoctor.evaluation.judge_cache import JudgeCache
from llmdoctor.evaluation.judge_prompt import JudgePrompt

__all__ = ["own_environment"]


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
    with pytest.raises(UserError, match=r"needs the openai package: pip install -e '\.\[judge\]'"):
        judge_of("http://127.0.0.1:1/v1")


def test_requests_per_minute_are_spaced_over_all_threads():
    """1200 a minute are 50 ms apart: the last of 8 begins at least 350 ms after the first."""
    with serving(Judging()) as server:
        judge_of(server.url, requests_per_minute=1200, concurrency=4).compare(*some(4))
    assert server.times[-1] - server.times[0] >= 0.33


def test_so_many_questions_are_in_flight_and_no_more():
    with serving(Judging(answer=lambda question: Say(longer(question).text, delay=0.05))) as server:
        assert outcomes(judge_of(server.url, concurrency=3).compare(*some(6))) == wanted(6)
    assert server.most_at_once == 3


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


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("2.5") == 2.5
    assert retry_after("-1") == 0.0
    assert retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)
    assert [retry_after(header) for header in (None, "", "soon", "nan")] == [None] * 4
