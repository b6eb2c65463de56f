"""Rows that come and go while others are decoded: continuous batches, memory that runs out, streams that are left."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import fresh_doctor, save_tiny, shaken
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from llmdoctor.decoding import engine
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide, load_guide
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.decoding.ward import Ward
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel, load_model

TEXTS = ["Hi", "the cat sat on the mat and the dog ran", "zebra? é 7", "how are you today, and " * 5]


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path, patient: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> GuidedDecoder:
    """The patient with a doctor beside it, three rows at a time."""
    folder = tmp_path_factory.mktemp("ward") / "doctor"
    shaken(fresh_doctor(load_model(str(tiny_folder), dtype="float32", device="cpu"))).save_pretrained(folder)
    return GuidedDecoder(patient, [load_guide(folder, patient, name="kind")], max_batch_size=3)


def requests(count: int = 14) -> list[Request]:
    """Of all lengths from 1 to 37 tokens, some guided, one with a repetition penalty, with and without temperature."""
    return [
        Request.from_text(
            TEXTS[place % 4],
            betas={"kind": float(place % 3)},
            sampling=SamplingParams(
                max_new_tokens=1 + 36 * (place % 5) // 4,
                seed=place,
                temperature=0.0 if place % 4 == 1 else 1.0,
                repetition_penalty=1.3 if place % 7 == 2 else 1.0,
            ),
        )
        for place in range(count)
    ]


def same(one: Completion, other: Completion) -> None:
    assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
    assert one.logps == pytest.approx(other.logps, abs=1e-3)
    assert one.patient_logps == pytest.approx(other.patient_logps, abs=1e-3)
    assert (one.patient_forwards, one.guide_forwards) == (other.patient_forwards, other.guide_forwards)


def alone(decoder: GuidedDecoder) -> list[Completion]:
    """Each request by itself; those that share the batch with guided ones count a pass of the guide all the same."""
    found = [decoder.generate([request])[0] for request in requests()]
    for done in found:
        done.guide_forwards = len(done.token_ids)
    return found


class Patience:
    """Gives requests up, each when it has been asked of so many times before."""

    def __init__(self, limits: dict[int, int]) -> None:
        self.limits = limits
        self.asked: Counter[int] = Counter()
        self.heard: dict[int, Completion] = {}

    def on_done(self, index: int, done: Completion) -> None:
        assert index not in self.heard, "reported twice"
        self.heard[index] = done

    def __call__(self, index: int) -> bool:
        assert index not in self.heard, "asked of one that is finished"
        self.asked[index] += 1
        return self.asked[index] > self.limits.get(index, 1000)

    def generate(self, decoder: GuidedDecoder, asked: list[Request]) -> list[Completion]:
        found = decoder.generate(asked, on_done=self.on_done, cancelled=self)
        assert [self.heard[index] for index in range(len(asked))] == found
        return found


def began(whole: Completion, found: Completion, decoder: GuidedDecoder) -> None:
    """`found` was given up on its way to `whole`."""
    count = len(found.token_ids)
    assert found.finish_reason == "cancelled"
    assert found.token_ids == whole.token_ids[:count] != whole.token_ids
    assert found.text == decoder.encoder.decode(found.token_ids)
    assert found.logps == pytest.approx(whole.logps[:count], abs=1e-3)
    assert len(found.patient_logps) == len(found.drawn_logps) == found.patient_forwards == count


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that is taken from now on."""
    steps: list[int] = []
    inner = Lane.step_states

    def step(self: Lane, tokens: Tensor, active: Any = None) -> Tensor:
        steps.append(len(tokens))
        return inner(self, tokens, active)

    monkeypatch.setattr(Lane, "step_states", step)
    return steps


def test_rows_that_join_are_as_if_alone(decoder: GuidedDecoder) -> None:
    heard: list[int] = []
    got = decoder.generate(requests(), on_done=lambda index, _: heard.append(index))
    assert sorted(heard) == list(range(len(got)))
    for one, other in zip(got, alone(decoder), strict=True):
        same(one, other)


def test_a_free_place_is_taken(patient: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One long answer and eight short ones, two places: the short ones pass through the second place.

    Every answer of n tokens takes n − 1 steps. In batches of two that wait for each other, the long one would be
    accompanied by one short one only, and the other seven would take four batches of their own.
    """
    steps = counting(monkeypatch)
    decoder = GuidedDecoder(patient, max_batch_size=2)
    decoder.encoder.stop_ids = frozenset()
    done = decoder.generate(
        [Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=n, seed=n)) for n in [40, *[5] * 8]]
    )
    assert [len(one.token_ids) for one in done] == [40, *[5] * 8]
    assert len(steps) == 39
    assert max(steps) == 2


def test_a_model_that_sees_a_window_waits_for_the_batch(patient: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can join rows whose cache is a window; the answers are right nevertheless."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
    model = MistralForCausalLM(MistralConfig(vocab_size=300, sliding_window=4, **sizes)).eval()
    windowed = LoadedModel(model, patient.tokenizer, "windowed", dict(patient.fingerprint))
    asked = [Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=3 + 4 * n, seed=n)) for n in range(5)]
    together = GuidedDecoder(windowed, max_batch_size=2).generate(asked)
    for one, request in zip(together, asked, strict=True):
        same(one, GuidedDecoder(windowed).generate([request])[0])


@pytest.mark.parametrize("cpu", [True, False])
def test_out_of_memory_shrinks_the_batch(
    decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cpu: bool
) -> None:
    """Steps of three rows fail, on a CPU by a real allocation that cannot be had; the answers are those of before."""
    inner = Lane.step_states
    failures = 0

    def step(self: Lane, tokens: Tensor, active: Any = None) -> Tensor:
        nonlocal failures
        if len(tokens) > 2:
            failures += 1
            if cpu:
                torch.empty(1 << 50)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, tokens, active)

    expected = alone(decoder)
    monkeypatch.setattr(Lane, "step_states", step)
    with caplog.at_level(logging.WARNING, logger="llmdoctor"):
        got = decoder.generate(requests())
    assert failures == 1
    assert [record.getMessage() for record in caplog.records] == ["Out of memory: going on with 1 rows at a time."]
    for one, other in zip(got, expected, strict=True):
        same(one, other)


def test_out_of_memory_in_the_midst_keeps_what_was_said(
    decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tenth step fails: rows go on from their own tokens, which are not drawn again."""
    inner = Lane.step_states
    steps = 0

    def step(self: Lane, tokens: Tensor, active: Any = None) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, tokens, active)

    expected = alone(decoder)
    monkeypatch.setattr(Lane, "step_states", step)
    for one, other in zip(decoder.generate(requests()), expected, strict=True):
        same(one, other)


def test_no_memory_for_a_single_row(decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Lane, tokens: Tensor, active: Any = None) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "step_states", step)
        with pytest.raises(UserError, match=r"out of memory with a single prompt of \d+ tokens"):
            decoder.generate(requests()[1:2])
    other = RuntimeError("something else")
    monkeypatch.setattr(Lane, "step_states", lambda *_: (_ for _ in ()).throw(other))
    with pytest.raises(RuntimeError, match="something else"):
        decoder.generate(requests())


def test_a_row_that_is_alone_is_tried_once_more(
    decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One step fails, perhaps for what other rows left behind: with all memory free again it goes on."""
    inner, steps = Lane.step_states, 0

    def step(self: Lane, tokens: Tensor, active: Any = None) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, tokens, active)

    (expected,) = decoder.generate(requests()[1:2])
    monkeypatch.setattr(Lane, "step_states", step)
    same(decoder.generate(requests()[1:2])[0], expected)
    assert steps > 5
    assert [record.getMessage() for record in caplog.records] == ["Out of memory: going on with 1 rows at a time."]


def test_a_prompt_that_memory_cannot_hold_ends_alone(
    decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its row says so; the others, longer batches among them, get what they get without it."""
    asked = requests()
    expected = alone(decoder)
    read, sizes = Lane.prefill_states, []

    def prefill(self: Lane) -> Tensor:
        if any("how are you" in text for text in map(decoder.encoder.decode, self._ids.tolist())):
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(self._source))
        return read(self)

    monkeypatch.setattr(Lane, "prefill_states", prefill)
    done = decoder.generate(asked)
    too_long = [request.messages[0]["content"] == TEXTS[3] for request in asked]
    assert 0 < sum(too_long) < len(asked) - 3
    for fails, one, other in zip(too_long, done, expected, strict=True):
        if fails:
            assert (one.finish_reason, one.token_ids) == ("error", [])
        else:
            same(one, other)
    told = [record.getMessage() for record in caplog.records if "ends with an error" in record.getMessage()]
    assert len(told) == sum(too_long)
    assert told[0].startswith("Prompt 4 ends with an error: out of memory with a single prompt of")


def test_a_stream_that_is_left_harms_nobody(decoder: GuidedDecoder) -> None:
    request = Request.from_text("Hi", betas={"kind": 1.0}, sampling=SamplingParams(max_new_tokens=30, seed=2))
    expected = decoder.generate([request])[0]
    stream = decoder.stream(request)
    next(stream)
    stream.close()
    same(decoder.generate([request])[0], expected)


def test_an_interrupt_between_tokens_ends_the_work(decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished before has been reported, and the next call starts afresh."""
    expected = decoder.generate(requests())
    heard: dict[int, Completion] = {}
    inner = engine.GuidedDecoder._draw_block
    draws = 0

    def draw(*arguments: Any) -> Tensor:
        nonlocal draws
        draws += 1
        if draws == 20:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine.GuidedDecoder, "_draw_block", draw)
        with pytest.raises(KeyboardInterrupt):
            decoder.generate(requests(), on_done=heard.__setitem__)
    assert 0 < len(heard) < len(expected)
    for index, done in heard.items():
        same(done, expected[index])
    for one, other in zip(decoder.generate(requests()), expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("fails_at", [None, 4, 10])
def test_given_up_rows_go_and_the_others_stay(
    decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch, fails_at: int | None
) -> None:
    """Some while they wait, some at their first token, some later, some too late; also where memory runs out."""
    inner = Lane.step_states
    steps = 0

    def step(self: Lane, tokens: Tensor, active: Any = None) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, tokens, active)

    expected = alone(decoder)
    monkeypatch.setattr(Lane, "step_states", step)
    limits = {0: 0, 3: 12, 4: 60, 6: 3, 8: 9, 9: 25, 12: 2, 13: 0}
    found = Patience(limits).generate(decoder, requests())
    assert fails_at is None or steps > fails_at
    given_up = [index for index, done in enumerate(found) if done.finish_reason == "cancelled"]
    assert len(given_up) >= 5
    assert set(given_up) < set(limits)
    assert any(found[index].token_ids for index in given_up)
    assert any(not found[index].token_ids for index in given_up)
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        if index in given_up:
            began(one, other, decoder)
        else:
            same(one, other)


def test_a_round_asks_once_of_each(patient: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One place. The second waits for the 4 rounds of the first, and is given up at the beginning of its own third one,
    in which the third takes its place. An answer of n tokens takes n rounds, the first of them without a step."""
    steps = counting(monkeypatch)
    decoder = GuidedDecoder(patient, max_batch_size=1)
    decoder.encoder.stop_ids = frozenset()
    patience = Patience({1: 4 + 2})
    found = patience.generate(
        decoder, [Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=n, seed=n)) for n in [4, 40, 5, 0]]
    )
    assert [len(done.token_ids) for done in found] == [4, 2, 5, 0]
    assert [done.finish_reason for done in found] == ["length", "cancelled", "length", "length"]
    assert patience.asked == {0: 4, 1: 4 + 2 + 1, 2: 4 + 2 + 5}
    assert len(steps) == 3 + 1 + 4


@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_all_may_be_given_up_at_once(decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    steps = counting(monkeypatch)
    expected = alone(decoder)
    steps.clear()
    found = Patience(dict.fromkeys(range(14), rounds)).generate(decoder, requests())
    assert len(steps) <= 2 * rounds, "one step a round of the patient and of its doctor"
    assert sum(bool(done.token_ids) for done in found) >= min(rounds, 3)
    for one, other in zip(expected, found, strict=True):
        if other.finish_reason == "cancelled":
            began(one, other, decoder)
        else:
            same(one, other)


def test_given_up_in_the_midst_of_a_round(decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a round's passes and its draws, by another thread perhaps: the round's token is still drawn."""
    given_up: set[int] = set()
    inner = engine.GuidedDecoder._draw
    rounds = 0

    def draw(*arguments: Any) -> None:
        nonlocal rounds
        rounds += 1
        given_up.update({3: [2], 6: range(14)}.get(rounds, []))
        inner(*arguments)

    expected = alone(decoder)
    monkeypatch.setattr(engine.GuidedDecoder, "_draw", draw)
    heard: list[int] = []
    found = decoder.generate(
        requests(), on_done=lambda index, _: heard.append(index), cancelled=lambda index: index in given_up
    )
    assert rounds == 6
    assert sorted(heard) == list(range(14))
    assert max(len(done.token_ids) for done in found) == 6
    for one, other in zip(expected, found, strict=True):
        if other.finish_reason == "cancelled":
            began(one, other, decoder)
        else:
            same(one, other)


def test_rows_that_end_as_memory_does_are_reported(decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block of a round fails after the first one's row has drawn its last token."""
    inner = Ward.logits
    failures = 0

    def logits(self: Ward, places: Any, nodes: Any) -> list[Tensor]:
        nonlocal failures
        if not failures and any(row.done and not row.reported for row in self.rows):
            failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, places, nodes)

    expected = alone(decoder)
    monkeypatch.setattr(engine, "_BLOCK", 1)
    monkeypatch.setattr(Ward, "logits", logits)
    for one, other in zip(expected, Patience({}).generate(decoder, requests()), strict=True):
        same(one, other)
    assert failures == 1


def test_what_a_doctors_logits_are_up_to_does_not_decide_how_hard_repetition_is_penalised(
    tiny_folder: Path, patient: LoadedModel
) -> None:
    """All of them 20 higher or lower are the same distribution, in the product form, too."""
    doctor = load_model(str(tiny_folder), dtype="float32", device="cpu")
    with torch.no_grad():
        torch.manual_seed(3)
        for parameter in doctor.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def answers(constant: float) -> list[list[int]]:
        decoder = GuidedDecoder(patient, [Guide("g", doctor)])
        lane = decoder.lanes[1]
        lane.head = copy.copy(lane.head)
        lane.head.finish = lambda logits: logits + constant
        asked = [
            Request.from_text("Hi", betas={"g": 1.0}, sampling=SamplingParams(max_new_tokens=20, seed=seed, **options))
            for seed in range(4)
            for options in ({"repetition_penalty": 1.3}, {})
        ]
        return [done.token_ids for done in decoder.generate(asked)]

    assert answers(0.0) == answers(20.0) == answers(-20.0)


def test_who_is_not_guided_draws_the_same_beside_a_doctor_of_fewer_tokens(
    tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The patient has 40 columns of padding behind its tokens, which the doctor lacks."""
    wide = load_model(str(save_tiny(tmp_path / "wide", tiny_tokenizer, extra_rows=40)), dtype="float32", device="cpu")
    doctor = load_model(str(tiny_folder), dtype="float32", device="cpu")
    decoder = GuidedDecoder(wide, [Guide("g", doctor)])
    decoder.encoder.stop_ids = frozenset()
    asked = [
        Request.from_text("Hi", betas={}, sampling=SamplingParams(max_new_tokens=20, seed=seed)) for seed in range(6)
    ]
    guided = Request.from_text("Hi", betas={"g": 1.0}, sampling=SamplingParams(max_new_tokens=20))
    together = decoder.generate([*asked, guided])[:6]
    for one, other in zip(decoder.generate(asked), together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.patient_logps == pytest.approx(other.patient_logps, abs=1e-3)


def test_a_seed_of_numpys_is_a_seed(decoder: GuidedDecoder) -> None:
    asked = [
        Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=5, seed=seed))
        for seed in (7, np.int64(7), np.random.default_rng(0).integers(1 << 31, 1 << 62))
    ]
    first, second, _ = decoder.generate(asked)
    assert first.token_ids == second.token_ids
