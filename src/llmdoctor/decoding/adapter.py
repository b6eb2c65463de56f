"""LoRA weights as differences on a network's fused projections (arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmdoctor.models.lora import PlainLora
from llmdoctor.models.product import Product

_FEW_ROWS = 16
"""Up to so many rows a CPU multiplies thin matrices faster in float32 than in half precision."""

_FEW_ROWS_LAID_OUT = {1 << 17: 4, 1 << 18: 1}
"""The same where they can be laid out, by the most weights there may be: reading more in float32 takes longer."""

_FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_NAME = re.compile(r"^base_model\.model\.model\.layers\.(\d+)\.(.+)$")


class LowRank:
    """The linear map B A.

    Args:
        down: A [r, in], float32.
        up: B [out, r], float32, the adapter's scale in it.
        like: a tensor on the device and of the dtype that it works with.
    """

    def __init__(self, down: Tensor, up: Tensor, like: Tensor) -> None:
        self._make(down, up, like)

    def _make(self, down: Tensor, up: Tensor, like: Tensor) -> None:
        self._down, self._up = Product(down.to(like)), Product(up.to(like).contiguous())
        self._few = 0
        if like.device.type == "cpu" and like.dtype != torch.float32:
            rows = [rows for most, rows in _FEW_ROWS_LAID_OUT.items() if down.numel() + up.numel() <= most]
            self._few = max(rows, default=0) if self._up.laid_out else _FEW_ROWS
        # B is read along its columns: each is longer than a row.
        self._exact = (down.to(like.device), up.to(like.device).t().contiguous().t()) if self._few else None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], perhaps in float32."""
        held = self._down.weight
        if held.dtype != x.dtype or held.device != x.device:
            # The base was moved; the adapter follows.
            self._make(*(self._exact or (held.float(), self._up.weight.float())), x)
        rows = x.shape[:-1].numel()
        if self._exact is None or rows > self._few:
            return self._up(self._down(x))
        down, up = self._exact
        if rows == 1:
            # With less ado than a product of matrices of one row.
            return up.mv(down.mv(x.flatten().float())).view(*x.shape[:-1], -1)
        return F.linear(F.linear(x.float(), down), up)


@dataclass
class LayerDelta:
    """What an adapter adds to one layer's fused projections; None where nothing."""

    qkv: LowRank | None = None
    out: LowRank | None = None
    gate_up: LowRank | None = None
    down: LowRank | None = None


@dataclass(eq=False)
class Adapter:
    """A LoRA adapter on a `Network`.

    Attributes:
        layers: by layer number; layers that are not named are the base's.
    """

    layers: dict[int, LayerDelta] = field(default_factory=dict)

    @property
    def first_layer(self) -> int:
        """Below it adapter and base are the same."""
        return min(self.layers)

    @classmethod
    def load(cls, folder: Path, model: Any) -> Adapter | None:
        """Read what peft wrote for `model`, in its dtype; None where it is more than plain LoRA on linear layers."""
        lora = PlainLora.load(folder)
        if lora is None or lora.config.get("fan_in_fan_out"):
            return None
        found: dict[int, dict[str, dict[str, Tensor]]] = {}
        for name, parts in lora.parts.items():
            match = _NAME.match(name)
            if match is None:
                return None
            found.setdefault(int(match[1]), {})[match[2]] = parts
        layers = model.get_decoder().layers
        known = {module for modules in _FUSED.values() for module in modules}
        if not found or any(set(modules) - known for modules in found.values()) or max(found) >= len(layers):
            return None
        like = model.get_input_embeddings().weight
        return cls({
            number: LayerDelta(**{
                place: _fuse(layers[number], names, modules, lora.scale, like) for place, names in _FUSED.items()
            })
            for number, modules in found.items()
        })  # fmt: skip


def _fuse(
    layer: Any, names: Sequence[str], found: Mapping[str, Mapping[str, Tensor]], scale: float, like: Tensor
) -> LowRank | None:
    """The adapters of several linear maps of one input as one: As stacked, Bs on the diagonal."""
    if not any(name in found for name in names):
        return None
    downs, ups = [], []
    for name in names:
        linear = layer.get_submodule(name)
        # Products of float32 pairs are what was trained; the scale joins before they are rounded.
        downs.append(found[name]["A"].float() if name in found else torch.zeros(0, linear.in_features))
        ups.append(found[name]["B"].float() * scale if name in found else torch.zeros(linear.out_features, 0))
    return LowRank(torch.cat(downs), torch.block_diag(*ups), like)
