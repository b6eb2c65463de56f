"""Two objectives from two doctors without training, by a mixture of their weights.

Reward Soups: Ramé et al. 2023, arXiv 2306.04488.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmdoctor.errors import UserError
from llmdoctor.files import digest, sha256_file
from llmdoctor.models.doctor import ADAPTER_FOLDER, Doctor, DoctorConfig, local_folder
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.lora import WEIGHTS


def reward_soup(paths: Sequence[str | Path], weights: Sequence[float], base: LoadedModel) -> LoadedModel:
    """The model whose weights are Σ_i w_i θ_i, θ_i the doctors' merged weights; they are added up in float32.

    Args:
        paths: folders (or hub ids) of doctors with LoRA adapters on one base, whatever objective trained them.
        weights: w_i ≥ 0, which sum to 1.
        base: their base model; its weights are changed in place, so it must not be used as a patient as well.

    Returns:
        A plain language model, to decode from alone or as a `Guide`.

    Raises:
        UserError: weights that are no mixture, a fully trained doctor or one on another base, or a `base` that carries
            an adapter.
    """
    _check_mixture(weights)
    if len(paths) != len(weights):
        raise UserError(f"{len(paths)} doctors need as many weights, got {len(weights)}")
    if hasattr(base.model, "peft_config"):
        raise UserError(f"{base.spec} carries an adapter already; load the base again for a soup")
    folders = [local_folder(path) for path in paths]
    for folder in folders:
        if not DoctorConfig.load(folder).lora:
            raise UserError(f"{folder} was trained whole; a soup is made of doctors with LoRA adapters on one base")
    sums: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in _deltas(folder, base).items():
            sums[name] = delta * weight + sums[name] if name in sums else delta * weight
    modules = dict(base.model.named_modules())
    with torch.no_grad():
        for name, delta in sums.items():
            parameter: Any = modules[name].weight
            parameter.copy_(parameter.float() + delta)
    adapters = [sha256_file(folder / ADAPTER_FOLDER / WEIGHTS) for folder in folders]
    made_of = [base.fingerprint.get("model"), adapters, list(map(float, weights))]
    fingerprint = {**base.fingerprint, "model": digest(made_of)}
    return LoadedModel(base.model.eval(), base.tokenizer, f"soup({base.spec})", fingerprint)


def _deltas(folder: Path, base: LoadedModel) -> dict[str, torch.Tensor]:
    """What a doctor's adapter adds to the weight of each module, by its name, in float32; `base` is left as it was."""
    from peft.tuners.lora import LoraLayer

    doctor = Doctor.from_pretrained(folder, base=base)
    deltas = {}
    with torch.no_grad():
        for name, layer in doctor.causal_lm.named_modules():
            if isinstance(layer, LoraLayer):
                deltas[name] = layer.get_delta_weight("default").float()
    doctor.lm.unload()
    return deltas


def _check_mixture(weights: Sequence[float]) -> None:
    if not weights or not all(weight >= 0 for weight in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError(f"mixture weights must not be negative and must sum to 1, got {', '.join(map(str, weights))}")
