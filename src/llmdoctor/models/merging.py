"""Several doctors as one: their weight differences added up (task arithmetic, Ilharco et al. 2023, arXiv 2212.04089).

A patient guided by the merged doctor pays for one doctor. To first order in the differences its log-ratio is the
weighted sum of theirs, which two doctors side by side have exactly. Two that were trained in different ways on the same
pairs err in different ways, so their sum steers as far with less drift: docs/research/2026-11-29-two-doctors.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmdoctor.errors import UserError
from llmdoctor.files import atomic_folder, sha256_file, write_json, write_text
from llmdoctor.models.card import model_card
from llmdoctor.models.doctor import (
    ADAPTER_FOLDER,
    CONFIG_NAME,
    VALUE_HEAD_NAME,
    DoctorConfig,
    ValueHead,
    check_whole,
    local_folder,
)
from llmdoctor.models.lora import CONFIG, WEIGHTS, PlainLora


def merge_doctors(
    doctors: Sequence[str | Path], weights: Sequence[float], output: str | Path, *, dimension: str = ""
) -> Path:
    """Write the doctor whose adapter is Σ_i w_i B_i A_i, exactly: its rank is the sum of theirs.

    Its value head is a fresh one (V = 1 everywhere); decoding needs none.

    Args:
        doctors: folders or hub ids of at least two LoRA doctors on one base.
        weights: w_i, finite; 1 for each adds up what they learned.
        output: the new doctor's folder; what is there is replaced.
        dimension: what it is for; theirs, with + between different ones, if empty.

    Returns:
        The folder.

    Raises:
        UserError: fewer than two doctors, doctors on different bases, one that was trained whole or whose adapter is
            more than plain LoRA, or weights that do not fit.
    """
    _check_weights(doctors, weights)
    folders = [local_folder(path) for path in doctors]
    configs = [DoctorConfig.load(folder) for folder in folders]
    adapters = [_plain(folder, config) for folder, config in zip(folders, configs, strict=True)]
    first = configs[0]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        for what in ("model", "tokenizer"):
            ours, theirs = first.base_fingerprint.get(what), config.base_fingerprint.get(what)
            if ours != theirs:
                raise UserError(
                    f"{folders[0]} is on {first.base} ({what} {ours}), {folder} on {config.base} ({what} {theirs}); "
                    "only doctors on one base can be merged. Side by side they may still guide one patient"
                )
    names = list(dict.fromkeys(config.dimension for config in configs if config.dimension))
    merged = DoctorConfig(
        base=first.base,
        base_fingerprint=dict(first.base_fingerprint),
        dimension=dimension or "+".join(names),
        rewards_fingerprint=dict(first.rewards_fingerprint)
        if _all_same(c.rewards_fingerprint for c in configs)
        else {},
        training={
            "merged": [
                {
                    "weight": float(weight),
                    "dimension": config.dimension,
                    "adapter": sha256_file(folder / ADAPTER_FOLDER / WEIGHTS),
                    "training": dict(config.training),
                }
                for folder, config, weight in zip(folders, configs, weights, strict=True)
            ]
        },
        versions={name: version(name) for name in ("llmdoctor", "torch", "transformers", "peft")},
    )
    tensors, rank = _concatenated(adapters, weights)
    adapter = {
        **adapters[0].config, "r": rank, "lora_alpha": rank, "use_rslora": False, "inference_mode": True,
        "target_modules": sorted({target for lora in adapters for target in _targets(lora)}),
        "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None,
    }  # fmt: skip
    width = load_file(folders[0] / VALUE_HEAD_NAME)["norm.weight"].numel()
    with atomic_folder(Path(output)) as folder:
        (folder / ADAPTER_FOLDER).mkdir()
        save_file(tensors, str(folder / ADAPTER_FOLDER / WEIGHTS), metadata={"format": "pt"})
        write_json(folder / ADAPTER_FOLDER / CONFIG, adapter)
        save_file(ValueHead(width).state_dict(), str(folder / VALUE_HEAD_NAME))
        write_text(folder / "README.md", model_card(asdict(merged)))
        write_json(folder / CONFIG_NAME, asdict(merged))
    return Path(output)


def is_merged_from(folder: str | Path, doctors: Sequence[str | Path], weights: Sequence[float]) -> bool:
    """Whether `folder` holds what `merge_doctors` made of just these doctors, as they are now, at these weights."""
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        return False
    was = [(part["adapter"], part["weight"]) for part in DoctorConfig.load(folder).training.get("merged", [])]
    adapters = [sha256_file(Path(path) / ADAPTER_FOLDER / WEIGHTS) for path in doctors]
    return was == list(zip(adapters, map(float, weights), strict=True))


def _check_weights(doctors: Sequence[str | Path], weights: Sequence[float]) -> None:
    if len(doctors) < 2:
        raise UserError(f"merging needs at least two doctors, got {len(doctors)}")
    if len(doctors) != len(weights):
        raise UserError(f"{len(doctors)} doctors need as many weights, got {len(weights)}")
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise UserError(f"weights must be finite and not all 0, got {', '.join(map(str, weights))}")


def _plain(folder: Path, config: DoctorConfig) -> PlainLora:
    check_whole(folder, config)
    if not config.lora:
        raise UserError(f"{folder} was trained whole; only doctors with LoRA adapters on one base can be merged")
    lora = PlainLora.load(folder / ADAPTER_FOLDER)
    if lora is None:
        raise UserError(f"the adapter of {folder} is more than plain LoRA on linear layers; it cannot be merged")
    return lora


def _concatenated(adapters: Sequence[PlainLora], weights: Sequence[float]) -> tuple[dict[str, Tensor], int]:
    """Σ_i w_i B_i A_i as one pair of matrices a layer, [r, in] and [out, r], of the same rank r for all of them."""
    rank = sum(int(lora.config["r"]) for lora in adapters)
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for lora in adapters for name in lora.parts):
        there = [(lora, weight) for lora, weight in zip(adapters, weights, strict=True) if name in lora.parts]
        down = torch.cat([lora.parts[name]["A"].float() for lora, _ in there])
        up = torch.cat([lora.parts[name]["B"].float() * (weight * lora.scale) for lora, weight in there], dim=1)
        # peft knows one rank for all layers; where a doctor has no adapter its share stays 0.
        missing = rank - len(down)
        tensors[f"{name}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, missing)).contiguous()
        tensors[f"{name}.lora_B.weight"] = torch.nn.functional.pad(up, (0, missing)).contiguous()
    return tensors, rank


def _targets(lora: PlainLora) -> list[str]:
    """The adapted layers by their whole names, so that no pattern of one doctor matches another's layers."""
    return [name.removeprefix("base_model.model.") for name in lora.parts]


def _all_same(found: Any) -> bool:
    found = list(found)
    return all(entry == found[0] for entry in found)
