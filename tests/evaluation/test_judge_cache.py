"""What a chat judge asks only once, what that costs, and the cache in which answers are kept."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading

import pytest
from tests.chat_server import Judging, Say, longer, serving
from tests.evaluation.chat_judging import judge_of, outcomes, own_environment, some, wanted

from llmdoctor.errors import UserError
from llmdoctor.evaluation.chat_endpoint import ChatEndpoint
from llmdoctor.evaluation.chat_judge import ChatJudge
from llmdoctor.evaluation.judge_cache import JudgeCache, Reply
from llmdoctor.evaluation.judge_report import Prices

__all__ = ["own_environment"]

_JOB = """
import json, sys
from llmdoctor.evaluation.chat_endpoint import ChatEndpoint
from llmdoctor.evaluation.chat_judge import ChatJudge
ChatJudge(ChatEndpoint("wise", sys.argv[1], concurrency=2), cache=sys.argv[2]).compare(*json.loads(sys.argv[3]))
"""


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


def test_tokens_nobody_counted_are_a_quarter_of_the_bytes():
    says = [Say('{"verdict": "A"}', usage=False), Say('{"verdict": "B"}', usage=False)]
    with serving(Judging(*says)) as server:
        judge = judge_of(server.url)
        judge.compare(*some(1))
    report = judge.report()
    assert report.unmetered == 2
    assert report.input_tokens == sum(-(-len(question.encode()) // 4) for question in server.questions)
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
    assert estimate.input_tokens == sum(-(-len(question.encode()) // 4) for question in server.questions[2:])
    assert estimate.output_tokens == 4 * 50
    assert estimate.price == pytest.approx((estimate.input_tokens * 4 + 200 * 8) / 1e6)
    assert estimate.attempts == 3


def test_an_estimate_says_what_it_does_not_know():
    unlimited = judge_of("http://127.0.0.1:1/v1", params={"max_tokens": None}, prices=Prices(1, 1)).estimate(*some(1))
    assert (unlimited.output_tokens, unlimited.price) == (None, None)
    assert judge_of("http://127.0.0.1:1/v1").estimate(*some(1)).price is None


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
