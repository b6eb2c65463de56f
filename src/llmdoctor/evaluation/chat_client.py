"""One question to an OpenAI-compatible chat endpoint: pace, retries, and errors a person can act on."""

from __future__ import annotations

import email.utils
import json
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmdoctor.errors import UserError
from llmdoctor.evaluation.chat_endpoint import ChatEndpoint, approximate_tokens
from llmdoctor.evaluation.judge_cache import Reply

_LONGEST_BACKOFF_S = 60.0

_DECLINED = ("content_filter", "content_policy_violation", "invalid_prompt", "context_length_exceeded")
"""Codes of errors that are about one question and not about how it is asked: Azure's filter, OpenAI's, its reasoning
models', and a question that is too long. Another question may pass, this one never will."""

_WHAT_TO_DO = {
    400: "if the model does not take these parameters, change or remove them (--judge-params)",
    401: "check the key in the environment variable {key}",
    403: "the key in the environment variable {key} may not use this model",
    404: "check the model's name and that the base URL ends where /chat/completions begins (often in /v1)",
}


class Stopped(Exception):
    """The run was stopped while this question waited."""


class ChatClient:
    """Asks one endpoint from many threads. Every thread that meets a 429 or 503 with Retry-After holds all of them.

    Args:
        endpoint: where and how.

    Raises:
        UserError: the `openai` package or the key is missing.
    """

    def __init__(self, endpoint: ChatEndpoint) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "a chat judge needs the openai package: pip install -e '.[judge]' in llmdoctor's folder"
            ) from error
        self._openai = openai
        self._endpoint = endpoint
        self._key = endpoint.api_key()
        # Its own retries are off: ours are counted, paced together, and can be stopped.
        self._client = openai.OpenAI(
            # The client refuses to be made without a key; servers that need none ignore it.
            api_key=self._key or "none",
            base_url=endpoint.base_url,
            timeout=endpoint.timeout_s,
            max_retries=0,
        )
        self._pace = _Pace(endpoint.requests_per_minute)
        self._jitter = random.Random()
        self._lock = threading.Lock()
        self.retried = 0
        """Requests that were sent again after an error."""

    def ask(self, body: Mapping[str, Any], stop: threading.Event) -> Reply:
        """The reply to one request, after as many retries as the endpoint's settings allow.

        Raises:
            UserError: the endpoint refuses the request, or stays down.
            Stopped: `stop` was set while it waited.
        """
        attempt = 0
        while True:
            self._pace.wait_turn(stop)
            outcome = self._try(body)
            if isinstance(outcome, Reply):
                return outcome
            if attempt == self._endpoint.retries:
                raise self._error(outcome.what, f"gave up after {_times(attempt + 1)}; {outcome.remedy}")
            self._wait(outcome, attempt, stop)
            attempt += 1
            with self._lock:
                self.retried += 1

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _try(self, body: Mapping[str, Any]) -> Reply | _Failure:
        """A reply, or a failure that may pass; UserError for one that will not."""
        try:
            # The client checks neither that a reply is JSON nor that it has the fields, so the raw one is read here.
            # In extra_body any server's own parameters pass.
            raw = self._client.chat.completions.with_raw_response.create(
                model=body["model"],
                messages=body["messages"],
                extra_body={key: value for key, value in body.items() if key not in ("model", "messages")},
            )
            text = raw.http_response.text
        except self._openai.APITimeoutError:
            return _Failure(
                f"no answer within {self._endpoint.timeout_s:g} s", "is the server overloaded, or timeout_s too short?"
            )
        except self._openai.APIConnectionError as error:
            return _Failure(f"no connection ({error.__cause__ or error})", "is the server running, and the URL right?")
        except self._openai.APIStatusError as error:
            return self._refused(error)
        reply = _read_reply(text, body)
        return reply or _Failure(
            f"the reply is no chat completion: {_one_line(text) or '(empty)'}",
            "does the URL serve the OpenAI chat API?",
        )

    def _refused(self, error: Any) -> Reply | _Failure:
        status, said = int(error.status_code), _server_message(error)
        if status == 413 or (status == 400 and error.code in _DECLINED):
            return Reply(_one_line(said), declined=True, input_tokens=0, output_tokens=0, metered=False)
        # An account without money answers 429 for ever.
        passing = status in (408, 409, 425, 429) or status >= 500
        if not passing or error.code == "insufficient_quota":
            remedy = _WHAT_TO_DO.get(status, "see the server's message").format(key=self._endpoint.api_key_env)
            if error.code == "insufficient_quota":
                remedy = "the account has no credit left"
            raise self._error(f"status {status}: {said}", remedy) from error
        after = retry_after(error.response.headers.get("retry-after"))
        return _Failure(f"status {status}: {said}", "finished answers are kept: run again later", after)

    def _wait(self, failure: _Failure, attempt: int, stop: threading.Event) -> None:
        if failure.retry_after is not None:
            if failure.retry_after > self._endpoint.longest_wait_s:
                raise self._error(
                    failure.what,
                    f"the server asks to wait {failure.retry_after:.0f} s, longest_wait_s is "
                    f"{self._endpoint.longest_wait_s:g}; run again later",
                )
            self._pace.hold(failure.retry_after)
        # Without jitter threads that failed together would come back together.
        longest = min(self._endpoint.backoff_s * 2**attempt, _LONGEST_BACKOFF_S)
        with self._lock:
            wait = longest * self._jitter.uniform(0.5, 1.0)
        if stop.wait(max(wait, failure.retry_after or 0.0)):
            raise Stopped

    def _error(self, what: str, remedy: str) -> UserError:
        line = f"judge {self._endpoint.model!r} at {self._endpoint.base_url}: {_one_line(what)}; {remedy}"
        return UserError(line.replace(self._key, "***") if self._key else line)


@dataclass(frozen=True, slots=True)
class _Failure:
    what: str
    remedy: str
    retry_after: float | None = None


class _Pace:
    """Spaces the starts of requests evenly, over all threads."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait_turn(self, stop: threading.Event) -> None:
        """Return when the caller may begin a request; Stopped if `stop` is set before."""
        while True:
            with self._lock:
                now = time.monotonic()
                wait = self._next - now
                if wait <= 0:
                    self._next = now + self._interval
            if stop.wait(max(wait, 0.0)):
                raise Stopped
            if wait <= 0:
                return

    def hold(self, seconds: float) -> None:
        """Nobody begins a request for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header (a number, or an HTTP date) asks to wait; None if absent or unreadable."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None


def _read_reply(text: str, body: Mapping[str, Any]) -> Reply | None:
    """The reply in a chat completion; None for anything else."""
    try:
        value = json.loads(text)
        choice = value["choices"][0]
        message = choice["message"]
        said, refusal = message.get("content"), message.get("refusal")
        if isinstance(said, list):
            said = "".join(part["text"] for part in said if part["type"] == "text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    said = said if isinstance(said, str) else ""
    usage = value.get("usage")
    read, written = (
        usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
    )
    metered = isinstance(read, int) and isinstance(written, int)
    if not metered:
        read, written = approximate_tokens(body["messages"][-1]["content"]), approximate_tokens(said)
    declined = bool(refusal) or choice.get("finish_reason") == "content_filter"
    return Reply(said or str(refusal or ""), declined, int(read or 0), int(written or 0), metered)


def _server_message(error: Any) -> str:
    body = error.body
    said = (body.get("message") or body.get("detail") or body) if isinstance(body, dict) else body
    return _one_line(str(said or "(no message)"))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"


def _times(count: int) -> str:
    return "1 try" if count == 1 else f"{count} tries"
