"""Requests say what they expected and what they got."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmdoctor.decoding.request import Request, SamplingParams, listed
from llmdoctor.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 0, got -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number of at least 0, got 1.5"),
        ({"temperature": None}, r"temperature must be 0 \(greedy\) or at least 1e-05, got None"),
        ({"temperature": float("nan")}, r"temperature must be 0 \(greedy\) or at least 1e-05, got nan"),
        ({"top_k": -1}, r"top_k must be a whole number of at least 0 \(0 is off\), got -1"),
        ({"top_k": None}, r"top_k must be a whole number of at least 0 \(0 is off\), got None"),
        ({"top_p": "1"}, r"top_p must be in \(0, 1\], got '1'"),
        ({"seed": "x"}, "seed must be a whole number, or None, which draws one, got 'x'"),
        ({"seed": 0.5}, "seed must be a whole number, or None, which draws one, got 0.5"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\), got 1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0"),
        ({"temperature": 1e-39}, r"temperature must be 0 \(greedy\) or at least 1e-05, got 1e-39"),
        ({"stop": ("",)}, "stop must be a list of non-empty strings, got"),
        ({"stop": "the"}, "stop must be a list of non-empty strings, got 'the'"),
        ({"stop": None}, "stop must be a list of non-empty strings, got None"),
        ({"stop": [1]}, r"stop must be a list of non-empty strings, got \[1\]"),
    ],
)
def test_sampling_params_check_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**options)


def test_a_seed_that_is_drawn_can_be_read_and_given_again() -> None:
    drawn = [SamplingParams(seed=None) for _ in range(8)]  # type: ignore[arg-type]
    assert len({one.seed for one in drawn}) == 8
    assert all(isinstance(one.seed, int) and 0 <= one.seed < 1 << 53 for one in drawn)
    assert replace(drawn[0], temperature=0.5).seed == drawn[0].seed
    assert SamplingParams().seed == SamplingParams().seed


def test_without_betas_every_doctor_has_one() -> None:
    assert Request.from_text("Hi").beta_of("kind") == 1.0
    assert Request.from_text("Hi", betas={}).beta_of("kind") == 0.0
    assert Request.from_text("Hi", betas={"kind": 2.0, "terse": -1.0}).beta_of("terse") == -1.0


@pytest.mark.parametrize("betas", [1.0, [1.0], "kind"])
def test_betas_are_by_name(betas: Any) -> None:
    with pytest.raises(UserError, match=r"betas must be the β of each doctor by its name, such as \{'positive': 1.0\}"):
        Request.from_text("Hi", betas=betas)


def test_exponents_must_be_numbers() -> None:
    with pytest.raises(UserError, match="alpha must be a finite number, got nan"):
        Request.from_text("Hi", alpha=float("nan"))
    with pytest.raises(UserError, match=r"alpha must be a finite number, got SamplingParams\("):
        Request(({"role": "user", "content": "Hi"},), SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="beta of 'kind' must be a finite number, got inf"):
        Request.from_text("Hi", betas={"kind": float("inf")})


def test_an_onset_is_no_less_than_nothing() -> None:
    with pytest.raises(UserError, match="onset must be at least 0, got -1"):
        Request.from_text("Hi", onset=-1)


@pytest.mark.parametrize("text", ["Hello", ""])
def test_a_prompt_that_is_one_string_is_told_of_from_text(text: str) -> None:
    with pytest.raises(UserError, match=rf"messages must be a conversation, .* got '{text}'; .* Request\.from_text"):
        Request(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("slip", ["Hi", Request.from_text("Hi"), ["Hi"], [Request.from_text("Hi"), None]])
def test_requests_are_a_list_of_them(slip: Any) -> None:
    with pytest.raises(UserError, match=r"requests are a list, such as \[Request.from_text\('Hello'\)\], of Request"):
        listed(slip)
    asked = [Request.from_text("Hi"), Request.from_text("Ho")]
    assert listed(iter(asked)) == listed(tuple(asked)) == asked
