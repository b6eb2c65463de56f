"""Plain LoRA as peft stores it: B A times one scale, on linear layers (arXiv 2106.09685)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
          "lora_bias": False, "use_qalora": False, "alora_invocation_tokens": None,
          "trainable_token_indices": None, "layer_replication": None, "target_parameters": None}  # fmt: skip
"""Settings of peft under which an adapter is B A x times one scale, and their values there."""


@dataclass(frozen=True)
class PlainLora:
    """An adapter's weights.

    Attributes:
        config: peft's.
        scale: what B A is multiplied by.
        parts: by a layer's name, A [r, in] and B [out, r] under "A" and "B".
    """

    config: dict[str, Any]
    scale: float
    parts: dict[str, dict[str, Tensor]]

    @classmethod
    def load(cls, folder: Path) -> PlainLora | None:
        """Read what peft wrote; None where it is more than plain LoRA on linear layers."""
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA" or any((config.get(key) or None) != (value or None)
                                                    for key, value in _PLAIN.items()):  # fmt: skip
            return None
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(folder / WEIGHTS).items():
            name, mark, part = key.rpartition(".lora_")
            if not mark or part not in ("A.weight", "B.weight"):
                return None
            parts.setdefault(name, {})[part[0]] = tensor
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        return cls(config, scale, parts)
