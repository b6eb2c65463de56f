"""A chat judge of an endpoint, and comparisons whose outcome is known."""

from __future__ import annotations

import pytest

from llmdoctor.evaluation.chat_endpoint import ChatEndpoint
from llmdoctor.evaluation.chat_judge import ChatJudge


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """No key of the machine's, and no proxy before the loopback."""
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
