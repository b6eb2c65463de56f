"""`llmdoctor chat` with its turns piped in."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tests.cli.harness import CPU, Cli, Ended

from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Request


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Every request that reaches the decoder."""
    seen: list[Request] = []
    opened = GuidedDecoder._open

    def note(self: GuidedDecoder, index: int, request: Request) -> object:
        seen.append(request)
        return opened(self, index, request)

    monkeypatch.setattr(GuidedDecoder, "_open", note)
    return seen


@pytest.fixture
def chat(good: Cli, finished: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def talk(*lines: str) -> Ended:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return good("chat", "--patient", tiny_folder, "--doctor", f"{finished / 'doctor'}=2", "--max-new-tokens", 3,
                    "--system", "Be brief.", "--seed", 7, *CPU)  # fmt: skip

    return talk


def test_the_conversation_is_remembered_until_reset(chat, asked: list[Request]) -> None:
    chat("Hello", "", "And you?", "/reset", "/system", "Again")
    roles = [[message["role"] for message in request.messages] for request in asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["user"]]
    assert asked[1].messages[3]["content"] == "And you?"
    assert asked[0].sampling.seed != asked[1].sampling.seed


def test_settings_change_while_it_runs(chat, asked: list[Request]) -> None:
    ended = chat("Hi", "/alpha 0.5", "/beta positive -1", "/temperature 0", "Hi", "/beta 3", "/onset 4", "Hi")
    mixtures = [
        (request.alpha, request.betas["positive"], request.onset, request.sampling.temperature) for request in asked
    ]
    assert mixtures == [(1.0, 2.0, 0, 1.0), (0.5, -1.0, 0, 0.0), (0.5, 3.0, 4, 0.0)]
    assert "α = 0.5, β(positive) = 3, temperature 0" in ended.out
    assert "α = 0.5, β(positive) = 3, onset 4, temperature 0" in ended.out


def test_alpha_counts_without_a_doctor(
    good: Cli, tiny_folder: Path, asked: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/alpha 0.5\nHi"))
    ended = good("chat", "--patient", tiny_folder, "--max-new-tokens", 1, *CPU)
    assert "α = 1, no doctor, temperature 1" in ended.err
    assert [(request.alpha, request.betas) for request in asked] == [(0.5, {})]


def test_compare_shows_patient_and_guided_and_goes_on_with_the_guided(chat, asked: list[Request]) -> None:
    ended = chat("/alpha 0.5", "/compare", "Hi", "/compare", "More")
    alone, guided, after = asked
    assert (alone.betas, alone.alpha) == ({}, 1.0)
    assert (guided.betas, guided.alpha) == ({"positive": 2.0}, 0.5)
    assert alone.messages == guided.messages
    assert after.messages[: len(guided.messages)] == guided.messages
    assert "patient" in ended.out
    assert "guided (α = 0.5, β(positive) = 2" in ended.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/wave", "there is no /wave; /help lists what there is"),
        ("/alpha high", "/alpha takes a number, got 'high'"),
        ("/alpha nan", "/alpha takes a number, got 'nan'"),
        ("/beta kind 1", "say which doctor: /beta NAME X; loaded: positive"),
        ("/onset -1", "/onset takes a whole number from 0 to 999999, got '-1'"),
        ("/temperature -1", "temperature must be 0 (greedy) or at least 1e-05, got -1.0"),
        ("7" * 600, "leaves no room"),
    ],
)
def test_a_mistake_is_told_and_the_chat_goes_on(chat, asked: list[Request], line: str, message: str) -> None:
    ended = chat("Hi", line, "Still there?")
    assert message in ended.err
    assert asked[-1].messages[-1]["content"] == "Still there?"
    assert [message["role"] for message in asked[-1].messages] == ["system", "user", "assistant", "user"]


def test_bytes_that_are_not_utf8_cost_their_turn_alone(
    good: Cli, tiny_folder: Path, asked: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi\ncaf\xe9\nCaf\xc3\xa9\n"), encoding="utf-8"))
    ended = good("chat", "--patient", tiny_folder, "--max-new-tokens", 1, *CPU)
    assert r"llmdoctor: 'caf\udce9' is not text in UTF-8" in ended.err
    assert [request.messages[-1]["content"] for request in asked][::2] == ["Hi", "Café"]
    assert len(asked[-1].messages) == 3


@pytest.mark.parametrize("closed", [True, False])
def test_without_a_standard_input_there_is_no_chat(cli: Cli, monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    stream = io.StringIO() if closed else None
    if stream is not None:
        stream.close()
    monkeypatch.setattr("sys.stdin", stream)
    ended = cli("chat", "--patient", "./none")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == "llmdoctor: error: standard input is closed, and a chat reads its turns from it\n"


def test_help_and_quit(chat, asked: list[Request]) -> None:
    ended = chat("/help", "/quit", "Not asked")
    for name in ("/alpha", "/beta", "/onset", "/temperature", "/compare", "/system", "/reset", "/quit"):
        assert name in ended.out
    assert not asked


def test_an_interrupted_answer_is_forgotten(chat, asked: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = GuidedDecoder.stream

    def interrupted(self: GuidedDecoder, request: Request):
        if request.messages[-1]["content"] == "Stop this":
            raise KeyboardInterrupt
        return stream(self, request)

    monkeypatch.setattr(GuidedDecoder, "stream", interrupted)
    ended = chat("Hi", "Stop this", "Go on")
    assert "stopped; that turn is forgotten" in ended.err
    assert "Stop this" not in [message["content"] for message in asked[-1].messages]
