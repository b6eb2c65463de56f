"""How much memory a cache holds: what is in it and a little more, whatever could still come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.decoding.test_lane import close, whole
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from llmdoctor.decoding.cache import InPlaceLayer
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import lanes_of
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.models.loading import LoadedModel, load_model

PROMPTS = [[5, 9, 200], [40, 41, 42, 43, 44, 45, 46]]


def columns(lane: Lane) -> set[int]:
    """Columns that the layers have memory for."""
    return {layer._buffers[0].shape[-2] for layer in lane._cache.layers}


@torch.inference_mode()
def test_memory_follows_the_tokens_that_are_there(tiny_model: LoadedModel) -> None:
    spec = lanes_of(tiny_model, [])[0][0]
    lane = Lane(spec, PROMPTS, 100_000)
    lane.prefill()
    generator = torch.Generator().manual_seed(0)
    rows = [list(prompt) for prompt in PROMPTS]
    held = [columns(lane)]
    for number in range(400):
        tokens = torch.randint(300, (2,), generator=generator)
        logits = lane.step(tokens)
        held.append(columns(lane))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        # Around the places where the buffers were made anew, and at the end.
        if held[-1] != held[-2] or number == 399:
            for row, got in zip(rows, logits, strict=True):
                close(got, whole(spec, row))
    for number, capacity in enumerate(held):
        used = len(PROMPTS[1]) + number
        assert used <= min(capacity)
        assert max(capacity) <= max(used + 64, 1.25 * used)
    assert len(set(map(frozenset, held))) < 8, "copied more often than a growing buffer should be"


def test_what_can_come_is_the_most_that_is_spare() -> None:
    layer = InPlaceLayer(8)
    states = torch.zeros(1, 1, 5, 2)
    layer.update(states, states)
    assert layer._buffers is not None
    assert layer._buffers[0].shape[-2] == 8


@torch.inference_mode()
def test_rows_that_join_make_no_room_for_all_that_can_come(tiny_model: LoadedModel) -> None:
    spec = lanes_of(tiny_model, [])[0][0]
    lane, other = Lane(spec, PROMPTS, 9), Lane(spec, [[7] * 20], 9)
    lane.prefill()
    other.prefill()
    lane.join(other, 100_000)
    assert columns(lane) == {20 + 64}
    logits = lane.step(torch.tensor([1, 2, 3]))
    for row, got in zip(([*PROMPTS[0], 1], [*PROMPTS[1], 2], [7] * 20 + [3]), logits, strict=True):
        close(got, whole(spec, row))


@torch.inference_mode()
def test_no_more_is_spare_than_can_still_come(tiny_model: LoadedModel) -> None:
    """400 tokens of a prompt and 100 more make 500 columns, however often the buffers were made anew."""
    spec = lanes_of(tiny_model, [])[0][0]
    lane = Lane(spec, [[7] * 400], 100)
    lane.prefill()
    for _ in range(100):
        lane.step(torch.tensor([3]))
    assert columns(lane) == {500}
    # More than was foreseen has its place, too, and not one column at a time.
    lane.step(torch.tensor([4]))
    assert columns(lane) == {501 + 64}


def test_a_window_keeps_its_columns_when_the_longest_row_leaves(
    tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    decoder = GuidedDecoder(load_model(str(tmp_path), dtype="float32", device="cpu"))
    asked = [request("the cat sat on the mat " * 20, 3, seed) for seed in (0, 1)]
    asked += [request("Hi", 40, seed) for seed in range(2, 6)]
    alone = [decoder.generate([one])[0].token_ids for one in asked]
    assert [done.token_ids for done in decoder.generate(asked)] == alone


def request(text: str, tokens: int, seed: int) -> Request:
    return Request.from_text(text, sampling=SamplingParams(max_new_tokens=tokens, seed=seed))


def test_the_longest_row_takes_its_columns_with_it(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    step = Lane.step_states

    def seen(self: Lane, *args: Any) -> Tensor:
        states = step(self, *args)
        widths.append(self.mask.shape[1])
        return states

    decoder = GuidedDecoder(tiny_model)
    asked = [request("the cat sat on the mat " * 20, 3, seed) for seed in (0, 1)]
    asked += [request("Hi", 40, seed) for seed in range(2, 6)]
    alone = [decoder.generate([one])[0].token_ids for one in asked]
    monkeypatch.setattr(Lane, "step_states", seen)
    assert [done.token_ids for done in decoder.generate(asked)] == alone
    assert max(widths) > 100, "the long prompts were not among the others"
    assert max(widths[4:]) < 70
