"""Which layers are kept, and that what is kept is the patient's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tensors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmdoctor.errors import UserError
from llmdoctor.models.layers import (
    choose_layers,
    decoder_layers,
    keep_layers,
    lower_layers,
    parse_layers,
    small_config,
    weights_read,
)
from llmdoctor.models.loading import load_model

SMALL = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8,
}  # fmt: skip


def test_kept_layers_are_the_patients(deep_folder: Path) -> None:
    patient = load_model(str(deep_folder), dtype="float32", device="cpu").model
    before = tensors(patient)
    small = keep_layers(patient, [0, 2, 4])
    assert small.config.num_hidden_layers == 3
    for new, old in enumerate((0, 2, 4)):
        kept, original = small.model.layers[new], patient.model.layers[old]
        assert kept.self_attn.layer_idx == new, "the cache has one place a layer"
        theirs = dict(original.named_parameters())
        for name, parameter in kept.named_parameters():
            assert torch.equal(parameter, theirs[name])
            assert parameter.data_ptr() != theirs[name].data_ptr(), "training must not reach the patient"
    assert torch.equal(small.lm_head.weight, patient.lm_head.weight)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.generation_config.eos_token_id == patient.generation_config.eos_token_id
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(patient).items())


def test_the_small_model_is_the_patient_without_some_layers(deep_folder: Path) -> None:
    """The reference runs the patient with the other layers taken out of its own list."""
    ids = torch.arange(3, 15)[None]
    small = keep_layers(load_model(str(deep_folder), dtype="float32", device="cpu").model, [1, 3]).eval()
    cut = load_model(str(deep_folder), dtype="float32", device="cpu").model
    cut.model.layers = torch.nn.ModuleList([cut.model.layers[1], cut.model.layers[3]])
    cut.config.num_hidden_layers = 2
    with torch.no_grad():
        expected = cut(input_ids=ids, use_cache=False).logits
        assert torch.allclose(small(input_ids=ids, use_cache=False).logits, expected, atol=1e-5)
        # Token by token through the cache.
        step = small(input_ids=ids[:, :-1], use_cache=True)
        last = small(input_ids=ids[:, -1:], past_key_values=step.past_key_values).logits[:, -1]
    assert torch.allclose(last, expected[:, -1], atol=1e-5)


def test_lists_by_layer_are_cut_to_the_layers_kept() -> None:
    """Two windowed layers, then one that sees all: the last one must stay such a layer, at its new place."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SMALL, num_hidden_layers=3, layer_types=kinds, sliding_window=4, eos_token_id=[1, 2, 3])
    patient = Gemma3ForCausalLM(config).eval()
    small = keep_layers(patient, [0, 2])
    assert small.config.layer_types == ["sliding_attention", "full_attention"]
    assert small.config.eos_token_id == [1, 2, 3], "as many as layers, but no list by layer"
    assert config.layer_types == kinds, "the patient's own config stays"
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, patient.model.layers[2].mlp.up_proj.weight)


def test_biases_and_untied_heads_come_along() -> None:
    config = Qwen2Config(**SMALL, num_hidden_layers=3, tie_word_embeddings=False)
    patient = Qwen2ForCausalLM(config)
    small = keep_layers(patient, [2])
    assert torch.equal(small.model.layers[0].self_attn.q_proj.bias, patient.model.layers[2].self_attn.q_proj.bias)
    assert torch.equal(small.lm_head.weight, patient.lm_head.weight)
    # 20 × 16 of the input embedding are looked up, not read.
    assert weights_read(small) == sum(parameter.numel() for parameter in small.parameters()) - 320


def test_a_tied_head_is_read_once(deep_folder: Path) -> None:
    model = load_model(str(deep_folder), dtype="float32", device="cpu").model
    assert weights_read(model) == sum(parameter.numel() for parameter in model.parameters())


def test_other_architectures_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=3, n_head=2, n_positions=16))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel cannot be shrunk: its layers are not one list"):
        decoder_layers(model)


def test_layers_of_several_kinds_are_refused(deep_folder: Path) -> None:
    """A layer that has what a config of two layers gives no place to."""
    patient = load_model(str(deep_folder), dtype="float32", device="cpu").model
    patient.model.layers[3].mlp.up_proj = torch.nn.Linear(32, 48)
    keep_layers(patient, [0, 4])
    with pytest.raises(UserError, match=r"cannot be shrunk to the layers 0, 3: its layers are of several kinds"):
        keep_layers(patient, [0, 3])


def test_layers_are_not_taken_from_what_is_quantised(deep_folder: Path) -> None:
    patient = load_model(str(deep_folder), dtype="float32", device="cpu").model
    patient.is_quantized = True
    with pytest.raises(UserError, match=r"LlamaForCausalLM is quantised, and layers are trained from weights that are"):
        keep_layers(patient, [0, 4])


def test_first_layers_and_the_last() -> None:
    assert choose_layers(30, 5) == [0, 1, 2, 3, 29]
    assert lower_layers(30, 2) == [9, 19]
    assert lower_layers(2, 1) == [0]
    assert lower_layers(2, 0) == []
    assert lower_layers(3, 5) == [0, 1]
    assert lower_layers(1, 2) == []
    assert choose_layers(2, 1) == [1]
    for count in (0, 30, 31):
        with pytest.raises(UserError, match=f"at least 1 and fewer than the 30 there are, got {count}"):
            choose_layers(30, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "layer numbers with commas"),
        ("1,x", "layer numbers with commas"),
        ("-1", "layer numbers with commas"),
        ("2,1", "ascending numbers from 0 to 4"),
        ("1,1", "ascending numbers from 0 to 4"),
        ("0,5", "ascending numbers from 0 to 4"),
        ("0,1,2,3,4", "not all of them"),
    ],
)
def test_layers_that_cannot_be_kept(text: str, message: str) -> None:
    assert parse_layers("0, 4", 5) == [0, 4]
    with pytest.raises(UserError, match=message):
        parse_layers(text, 5)


def test_small_config_of_a_plain_model(deep_folder: Path) -> None:
    config: Any = LlamaConfig(num_hidden_layers=6)
    assert small_config(config, [0, 5]).num_hidden_layers == 2
    assert config.num_hidden_layers == 6
