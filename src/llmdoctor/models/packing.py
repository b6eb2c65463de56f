"""Both responses of a pair behind one prompt, in one row, where neither sees the other.

Shapes: B pairs, 2B responses (the chosen first), T columns, L completion tokens, N = L + 1 states.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

PROMPT, CHOSEN, REJECTED = 1, 2, 3


class PackedPairs:
    """Where the parts of packed rows lie: prompt, chosen, rejected, then padding, without gaps.

    Example, a prompt of 2 tokens, responses of 3 and 1, one column of padding:

        segments   [1, 1, 2, 2, 2, 3, 0]
        positions  [0, 1, 2, 3, 4, 2, 0]             # as if either response stood alone behind the prompt
        states     [1, 2, 3, 4], [1, 5, 5, 5]        # s_0 is the prompt's end for both; past the last state, that one

    Args:
        attention_mask: [B, T] true on real tokens.
        completion_mask: [2B, L] true on real completion tokens.
    """

    def __init__(self, attention_mask: Tensor, completion_mask: Tensor) -> None:
        chosen, rejected = completion_mask.sum(-1).view(2, -1, 1)
        filled = attention_mask.sum(-1, keepdim=True)
        prompt = filled - chosen - rejected
        columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        is_rejected = columns >= prompt + chosen
        self.segments = (PROMPT + (columns >= prompt).long() + is_rejected.long()).masked_fill(columns >= filled, 0)
        self.positions = (columns - chosen * is_rejected).masked_fill(columns >= filled, 0)
        steps = torch.arange(completion_mask.shape[1] + 1, device=attention_mask.device)
        to_chosen, to_rejected = torch.minimum(steps, chosen), torch.minimum(steps, rejected)
        self.states = prompt - 1 + torch.stack([to_chosen, to_rejected + chosen * (to_rejected > 0)])
        self.states = self.states.flatten(0, 1)

    def attention_bias(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, T, T] to add to attention scores: 0 where column q sees k, the lowest number elsewhere."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        visible = ((key == query) | (key == PROMPT)).tril()
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return bias.masked_fill(~visible, torch.finfo(dtype).min)[:, None]

    def take(self, values: Tensor) -> Tensor:
        """[B, T, …] -> [2B, N, …]: the values at every response's states."""
        rows = torch.arange(values.shape[0], device=values.device).repeat(2)[:, None]
        flat = (rows * values.shape[1] + self.states.to(values.device)).flatten()
        return values.flatten(0, 1).index_select(0, flat).unflatten(0, self.states.shape)


def reads_over_gaps(model: Any) -> bool:
    """Whether masked columns in the middle of a causal LM's row change nothing of what it reads.

    It is so where every layer is full attention and positions are rotary. A sliding window counts the columns, ALiBi
    takes them for distance, a recurrent layer goes through them, and of code that is not transformers' own nothing is
    known.
    """
    config, decoder = model.config.get_text_config(), model.get_decoder()
    return (
        all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
        and hasattr(decoder, "rotary_emb")
        and not getattr(config, "alibi", False)
        and type(decoder).__module__.startswith("transformers.")
    )


def keeps_keys(model: Any) -> bool:
    """Whether a causal LM keeps nothing but keys and values of what it has read, in a cache whose rows can be copied.

    States of recurrent layers cannot be copied in this way.
    """
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return (
        all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        and "past_key_values" in inspect.signature(type(model.get_decoder()).forward).parameters
    )


def can_pack(model: Any) -> bool:
    """Whether a causal LM reads packed rows as it reads the responses alone.

    It does where it `reads_over_gaps`, as the rejected response does over the chosen one, and adds the mask to the
    scores as it is given: flash kernels take no such mask. Other models read two rows a pair.
    """
    implementation = model.config.get_text_config()._attn_implementation
    return implementation in ("eager", "sdpa") and reads_over_gaps(model)
