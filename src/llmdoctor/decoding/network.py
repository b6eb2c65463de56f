"""A Llama-shaped transformer, run for decoding: projections fused, caches written in place, adapters side by side.

Each layer is four products: queries, keys and values in one, gate and up in one. Query heads that share a key head are
attended to as rows of one product, and several adapters on the same weights run as more rows of the same pass; the
layers below the first adapted one are run once for all of them. How much faster than transformers' own modules that is
says `benchmarks/decoding.py`.

Shapes: B rows, M voices (the bare model, or an adapter on it), t new tokens, T columns of the cache, D hidden size,
H query heads, K key heads, G = H/K, d width of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaModel, MistralModel, Qwen2Model, Qwen3Model

from llmdoctor.decoding.adapter import Adapter, LayerDelta
from llmdoctor.models.norm import rms_norm
from llmdoctor.models.product import Product, can_lay_out, has_room, is_untouched, version

_ARCHITECTURES = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
_FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on how long the text is."""


@dataclass
class _Linear:
    """Several linear maps of one input as one; the parts' own parameters become views of it."""

    product: Product
    parts: tuple[nn.Linear, ...]
    versions: list[tuple[int, int] | None]
    """Of what was copied, when it was."""

    @classmethod
    def fuse(cls, parts: Sequence[nn.Linear], lay_out: bool) -> _Linear:
        weights = [part.weight for part in parts]
        whole = weights[0].detach() if len(parts) == 1 else torch.cat([weight.detach() for weight in weights])
        bias = None
        if any(part.bias is not None for part in parts):
            bias = torch.cat(
                [
                    part.weight.new_zeros(part.out_features) if part.bias is None else part.bias.detach()
                    for part in parts
                ]
            )
        if len(parts) > 1:
            for weight, piece in zip(weights, whole.split([weight.shape[0] for weight in weights]), strict=True):
                weight.data = piece
        product = Product(whole, bias, lay_out=lay_out)
        return cls(product, tuple(parts), _versions(product, parts))

    @property
    def stale(self) -> bool:
        """Whether a part's weight is no longer a view of the whole, or something that was copied has changed."""
        place = self.product.weight.data_ptr()
        for part in self.parts:
            if part.weight.data_ptr() != place or part.weight.dtype != self.product.weight.dtype:
                return True
            place += part.weight.nbytes
        return _versions(self.product, self.parts) != self.versions or self.product.outdated

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)


def _versions(product: Product, parts: Sequence[nn.Linear]) -> list[tuple[int, int] | None]:
    return [version(part.bias) for part in parts] + [version(part.weight) for part in parts if product.laid_out]


@dataclass
class _Block:
    """One layer's weights."""

    before_attention: tuple[Tensor, float]
    qkv: _Linear
    head_norms: tuple[tuple[Tensor, float], tuple[Tensor, float]] | None
    out: _Linear
    before_mlp: tuple[Tensor, float]
    gate_up: _Linear
    down: _Linear

    @classmethod
    def of(cls, layer: Any, lay_out: bool) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        norms = None
        if hasattr(attention, "q_norm"):
            norms = _norm(attention.q_norm), _norm(attention.k_norm)
        return cls(
            before_attention=_norm(layer.input_layernorm),
            qkv=_Linear.fuse([attention.q_proj, attention.k_proj, attention.v_proj], lay_out),
            head_norms=norms,
            out=_Linear.fuse([attention.o_proj], lay_out),
            before_mlp=_norm(layer.post_attention_layernorm),
            gate_up=_Linear.fuse([mlp.gate_proj, mlp.up_proj], lay_out),
            down=_Linear.fuse([mlp.down_proj], lay_out),
        )

    @property
    def linears(self) -> tuple[_Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def is_stale(self, layer: Any) -> bool:
        attention, mlp = layer.self_attn, layer.mlp
        parts = (
            (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,),
        )  # fmt: skip
        norms = [(self.before_attention, layer.input_layernorm), (self.before_mlp, layer.post_attention_layernorm)]
        if self.head_norms is not None:
            norms += zip(self.head_norms, (attention.q_norm, attention.k_norm), strict=True)
        return any(norm[0] is not module.weight for norm, module in norms) or any(
            linear.stale or any(own is not now for own, now in zip(linear.parts, modules, strict=True))
            for linear, modules in zip(self.linears, parts, strict=True)
        )


class Network:
    """The decoder of a language model: ids to last hidden states, over a cache of `decoding.cache`.

    Get one by `network_of`. Numbers equal the model's own up to rounding.

    Attributes:
        group: G.
    """

    def __init__(self, decoder: Any) -> None:
        config = decoder.config
        self._embedding = decoder.embed_tokens.weight
        self._rotary = decoder.rotary_emb
        self._final = _norm(decoder.norm)
        weights = [weight for layer in decoder.layers for weight in layer.parameters() if weight.dim() == 2]
        lay_out = can_lay_out(weights[0]) and has_room(sum(weight.nbytes for weight in weights))
        self._blocks = [_Block.of(layer, lay_out) for layer in decoder.layers]
        attention = decoder.layers[0].self_attn
        self._head_width = int(attention.head_dim)
        self._scale = float(attention.scaling)
        self._key_heads = int(config.num_key_value_heads)
        self.group = int(config.num_attention_heads) // self._key_heads
        self._angles: tuple[Tensor, Tensor] | None = None

    def is_stale(self, decoder: Any) -> bool:
        """Whether the decoder's weights were moved, replaced or, where copied, changed since this was made."""
        if self._embedding is not decoder.embed_tokens.weight or self._final[0] is not decoder.norm.weight:
            return True
        return any(block.is_stale(layer) for block, layer in zip(self._blocks, decoder.layers, strict=True))

    def __call__(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Any,
        voices: Sequence[Adapter | None] = (None,),
        shared: int | None = None,
        tapped: Sequence[int] = (),
    ) -> Tensor:
        """Run new tokens, appending to the cache.

        Args:
            ids: [B, t], or what stands in place of their embeddings, [B, t, D].
            mask: [B, T] with 1 on the columns that exist for a row, the new ones included (then later columns are
                hidden from earlier tokens), or [B, 1, t, T] an additive bias.
            positions: [B, t].
            cache: whose layers hold B rows below `shared` and M·B above.
            voices: M adapters; None is the bare model.
            shared: layers that are run once for all voices; all of them where there is one voice.
            tapped: numbers of layers.

        Returns:
            [M·B, t, D] last hidden states, voice by voice; with S layers tapped [M·B, t, (1 + S) D], their outputs
            behind.
        """
        hidden = ids if ids.is_floating_point() else F.embedding(ids, self._embedding)
        # No row has more tokens than the cache has columns, which is known without asking the device.
        cos, sin = self._rotation(positions, mask.shape[-1])
        bias = self._bias(mask, ids.shape[1], hidden.dtype)
        fork = len(self._blocks) if shared is None else shared
        taps = {}
        for number, (block, layer) in enumerate(zip(self._blocks, cache.layers, strict=True)):
            if number == fork and len(voices) > 1:
                hidden, cos, sin, bias = (tensor.repeat(len(voices), 1, 1, *[1] * (tensor.dim() - 3))
                                          for tensor in (hidden, cos, sin, bias))  # fmt: skip
            deltas = [voice.layers.get(number) if voice else None for voice in voices] if number >= fork else ()
            hidden = self._attend(block, hidden, cos, sin, bias, layer, deltas)
            hidden = self._transform(block, hidden, deltas)
            if number in tapped:
                taps[number] = hidden
        last = rms_norm(hidden, *self._final)
        if not tapped:
            return last
        every = [taps[number].repeat(len(last) // len(taps[number]), 1, 1) for number in tapped]
        return torch.cat([last, *every], dim=-1)

    def _attend(
        self, block: _Block, hidden: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, layer: Any,
        deltas: Sequence[LayerDelta | None],
    ) -> Tensor:  # fmt: skip
        rows, count, _ = hidden.shape
        groups, width = self._key_heads * self.group, self._head_width
        normed = rms_norm(hidden, *block.before_attention)
        mixed = _adapted(block.qkv, normed, deltas, "qkv").view(rows, count, -1, width)
        turned = mixed.narrow(2, 0, groups + self._key_heads)
        if block.head_norms is not None:
            queries, keys = turned.split([groups, self._key_heads], dim=2)
            query_norm, key_norm = block.head_norms
            turned = torch.cat([rms_norm(queries, *query_norm), rms_norm(keys, *key_norm)], dim=2)
        turned = torch.addcmul(turned * cos, turned.roll(width // 2, -1), sin)
        keys = turned.narrow(2, groups, self._key_heads).transpose(1, 2)
        values = mixed.narrow(2, groups + self._key_heads, self._key_heads).transpose(1, 2)
        keys, values = layer.update(keys, values)
        # The query heads of one key head are rows of one product: torch's own grouped attention is several times slower
        # in bfloat16 on a CPU (2.13).
        queries = turned.narrow(2, 0, groups).view(rows, count, self._key_heads, self.group, width)
        queries = queries.transpose(1, 2).reshape(rows, self._key_heads, count * self.group, width)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=self._scale)
        seen = seen.view(rows, self._key_heads, count, self.group, width).transpose(1, 2).reshape(rows, count, -1)
        return _adapted(block.out, seen, deltas, "out").add_(hidden)

    @staticmethod
    def _transform(block: _Block, hidden: Tensor, deltas: Sequence[LayerDelta | None]) -> Tensor:
        both = _adapted(block.gate_up, rms_norm(hidden, *block.before_mlp), deltas, "gate_up")
        width = both.shape[-1] // 2
        gated = F.silu(both.narrow(-1, 0, width)).mul_(both.narrow(-1, width, width))
        return _adapted(block.down, gated, deltas, "down").add_(hidden)

    def _rotation(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """[B, t] < longest -> cos and sin [B, t, 1, d], the sine's first half negated: turning needs no negation."""
        if self._angles is None or len(self._angles[0]) < longest:
            count = max(longest, 2 * (0 if self._angles is None else len(self._angles[0])), 512)
            every = torch.arange(count, device=positions.device)[None]
            cos, sin = self._rotary(self._embedding, every)
            half = self._head_width // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            self._angles = cos[0, :, None], sin[0, :, None]
        cos, sin = self._angles
        return cos[positions], sin[positions]

    def _bias(self, mask: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """-> [B, 1, t·G, T]: what is added to the attention scores."""
        if mask.dim() == 2:
            width = mask.shape[1]
            seen = mask.bool()[:, None, None]
            if count > 1:
                columns = torch.arange(width, device=mask.device)
                seen = seen & (columns <= columns[width - count :, None])
            mask = torch.zeros(seen.shape, dtype=dtype, device=mask.device)
            # Finite: a padded token sees nothing at all, and must not become NaN.
            mask.masked_fill_(~seen, torch.finfo(dtype).min)
        rows, _, count, width = mask.shape
        # GPUs' kernels want rows to begin at multiples of eight, and would copy it so in every layer.
        bias = mask.new_empty(rows, 1, count, self.group, -(-width // 8) * 8)[..., :width]
        bias.copy_(mask[:, :, :, None].expand(bias.shape))
        return bias.flatten(2, 3)


def network_of(decoder: Any) -> Network | None:
    """The fast form of a transformers decoder, made once; None where its architecture or its state is another one.

    It takes Llama, Mistral, Qwen2 and Qwen3 models of plain linear layers on one device, with full attention and
    without hooks. Its weights are the model's own: making it copies one layer at a time and keeps no copy, but for
    the one that `models.product` lays out where that is faster.
    """
    # Asked every time: an adapter may have been put in, or a hook, without a weight having moved.
    if not _fits(decoder):
        return None
    network = _NETWORKS.get(decoder)
    if network is None or network.is_stale(decoder):
        # Weights that become views in inference mode could carry no gradient ever after; such as they are, they stay.
        with torch.inference_mode(decoder.embed_tokens.weight.is_inference()):
            network = Network(decoder)
        _NETWORKS[decoder] = network
    return network


_NETWORKS: weakref.WeakKeyDictionary[Any, Network] = weakref.WeakKeyDictionary()


def _fits(decoder: Any) -> bool:
    if type(decoder) not in _ARCHITECTURES:
        return False
    config = decoder.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if not (
        config.hidden_act == "silu"
        and set(kinds) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and config.rope_parameters.get("rope_type", "default") in _FIXED_ROPES
        and len({parameter.device for parameter in decoder.parameters()}) == 1
    ):
        return False
    linears = [
        module
        for layer in decoder.layers
        for part in (layer.self_attn, layer.mlp)
        for name, module in part.named_children()
        if name.endswith("_proj")
    ]
    return (
        type(decoder.embed_tokens) is nn.Embedding
        and all(type(linear) is nn.Linear for linear in linears)
        and all(map(is_untouched, decoder.modules()))
    )


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight, float(module.variance_epsilon)


def _adapted(linear: _Linear, x: Tensor, deltas: Sequence[LayerDelta | None], place: str) -> Tensor:
    """The linear map, and on each voice's rows its adapter's difference."""
    y = linear(x)
    if deltas:
        rows = x.shape[0] // len(deltas)
        for number, delta in enumerate(deltas):
            change = getattr(delta, place) if delta else None
            if change is not None:
                y.narrow(0, number * rows, rows).add_(change(x.narrow(0, number * rows, rows)))
    return y
