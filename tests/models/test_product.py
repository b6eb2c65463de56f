"""Products by a copy that is laid out once: the same numbers, and never those of weights that are no more."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from tests.tiny import LORA, shaken
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from llmdoctor.decoding.guides import LaneSpec
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.network import network_of
from llmdoctor.models import product
from llmdoctor.models.doctor import Doctor
from llmdoctor.models.loading import load_model
from llmdoctor.models.logps import LogitsHead
from llmdoctor.models.product import Product, can_lay_out, free_memory, has_room, product_of

needs_layout = pytest.mark.skipif(
    not can_lay_out(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="no AVX-512: no copies are made"
)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def linear(bias: bool = False) -> nn.Linear:
    made = nn.Linear(64, 96, bias=bias).bfloat16()
    made.weight.copy_(bf16(96, 64))
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 65, 256, 257, 700])
def test_the_same_numbers_as_without_a_copy(rows: int, bias: bool) -> None:
    weight, offset, x = bf16(192, 96), bf16(192, seed=1) if bias else None, bf16(rows, 1, 96, seed=2)
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    got = Product(weight, offset)(x)
    assert got.dtype == torch.bfloat16
    assert got.shape == (rows, 1, 192)
    assert torch.allclose(got.double(), exact, rtol=2**-7, atol=1e-2)
    assert torch.allclose(got, F.linear(x, weight, offset), rtol=2**-7, atol=1e-2)


@needs_layout
def test_only_what_it_helps_is_copied() -> None:
    assert Product(bf16(8, 8)).laid_out
    assert not Product(bf16(8, 8), lay_out=False).laid_out
    assert not Product(bf16(8, 8).float()).laid_out


def merge(layer: nn.Linear) -> None:
    """As PEFT does it: torch counts no change."""
    before = layer.weight._version
    layer.weight.data += 0.1 * bf16(*layer.weight.shape, seed=3)
    assert layer.weight._version == before


def change_one(layer: nn.Linear) -> None:
    layer.weight[5, 7] = 40


def replace(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(-layer.weight)


def replace_data(layer: nn.Linear) -> None:
    layer.weight.data = -layer.weight.data


def change_bias(layer: nn.Linear) -> None:
    layer.bias.add_(1)


@pytest.mark.parametrize("change", [merge, change_one, replace, replace_data, change_bias])
def test_a_layer_that_was_changed_is_laid_out_anew(change: Any) -> None:
    layer, x = linear(bias=True), bf16(3, 64, seed=4)
    before = product_of(layer)(x)
    assert product_of(layer) is product_of(layer)
    change(layer)
    after = product_of(layer)(x)
    assert not torch.equal(after, before)
    assert torch.allclose(after, layer(x), rtol=2**-7, atol=1e-2)


def test_a_product_does_not_keep_its_layer_alive() -> None:
    layer = linear()
    product_of(layer)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_gradients_flow_through_a_prepared_head() -> None:
    head = LogitsHead(linear())
    head.prepare()
    x = bf16(2, 64).requires_grad_()
    with torch.enable_grad():
        head.logits(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0], head.weight.sum(0), rtol=2**-6, atol=0.1)


@needs_layout
def test_without_room_there_is_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 96 * 64 * 2 - 1))
    layer, x = linear(), bf16(3, 64)
    assert not product_of(layer).laid_out
    assert torch.equal(product_of(layer)(x), layer(x))
    decoder = tiny_llama().get_decoder()
    network = network_of(decoder)
    assert network is not None
    assert not any(part.product.laid_out for block in network._blocks for part in block.linears)
    monkeypatch.undo()
    assert product_of(linear()).laid_out


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert free_memory() == 1000
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == 1000
    (tmp_path / "memory.max").write_text("700\n")
    assert free_memory() == 400
    assert has_room(200)
    assert not has_room(201)


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    return LlamaForCausalLM(config).eval().bfloat16()


def logits_of(model: Any, head: LogitsHead) -> Tensor:
    return Lane(LaneSpec(model, None, head), [[5, 6, 7]], 4).prefill()  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj", "lm_head"])
@pytest.mark.parametrize("change", [merge, change_one, replace_data])
def test_a_model_that_was_changed_is_heard_in_the_next_answer(change: Any, layer: str) -> None:
    model = tiny_llama()
    head = LogitsHead.for_model(model)
    before = logits_of(model, head)
    assert torch.allclose(before, model(torch.tensor([[5, 6, 7]])).logits[:, -1].float(), atol=0.1)
    change(model.get_submodule(layer))
    after = logits_of(model, head)
    assert not torch.allclose(after, before, atol=0.1)
    assert torch.allclose(after, model(torch.tensor([[5, 6, 7]])).logits[:, -1].float(), atol=0.1)


@torch.enable_grad()
def test_an_adapter_merged_into_a_model_that_has_decoded_is_heard(tiny_folder: Path) -> None:
    loaded = load_model(str(tiny_folder), dtype="bfloat16", device="cpu")
    head = LogitsHead.for_model(loaded.model)
    with torch.no_grad():
        before = logits_of(loaded.model, head)
    doctor = shaken(Doctor.from_base(loaded, lora=LORA, seed=1))
    merged = doctor.merged().model
    with torch.no_grad():
        after = logits_of(merged, LogitsHead.for_model(merged))
        expected = merged(torch.tensor([[5, 6, 7]])).logits[:, -1].float()
    assert not torch.allclose(after, before, atol=0.05)
    assert torch.allclose(after, expected, atol=0.05 * float(expected.abs().max()))


def test_a_head_that_is_more_than_its_weights_is_called() -> None:
    """A hook, as accelerate's, or another kind of layer, as quantized ones are."""
    model = tiny_llama()
    head = LogitsHead.for_model(model)
    before = logits_of(model, head)
    hook = model.lm_head.register_forward_hook(lambda module, arguments, output: output + 1)
    assert torch.allclose(logits_of(model, head), before + 1, atol=0.05)
    hook.remove()
    assert torch.equal(logits_of(model, head), before)

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.lm_head.__class__ = Twice
    assert torch.allclose(logits_of(model, head), 2 * before, atol=0.05)
