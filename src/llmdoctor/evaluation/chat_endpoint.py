"""Where a chat model is and how it is asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llmdoctor.errors import UserError

OPENAI_URL = "https://api.openai.com/v1"
_OPENAI_KEY = "OPENAI_API_KEY"
_DEFAULT_PARAMS: Mapping[str, Any] = {"temperature": 0, "seed": 0, "max_tokens": 512}
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class ChatEndpoint:
    """Where a chat model is, how it is asked, and how patiently.

    Attributes:
        model: its name at the endpoint.
        base_url: without `/chat/completions`.
        api_key_env: the environment variable that holds the key. Where the default is unset, servers other than
            OpenAI's are asked without a key.
        params: of the request, over temperature 0, seed 0, max_tokens 512; None removes one. Reasoning models of OpenAI
            want `{"temperature": None, "max_tokens": None, "max_completion_tokens": 4096}`.
        timeout_s: longest silence of the server.
        retries: how often a request is sent again after 408, 409, 425, 429, 5xx, a timeout, a lost connection or a
            reply that is no chat completion. 6 of them wait about a minute in all.
        backoff_s: the first wait; each next one doubles, up to 60 s, and is shortened at random by up to a half. A
            server's Retry-After is waited out in full.
        longest_wait_s: a server that asks for a longer wait ends the run.
        requests_per_minute: at most so many requests are begun, evenly spaced and retries included; None: no limit.
        concurrency: requests in flight at once.
    """

    model: str
    base_url: str = OPENAI_URL
    api_key_env: str = _OPENAI_KEY
    params: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0
    retries: int = 6
    backoff_s: float = 1.0
    longest_wait_s: float = 300.0
    requests_per_minute: float | None = None
    concurrency: int = 4

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("a chat judge needs a model's name, got an empty one")
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"base_url must look like {OPENAI_URL}, got {self.base_url!r}")
        reserved = sorted({"model", "messages", "stream", "n"} & self.params.keys())
        if reserved:
            raise UserError(f"params must not set {', '.join(reserved)}: the judge does")
        for name in ("max_tokens", "max_completion_tokens"):
            limit = self.params.get(name)
            if limit is not None and (type(limit) is not int or limit < 1):
                raise UserError(f"the parameter {name} must be a whole number of at least 1, got {limit!r}")
        for name in ("timeout_s", "longest_wait_s", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be greater than 0, got {value}")
        for name, least in (("retries", 0), ("backoff_s", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def request(self, question: str, attempt: int = 0) -> dict[str, Any]:
        """The body of a request. Each further attempt at one question draws with the next seed."""
        params = {key: value for key, value in {**_DEFAULT_PARAMS, **self.params}.items() if value is not None}
        if isinstance(params.get("seed"), int):
            params["seed"] += attempt
        return {"model": self.model, "messages": [{"role": "user", "content": question}], **params}

    @property
    def output_bound(self) -> int | None:
        """Most tokens of one reply; None where the parameters set no limit."""
        params = {**_DEFAULT_PARAMS, **self.params}
        limit = params.get("max_completion_tokens") or params.get("max_tokens")
        return None if limit is None else int(limit)

    def api_key(self) -> str | None:
        """The key, None for a server that is asked without one. UserError where a key is needed and not set."""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and (self.api_key_env != _OPENAI_KEY or urlsplit(self.base_url).hostname == "api.openai.com"):
            raise UserError(
                f"the environment variable {self.api_key_env} is not set; put the key for {self.base_url} there"
            )
        return key or None


def approximate_tokens(text: str) -> int:
    """A quarter of the UTF-8 bytes, rounded up: near enough for English, and for scripts of a token a character."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN)
