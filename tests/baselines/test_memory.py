"""Memory that runs out while a method decodes: fewer rows together, the same answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.baselines.tools import TEXTS, ask, critic_of, load, other, same
from torch import Tensor

from llmdoctor.baselines.args import ARGS
from llmdoctor.baselines.cards import CARDS, CARDSOptions
from llmdoctor.baselines.contrastive import ContrastiveSearch
from llmdoctor.baselines.method import Method
from llmdoctor.baselines.transfer_q import TransferQ
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.request import Completion, Request
from llmdoctor.errors import UserError

MAKERS: dict[str, Callable[[Path], Method]] = {
    "args": lambda folder: ARGS(load(folder), critic_of(folder), top_k=6),
    "cards": lambda folder: CARDS(load(folder), critic_of(folder), CARDSOptions(1.0, temperature=0.7)),
    "contrastive": lambda folder: ContrastiveSearch(load(folder)),
    "transfer_q": lambda folder: TransferQ(
        load(folder), other(folder, seed=7), critic_of(folder), top_k=3, rollout_tokens=2
    ),
}


@pytest.fixture(params=MAKERS)
def method(request: pytest.FixtureRequest, tiny_folder: Path) -> Method:
    return MAKERS[request.param](tiny_folder)


def asked(method: Method) -> list[Request]:
    temperature = 1.0 if "temperature" in method.sampling_fields else 0.0
    return [ask(TEXTS[place % 4], temperature=temperature, seed=place, max_new_tokens=6 + place) for place in range(4)]


def failing(monkeypatch: pytest.MonkeyPatch, broken: Callable[[int, int], bool]) -> None:
    """Let passes for which `broken` says so, from their number and rows, end as CUDA does without memory."""
    forward, calls = Lane._forward, 0

    def forward_or_not(self: Lane, ids: Tensor, *rest: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if broken(calls, len(ids)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(self, ids, *rest)

    monkeypatch.setattr(Lane, "_forward", forward_or_not)


@pytest.mark.parametrize("at", [1, 9])
def test_fewer_rows_go_on_and_say_the_same(
    method: Method, at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the first pass, and when some tokens are there already; each answer is reported once."""
    expected = method.generate(asked(method))
    failing(monkeypatch, lambda call, _: call == at)
    told: list[int] = []
    with caplog.at_level(logging.WARNING):
        found = method.generate(asked(method), on_done=lambda index, _: told.append(index))
    for one, again in zip(expected, found, strict=True):
        same(one, again)
    assert sorted(told) == [0, 1, 2, 3]
    assert "Out of memory: going on with 2 rows at a time." in caplog.text


def test_kl_is_not_told_half_booked(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CARDS ends a row, and books its KL, around a call that memory may not suffice for: that row begins anew."""
    method = MAKERS["cards"](tiny_folder)
    expected = method.generate(asked(method))
    absorb = Lane.absorb
    for at in range(1, 7):
        calls = 0

        def absorb_or_not(self: Lane, *rest: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == at:  # noqa: B023
                raise torch.OutOfMemoryError("CUDA out of memory")
            absorb(self, *rest)

        monkeypatch.setattr(Lane, "absorb", absorb_or_not)
        told: list[int] = []
        found = method.generate(asked(method), on_done=lambda index, _: told.append(index))  # noqa: B023
        for one, again in zip(expected, found, strict=True):
            same(one, again)
        assert sorted(told) == [0, 1, 2, 3]


def test_errors_of_who_listens_are_theirs(method: Method) -> None:
    def forgetful(index: int, completion: Completion) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        method.generate(asked(method), on_done=forgetful)


def test_a_prompt_that_memory_cannot_hold_ends_alone(
    method: Method, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The longest prompt is never read; the others are answered as ever. As the only one, it is an error."""
    expected = method.generate(asked(method))
    long = max(range(4), key=lambda place: len(method.encoder.prompt_ids(asked(method)[place].messages)))
    length = len(method.encoder.prompt_ids(asked(method)[long].messages))
    forward = Lane._forward

    def forward_or_not(self: Lane, ids: Tensor, *rest: Any) -> Tensor:
        if ids.shape[1] >= length:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 21 bytes")
        return forward(self, ids, *rest)

    monkeypatch.setattr(Lane, "_forward", forward_or_not)
    told: dict[int, Completion] = {}
    with caplog.at_level(logging.WARNING):
        found = method.generate(asked(method), on_done=told.__setitem__)
    for place, (one, again) in enumerate(zip(expected, found, strict=True)):
        if place != long:
            same(one, again)
    assert (found[long].finish_reason, found[long].token_ids, found[long].text) == ("error", [], "")
    assert [told[place] for place in range(4)] == found
    assert f"Prompt {long + 1} ends with an error: out of memory with a single prompt of {length} tokens" in caplog.text
    with pytest.raises(UserError, match="out of memory with a single prompt"):
        method.generate([asked(method)[long]])


def test_other_errors_pass(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Lane, *_: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Lane, "_forward", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        method.generate(asked(method))
