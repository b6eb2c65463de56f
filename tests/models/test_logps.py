"""Log-probabilities of given tokens: heads, chunks and gradients against plain log_softmax."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from llmdoctor.errors import UserError
from llmdoctor.models import logps as module
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.logps import (
    LogitsFinish,
    LogitsHead,
    completion_states,
    per_token_logps,
    position_ids,
)

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(name: str, **changes: Any) -> Any:
    """A tiny random causal LM of an architecture, in evaluation mode."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**(TINY | changes))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


ARCHITECTURES = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}),
    "biased": ("Phi", {}),
    "capped": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "multiplied": ("Cohere", {"logit_scale": 0.25}),
    "divided": ("Granite", {"logits_scaling": 4.0}),
}


def freeze(linear: nn.Linear, frozen: bool = True) -> None:
    for parameter in linear.parameters():
        parameter.requires_grad_(not frozen)


def selected_and_gradient(head: LogitsHead, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    out = head.selected_logps(hidden, labels)
    (out * torch.arange(1, len(labels) + 1)).sum().backward()
    assert hidden.grad is not None
    return out.detach(), hidden.grad


def plain_and_gradient(linear: nn.Linear, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64 through torch's own log_softmax."""
    hidden = hidden.double().requires_grad_()
    bias = None if linear.bias is None else linear.bias.double()
    out = nn.functional.linear(hidden, linear.weight.double(), bias).log_softmax(-1)
    out = out.gather(-1, labels[:, None])[:, 0]
    (out * torch.arange(1, len(labels) + 1)).sum().backward()
    assert hidden.grad is not None
    return out.detach(), hidden.grad


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def head(request: pytest.FixtureRequest) -> LogitsHead:
    torch.manual_seed(0)
    linear = nn.Linear(16, 50, bias=request.param)
    nn.init.normal_(linear.weight)
    freeze(linear)
    return LogitsHead(linear)


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(13, 16, generator=generator), torch.randint(0, 50, (13,), generator=generator)


def test_a_frozen_head_has_the_gradient_of_log_softmax(head: LogitsHead, states: tuple[Tensor, Tensor]) -> None:
    out, gradient = selected_and_gradient(head, *states)
    expected, expected_gradient = plain_and_gradient(head.linear, *states)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in head.linear.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_likely_token_is_no_rounding(dtype: torch.dtype) -> None:
    """W[y] − Σ_v p_v W[v] is small where the token is likely: subtracted after the product, it would be noise."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 500, bias=False).to(dtype).requires_grad_(False)
    direction = torch.nn.functional.normalize(linear.weight[7].float(), dim=0)
    hidden = torch.stack([direction * scale for scale in (18.0, 24.0, 30.0)]).to(dtype)
    labels = torch.full((3,), 7)
    _, gradient = selected_and_gradient(LogitsHead(linear), hidden, labels)
    expected, exact = plain_and_gradient(copy.deepcopy(linear).double(), hidden.double(), labels)
    assert (expected.exp() > 0.99).sum() >= 1
    errors = (gradient.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(errors.max()) < 0.05, (expected.exp(), errors)


def test_a_frozen_head_in_float64_is_exact_to_float32_output(head: LogitsHead, states: tuple[Tensor, Tensor]) -> None:
    """The gradient of a float64 model is carried in float64, though logits are taken in float32."""
    head.linear.double()
    hidden, labels = states[0].double(), states[1]
    _, gradient = selected_and_gradient(head, hidden, labels)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(gradient, plain_and_gradient(head.linear, hidden, labels)[1], rtol=1e-4, atol=1e-4)


def test_a_frozen_head_in_half_precision_keeps_the_hidden_states_dtype(states: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 50).bfloat16()
    freeze(linear)
    hidden, labels = states[0].bfloat16(), states[1]
    out, gradient = selected_and_gradient(LogitsHead(linear), hidden, labels)
    expected, expected_gradient = plain_and_gradient(linear, hidden, labels)
    assert out.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0.05, atol=0.05)


def test_a_trainable_head_gets_its_gradient_too(head: LogitsHead, states: tuple[Tensor, Tensor]) -> None:
    freeze(head.linear, frozen=False)
    out, gradient = selected_and_gradient(head, *states)
    weight_gradient = head.linear.weight.grad
    assert weight_gradient is not None
    head.linear.zero_grad()
    expected, expected_gradient = plain_and_gradient(head.linear, *states)
    assert head.linear.weight.grad is not None
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight_gradient, head.linear.weight.grad, rtol=1e-3, atol=1e-3)


def test_a_trainable_head_learns_from_states_without_gradient(head: LogitsHead, states: tuple[Tensor, Tensor]) -> None:
    freeze(head.linear, frozen=False)
    head.selected_logps(*states).sum().backward()
    assert head.linear.weight.grad is not None
    assert head.linear.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("finish", [None, LogitsFinish(scale=0.5, cap=2.0)])
@pytest.mark.parametrize("tokens", [1, 4, 13, 100])
def test_chunks_change_nothing(
    head: LogitsHead,
    states: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    finish: LogitsFinish | None,
    frozen: bool,
) -> None:
    head.finish = finish
    freeze(head.linear, frozen)
    whole, whole_gradient = selected_and_gradient(head, *states)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 50 * tokens)
    chunked, chunked_gradient = selected_and_gradient(head, *states)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(chunked_gradient, whole_gradient)


@pytest.mark.parametrize("finish", [None, LogitsFinish(scale=0.5), LogitsFinish(scale=0.5, cap=2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_gradient_the_values_are_log_softmaxs(
    head: LogitsHead,
    states: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    finish: LogitsFinish | None,
    dtype: torch.dtype,
) -> None:
    """Where scale, cap and exponentials are written over the logits, chunk after chunk."""
    head.linear.to(dtype)
    head.finish = finish
    hidden, labels = states[0].to(dtype), states[1]
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 50 * 4)
    with torch.no_grad():
        out = head.selected_logps(hidden, labels)
        logits = head.linear.double()(hidden.double())
    if finish is not None:
        logits = finish(logits)
    expected = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert out.dtype == torch.float32
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_chunk_is_never_empty_however_large_the_vocabulary(
    head: LogitsHead, states: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    assert head.selected_logps(*states).shape == (13,)


def test_one_chunk_of_logits_is_alive_at_a_time(
    head: LogitsHead, states: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No path computes logits of more tokens at once than a chunk holds."""
    seen: list[int] = []

    class Counting(module._Workspace):
        def logits(self, hidden: Tensor) -> Tensor:
            seen.append(len(hidden))
            return super().logits(hidden)

    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 50 * 4)
    monkeypatch.setattr(module, "_Workspace", Counting)
    selected_and_gradient(head, *states)
    assert seen == [4, 4, 4, 1]
    seen.clear()
    with torch.no_grad():
        head.selected_logps(*states)
    assert seen == [4, 4, 4, 1]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("frozen", [True, False])
def test_every_architectures_head_equals_its_own_logits(name: str, frozen: bool) -> None:
    """Values and the gradient at the hidden states, which runs through cap and scale."""
    architecture, changes = ARCHITECTURES[name]
    model = tiny(architecture, **changes)
    model.requires_grad_(not frozen)
    head = LogitsHead.for_model(model)
    assert (head.finish is None) == (name not in ("capped", "multiplied", "divided"))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.detach()
    expected = model(input_ids=ids, use_cache=False).logits[0, :-1].detach().double().log_softmax(-1)
    expected = expected.gather(-1, ids[0, 1:, None])[:, 0]
    mine = hidden.clone().requires_grad_()
    out = per_token_logps(mine, head, ids[:, 1:], torch.ones(1, 5))
    torch.testing.assert_close(out[0].detach().double(), expected, rtol=1e-4, atol=1e-4)

    out.sum().backward()
    plain = hidden.clone().requires_grad_()
    logits = nn.functional.linear(plain, head.linear.weight, head.linear.bias)
    if name == "capped":
        logits = 3.0 * torch.tanh(logits / 3.0)
    if name in ("multiplied", "divided"):
        logits = logits / 4.0
    logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum().backward()
    assert mine.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + 0.5,
        lambda logits: logits * 1.01,
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: logits.flip(-1),
    ],
    ids=["shifted", "scaled by 1 %", "capped far above", "reordered"],
)
def test_a_model_whose_logits_are_something_else_is_refused(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama")
    forward = model.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    monkeypatch.setattr(model, "forward", other)
    with pytest.raises(UserError, match=r"LlamaForCausalLM: logits are not head\(hidden state\)"):
        LogitsHead.for_model(model)


def test_broken_weights_are_one_clear_line() -> None:
    model = tiny("Llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="LlamaForCausalLM computes numbers that are not finite: its weights"):
        LogitsHead.for_model(model)


@pytest.mark.parametrize("name", ["llama", "capped", "multiplied"])
def test_half_precision_is_recognised_and_training_mode_kept(name: str) -> None:
    architecture, changes = ARCHITECTURES[name]
    model = tiny(architecture, **changes).bfloat16().train()
    LogitsHead.for_model(model)
    assert model.training


def test_states_and_labels_are_brought_to_the_head() -> None:
    """With a model over several devices they may lie elsewhere; the meta device stands for one."""

    class Elsewhere:
        weight = torch.empty(50, 16, device="meta")

        def selected_logps(self, hidden: Tensor, labels: Tensor) -> Tensor:
            assert hidden.device == labels.device == self.weight.device
            return -torch.arange(1.0, len(hidden) + 1)

    mask = torch.tensor([[1, 0], [1, 1]])
    found = per_token_logps(torch.zeros(2, 3, 16), Elsewhere(), torch.zeros(2, 2, dtype=torch.long), mask)
    assert found.tolist() == [[-1, 0], [-2, -3]]


def test_masked_tokens_are_zero_without_gradient_and_never_computed(
    head: LogitsHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    hidden[0, 2] = torch.nan
    hidden[:, 3] = torch.nan
    hidden.requires_grad_()
    labels = torch.tensor([[3, 4, 5], [6, 7, 8]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    counts: list[int] = []
    selected = head.selected_logps
    monkeypatch.setattr(head, "selected_logps", lambda h, y: counts.append(len(h)) or selected(h, y))
    out = per_token_logps(hidden, head, labels, mask)
    assert counts == [5]
    for row, tokens in ((0, 2), (1, 3)):
        expected = head.logits(hidden[row, :tokens]).log_softmax(-1).gather(-1, labels[row, :tokens, None])[:, 0]
        torch.testing.assert_close(out[row, :tokens], expected)
    assert out[0, 2] == 0
    out.sum().backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())
    assert hidden.grad[0, 2].count_nonzero() == 0
    assert hidden.grad[:, 3].count_nonzero() == 0


def test_no_tokens_at_all(head: LogitsHead) -> None:
    hidden = torch.randn(1, 3, 16, requires_grad=True)
    assert per_token_logps(hidden, head, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2)).tolist() == [[0, 0]]


def test_states_begin_at_the_last_prompt_token() -> None:
    """P = 3, L = 2: s_0 is column 2, s_2 the last."""
    hidden = torch.arange(5.0)[None, :, None]
    assert completion_states(hidden, 3)[0, :, 0].tolist() == [2.0, 3.0, 4.0]


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]


def test_a_padded_batch_equals_each_row_alone(tiny_model: LoadedModel) -> None:
    """Shift, padding and mask together, on a real decoder."""
    model = tiny_model.model
    head = LogitsHead.for_model(model)
    rows = [([5, 6, 7, 8], [9, 10]), ([11], [12, 13, 14]), ([15, 16], [17])]
    width, length = 4, 3
    ids = torch.zeros(3, width + length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, (prompt, completion) in enumerate(rows):
        span = slice(width - len(prompt), width + len(completion))
        ids[place, span] = torch.tensor(prompt + completion)
        mask[place, span] = 1
    hidden = model.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
    ).last_hidden_state
    out = per_token_logps(completion_states(hidden, width), head, ids[:, width:], mask[:, width:])
    for place, (prompt, completion) in enumerate(rows):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        expected = [float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(completion)]
        assert out[place].tolist() == pytest.approx([*expected, 0, 0][:length], abs=1e-4)
