"""Models that are no Llama: layers with a window or a state, ALiBi, caches of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import load
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide, lanes_of
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.errors import UserError
from llmdoctor.models.context import context_of
from llmdoctor.models.loading import LoadedModel

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
BEGINNING = "the cat sat on the mat and the dog ran " * 9


def made(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8))
    if kind == "lfm2":
        layers = ["conv", "full_attention"]
        return Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=layers, block_auto_adjust_ff_dim=False))
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, state_size=4, num_hidden_layers=2))
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=512)
        )  # fmt: skip
    if kind == "gpt_neo":
        return GPTNeoForCausalLM(
            GPTNeoConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=512,
                         attention_types=[[["global", "local"], 1]], window_size=8, initializer_range=0.2)
        )  # fmt: skip
    return MptForCausalLM(
        MptConfig(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=512, vocab_size=300)
    )


@pytest.fixture
def patient(request: pytest.FixtureRequest, tiny_folder: Path) -> LoadedModel:
    """The tiny model's tokenizer with another model of its size of vocabulary."""
    return replace(load(tiny_folder), model=made(request.param).eval().requires_grad_(False))


def whole_logps(model: Any, prompt: list[int], done: Completion) -> list[float]:
    ids = torch.tensor([prompt + done.token_ids])
    with torch.no_grad():
        logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return [float(logps[len(prompt) - 1 + place, token]) for place, token in enumerate(done.token_ids)]


@pytest.mark.parametrize("patient", ["gemma3", "lfm2", "mpt", "gpt_neo"], indirect=True)
def test_rows_come_and_go_and_say_what_the_model_says(patient: LoadedModel) -> None:
    """Prompts of all lengths, two of them alike and three that begin alike, four rows at a time: rows are dropped."""
    decoder = GuidedDecoder(patient, max_batch_size=4)
    decoder.encoder.stop_ids = frozenset()
    texts = ["Hi", "the cat sat on the mat", "Hi", *(BEGINNING + end for end in ("a", "b and " * 30, "c")), "zebra"]
    asked = [
        Request.from_text(text, sampling=SamplingParams(max_new_tokens=(3, 17, 9)[place % 3], seed=place))
        for place, text in enumerate(texts)
    ]
    for request, done in zip(asked, decoder.generate(asked), strict=True):
        prompt = decoder.encoder.prompt_ids(request.messages)
        assert len(done.token_ids) == request.sampling.max_new_tokens
        assert done.logps == pytest.approx(whole_logps(patient.model, prompt, done), abs=1e-3)


def test_of_other_angles_beyond_a_length_only_that_length_is_used() -> None:
    """LongRoPE's short and long factors: a row beside a longer one would be read by the other ones."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "partial_rotary_factor": 1.0}  # fmt: skip
    config = Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=64, pad_token_id=0)
    long = Phi3ForCausalLM(config)
    assert context_of(long) == 64
    assert context_of(Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0))) == 512


def test_attention_that_takes_no_mask_is_not_given_one(tiny_folder: Path) -> None:
    patient = replace(load(tiny_folder), model=made("gpt_neox").eval().requires_grad_(False))
    lane = Lane(lanes_of(patient, [])[0][0], [[5, 6, 7]], 8)
    lane.prefill()
    lane.need_full_attention()
    patient.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="has flash_attention_2 attention, which takes no mask of who sees whom"):
        lane.peek(torch.tensor([[5, 6]]))


def test_models_that_read_padding_are_refused(tiny_folder: Path) -> None:
    sizes = {**SIZES, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16}
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, block_types=["recurrent", "attention"]))
    decoder = GuidedDecoder(replace(load(tiny_folder), model=model.eval().requires_grad_(False)))
    with pytest.raises(UserError, match="RecurrentGemmaForCausalLM reads padding as if it were text"):
        decoder.generate([Request.from_text("Hi")])


@pytest.mark.parametrize("patient", ["gemma3", "lfm2", "mpt", "gpt_neo"], indirect=True)
def test_what_cannot_take_guesses_back_is_not_made_to_guess(patient: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"guesses cannot be made with \w+: it has layers"):
        GuidedDecoder(patient, [Guide("g", patient)], draft="doctors")


@pytest.mark.parametrize("patient", ["mamba"], indirect=True)
def test_a_state_of_its_own_kind_is_refused(patient: LoadedModel) -> None:
    """It would be lost from the second token on, without a word."""
    with pytest.raises(UserError, match="MambaForCausalLM keeps what it has read in a state of its own kind"):
        GuidedDecoder(patient).generate([Request.from_text("Hi")])
