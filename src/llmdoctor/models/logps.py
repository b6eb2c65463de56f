"""Log-probabilities of given tokens. The only place that shifts hidden states against labels.

Shapes: B rows, P prompt tokens (left-padded), L completion tokens (right-padded), T = P + L, N = L + 1 states,
D hidden size, V vocabulary. Prompts end at column P − 1 in every row, so the hidden state that predicts completion
token t (0-based) is column P − 1 + t, and the N states s_0 … s_L are the columns P − 1 … P − 1 + L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmdoctor.errors import UserError
from llmdoctor.models.context import text_config
from llmdoctor.models.product import is_untouched, product_of

CHUNK_ELEMENTS = 1 << 25
"""Logits alive at once: 32 Mi elements, 128 MiB in float32. No tensor of [tokens × vocabulary] outlives a chunk."""

CPU_CHUNK_ELEMENTS = 1 << 22
"""The same on a CPU, where larger blocks come fresh from the system each time: faulting in their pages costs more than
the arithmetic on them."""

CPU_WORKSPACE_ELEMENTS = 1 << 24
"""The same on a CPU where one chunk after the other lies in the same memory: enough rows for a fast product."""


def chunk_rows(weight: Tensor) -> int:
    """Rows whose logits under a head of `weight` [V, D] may be alive at once."""
    elements = min(CHUNK_ELEMENTS, CPU_CHUNK_ELEMENTS) if weight.device.type == "cpu" else CHUNK_ELEMENTS
    return max(1, elements // weight.shape[0])


def workspace_rows(weight: Tensor) -> int:
    """`chunk_rows` where every chunk's logits lie in the memory of the one before."""
    elements = min(CHUNK_ELEMENTS, CPU_WORKSPACE_ELEMENTS) if weight.device.type == "cpu" else CHUNK_ELEMENTS
    return max(1, elements // weight.shape[0])


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, T] mask -> [B, T] positions that count real tokens only, so padding never shifts a row."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def completion_states(hidden: Tensor, prompt_width: int) -> Tensor:
    """[B, T, D] -> [B, N, D]: the hidden states at s_0 … s_L."""
    return hidden[:, prompt_width - 1 :]


def per_token_logps(hidden: Tensor, head: LogitsHead, labels: Tensor, completion_mask: Tensor) -> Tensor:
    """log π(labels) from the states before each label.

    Args:
        hidden: [B, N, D] from `completion_states`, or [B, L, D] already without the last state.
        head: the model's `LogitsHead`.
        labels: [B, L] completion token ids.
        completion_mask: [B, L] true on real tokens; logits of the others are never computed.

    Returns:
        [B, L] float32 on the labels' device, 0 where masked. Gradients flow to `hidden` and to whatever in the head is
        trainable.
    """
    mask = completion_mask.to(torch.bool)
    before = hidden[:, : labels.shape[1]][mask.to(hidden.device)]
    # A model that is spread over several devices may have tokens, last states and head on three of them.
    device = head.weight.device
    flat = head.selected_logps(before.to(device), labels[mask].to(device)).to(labels.device)
    return torch.zeros(labels.shape, dtype=torch.float32, device=labels.device).masked_scatter(mask, flat)


class LogitsHead:
    """From hidden states to log-probabilities of chosen tokens, in chunks.

    Most models' logits are one linear map of the last hidden state; some scale or cap them. `for_model` finds out on
    a few tokens and keeps the model's own function where the plain product does not reproduce it.
    """

    def __init__(self, linear: nn.Linear, finish: LogitsFinish | None = None) -> None:
        self.linear = linear
        self.finish = finish
        self._multiply: Callable[[Tensor], Tensor] = linear

    @property
    def weight(self) -> Tensor:
        """[V, D]."""
        return self.linear.weight

    @classmethod
    def for_model(cls, model: Any) -> LogitsHead:
        """The head of a causal LM; UserError when its logits are no known function of its hidden states."""
        linear = model.get_output_embeddings()
        finish = LogitsFinish.from_config(text_config(model))
        device = linear.weight.device
        probe = torch.arange(1, 5, device=device)[None]
        was_training = model.training
        model.eval()
        with torch.no_grad():
            out = model.get_decoder()(input_ids=probe, use_cache=False)
            hidden = getattr(out, "last_hidden_state", None)
            if hidden is None:
                raise UserError(f"{type(model).__name__}: its decoder gives no hidden states; it is not supported")
            expected = model(input_ids=probe, use_cache=False).logits.float()
            head = cls(linear, finish)
            got = head.logits(hidden)
        model.train(was_training)
        if not torch.isfinite(expected).all():
            raise UserError(
                f"{type(model).__name__} computes numbers that are not finite: its weights are broken, or too large "
                f"for {linear.weight.dtype}; try --dtype bfloat16 or float32"
            )
        # An unknown cap or scale can be a small change at small logits: only half precision excuses a difference.
        tolerance = 1e-4 if linear.weight.dtype == torch.float32 else 2e-2
        if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            raise UserError(
                f"{type(model).__name__}: logits are not head(hidden state); this architecture is not supported"
            )
        return head

    def prepare(self) -> None:
        """Make `logits` as fast as can be for weights that stay as they are; call it again where they may not have."""
        plain = type(self.linear) is nn.Linear and is_untouched(self.linear)
        self._multiply = product_of(self.linear) if plain else self.linear

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] float32."""
        raw = self._multiply(hidden.to(self.linear.weight.dtype)).float()
        return raw if self.finish is None else self.finish(raw)

    def selected_logps(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """[M, D], [M] -> [M] float32 log-probabilities of `labels`."""
        frozen = not any(parameter.requires_grad for parameter in self.linear.parameters())
        weight, bias = self.linear.weight, self.linear.bias
        if not (torch.is_grad_enabled() and (hidden.requires_grad or not frozen)):
            with torch.no_grad():
                return _selected_logps(hidden, weight, bias, labels, self.finish)
        if frozen and self.finish is None:
            found: Tensor = _FrozenHeadLogps.apply(hidden, weight, bias, labels)
            return found
        pieces = [
            checkpoint(lambda h, y: _gather_logps(self.logits(h), y), h, y, use_reentrant=False)
            for h, y in zip(hidden.split(chunk_rows(weight)), labels.split(chunk_rows(weight)), strict=True)
        ]
        return torch.cat(pieces)


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What Gemma, RecurrentGemma and xLSTM call the cap of their logits."""


class LogitsFinish:
    """What some architectures do to logits after the linear map: divide, multiply, cap with tanh."""

    def __init__(self, scale: float = 1.0, cap: float | None = None) -> None:
        self.scale = scale
        self.cap = cap

    @classmethod
    def from_config(cls, config: Any) -> LogitsFinish | None:
        """Read a cap, Cohere's scale and Granite's divisor from a config; None if there is nothing to do."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        cap = next((getattr(config, name) for name in _CAPS if getattr(config, name, None)), None)
        return None if scale == 1.0 and cap is None else cls(scale, cap)

    def __call__(self, logits: Tensor) -> Tensor:
        """[..., V] -> [..., V]."""
        logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def in_place(self, logits: Tensor) -> Tensor:
        """The same, over `logits` itself."""
        logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)


def _gather_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels[:, None]).squeeze(-1) - logits.logsumexp(-1)


class _Workspace:
    """Logits under a linear head, one chunk after the other in the same memory.

    Memory fresh from the system costs a CPU more than the arithmetic on it, and with it gone larger chunks pay, whose
    products run faster.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, most: int) -> None:
        self.weight = weight
        self.bias = bias
        self.rows = max(1, min(workspace_rows(weight), most))
        self._raw = weight.new_empty(self.rows, weight.shape[0])
        whole = weight.dtype == torch.float32
        self._full = self._raw if whole else torch.empty_like(self._raw, dtype=torch.float32)

    def logits(self, hidden: Tensor) -> Tensor:
        """[m, D] -> [m, V] float32, there until the next call; m at most `rows`."""
        raw, h = self._raw[: len(hidden)], hidden.to(self.weight.dtype)
        if self.bias is None:
            torch.mm(h, self.weight.T, out=raw)
        else:
            torch.addmm(self.bias, h, self.weight.T, out=raw)
        full = self._full[: len(hidden)]
        return full if full.data_ptr() == raw.data_ptr() else full.copy_(raw)

    def times_weight(self, values: Tensor) -> Tensor:
        """[m, V] values that lie where `logits` were -> [m, D] float32: their product with the head's weights."""
        raw = self._raw[: len(values)]
        return ((values if values.data_ptr() == raw.data_ptr() else raw.copy_(values)) @ self.weight).float()


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Over [m, V] logits write e^(logit − max); return log Σ e^logit and the sum of what is there now, [m, 1]."""
    top = logits.amax(-1, keepdim=True)
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return top + total.log(), total


def _selected_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, finish: LogitsFinish | None
) -> Tensor:
    """[M, D], [M] -> [M] float32, without a gradient."""
    space = _Workspace(weight, bias, len(hidden))
    found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), space.rows):
        part = slice(start, start + space.rows)
        logits = space.logits(hidden[part])
        if finish is not None:
            finish.in_place(logits)
        chosen = logits.gather(-1, labels[part, None])
        found[part] = (chosen - _exponentials(logits)[0])[:, 0]
    return found


class _FrozenHeadLogps(torch.autograd.Function):
    """Selected log-probabilities under a frozen linear head, with the gradient ready when the forward ends.

    The output is one number per token, so its Jacobian with respect to h is the vector W[y] − Σ_v p_v W[v]. Computing
    it while the chunk's probabilities exist costs one product, saves [M, D] in place of [M, V], and leaves nothing to
    recompute.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        # In autocast products of float32 weights would be in half precision.
        with torch.autocast(hidden.device.type, enabled=False):
            return _FrozenHeadLogps._forward(ctx, hidden, weight, bias, labels)

    @staticmethod
    def _forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        space = _Workspace(weight, bias, len(hidden))
        found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        jacobian = torch.empty_like(hidden)
        for start in range(0, len(hidden), space.rows):
            part = slice(start, start + space.rows)
            logits = space.logits(hidden[part])
            chosen = logits.gather(-1, labels[part, None])
            log_total, total = _exponentials(logits)
            found[part] = (chosen - log_total)[:, 0]
            # Subtracted after the product, W[y] and a sum that is nearly W[y] would leave rounding where the token is
            # likely: (Σ_v p_v W[v]) − W[y] = Σ_{v≠y} p_v W[v] − (1 − p_y) W[y].
            others = logits.gather(-1, labels[part, None]) - total
            jacobian[part] = space.times_weight(logits.scatter_(-1, labels[part, None], others)) / -total
        ctx.save_for_backward(jacobian)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (jacobian,) = ctx.saved_tensors
        return (grads[0][:, None] * jacobian.float()).to(jacobian.dtype), None, None, None
