"""Log-probabilities of given tokens. The only place that shifts hidden states against labels.

Shapes: B rows, P prompt tokens (left-padded), L completion tokens (right-padded), T = P + L, N = L + 1 states,
D hidden size, V vocabulary. Prompts end at column P − 1 in every row, so the hidden state that predicts completion
token t (0-based) is column P − 1 + t, and the N states s_0 … s_L are the columns P − 1 … P − 1 + L.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 25
"""Logits alive at once: 32 Mi elements, 128 MiB in float32. No tensor of [tokens × vocabulary] outlives a chunk."""

CPU_CHUNK_ELEMENTS = 1 << 22
"""The same on a CPU, where larger blocks come fresh from the system each time: faulting in their pages costs more than
the arithmetic on them."""


def chunk_rows(weight: Tensor) -> int:
    """Rows whose logits under a head of `weight` [V, D] may be alive at once."""
    elements = min(CHUNK_ELEMENTS, CPU_CHUNK_ELEMENTS) if weight.device.type == "cpu" else CHUNK_ELEMENTS
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
        [B, L] float32, 0 where masked. Gradients flow to `hidden` and to whatever in the head is trainable.
    """
    mask = completion_mask.to(torch.bool)
    before = hidden[:, : labels.shape[1]]
    flat = head.selected_logps(before[mask], labels[mask])
    return torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device).masked_scatter(mask, flat)


class LogitsHead:
    """From hidden states to log-probabilities of chosen tokens, in chunks.

    Most models' logits are one linear map of the last hidden state; some scale or cap them. `for_model` finds out on
    a few tokens and keeps the model's own function where the plain product does not reproduce it.
    """

    def __init__(self, linear: nn.Linear, finish: LogitsFinish | None = None) -> None:
        self.linear = linear
        self.finish = finish

    @property
    def weight(self) -> Tensor:
        """[V, D]."""
        return self.linear.weight

    @classmethod
    def for_model(cls, model: Any) -> LogitsHead:
        """The head of a causal LM; raises ValueError when its logits are no known function of its hidden states."""
        linear = model.get_output_embeddings()
        config = getattr(model.config, "get_text_config", lambda: model.config)()
        finish = LogitsFinish.from_config(config)
        device = linear.weight.device
        probe = torch.arange(1, 5, device=device)[None]
        was_training = model.training
        model.eval()
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state
            expected = model(input_ids=probe, use_cache=False).logits.float()
            head = cls(linear, finish)
            got = head.logits(hidden)
        model.train(was_training)
        # An unknown cap or scale can be a small change at small logits: only half precision excuses a difference.
        tolerance = 1e-4 if linear.weight.dtype == torch.float32 else 2e-2
        if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            raise ValueError(
                f"{type(model).__name__}: logits are not head(hidden state); this architecture needs its own rule"
            )
        return head

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] float32."""
        raw = self.linear(hidden.to(self.linear.weight.dtype)).float()
        return raw if self.finish is None else self.finish(raw)

    def selected_logps(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """[M, D], [M] -> [M] float32 log-probabilities of `labels`."""
        chunk = chunk_rows(self.linear.weight)
        pieces = []
        frozen = not any(parameter.requires_grad for parameter in self.linear.parameters())
        for start in range(0, hidden.shape[0], chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk]
            if not (torch.is_grad_enabled() and (h.requires_grad or not frozen)):
                pieces.append(_gather_logps(self.logits(h), y))
            elif frozen and self.finish is None:
                pieces.append(_FrozenHeadLogps.apply(h, self.linear.weight, self.linear.bias, y))
            else:
                pieces.append(checkpoint(lambda a, b: _gather_logps(self.logits(a), b), h, y, use_reentrant=False))
        return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)


class LogitsFinish:
    """What some architectures do to logits after the linear map: divide, multiply, cap with tanh."""

    def __init__(self, scale: float = 1.0, cap: float | None = None) -> None:
        self.scale = scale
        self.cap = cap

    @classmethod
    def from_config(cls, config: Any) -> LogitsFinish | None:
        """Read Gemma's cap, Cohere's scale and Granite's divisor from a config; None if there is nothing to do."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return None if scale == 1.0 and cap is None else cls(scale, cap)

    def __call__(self, logits: Tensor) -> Tensor:
        """[..., V] -> [..., V]."""
        logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def _gather_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels[:, None]).squeeze(-1) - logits.logsumexp(-1)


class _FrozenHeadLogps(torch.autograd.Function):
    """Selected log-probabilities under a frozen linear head, with the gradient ready when the forward ends.

    The output is one number per token, so its Jacobian with respect to h is the vector W[y] − Σ_v p_v W[v]. Computing
    it while the chunk's probabilities exist costs one product, saves [M, D] in place of [M, V], and leaves nothing to
    recompute.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        h = hidden.to(weight.dtype)
        logits = nn.functional.linear(h, weight, bias).float()
        lse = logits.logsumexp(-1, keepdim=True)
        logps = logits.gather(-1, labels[:, None]) - lse
        probabilities = logits.sub_(lse).exp_().to(weight.dtype)
        jacobian = weight[labels].float() - (probabilities @ weight).float()
        ctx.save_for_backward(jacobian.to(hidden.dtype))
        return logps.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (jacobian,) = ctx.saved_tensors
        return (grads[0][:, None] * jacobian.float()).to(jacobian.dtype), None, None, None
