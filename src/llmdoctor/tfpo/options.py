"""What of a doctor is trained, and what its card and its checkpoints are known by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from llmdoctor.errors import UserError
from llmdoctor.tfpo.config import TFPOConfig
from llmdoctor.tfpo.rounds import RoundOptions

RECORDED = (
    "objective", "eta", "subtb_lambda", "reference_anchor", "terminal_anchor", "length_normalize", "value_coef",
    "value_margin", "value_detach", "leaf_coef", "leaf_beta", "branch_coef", "learning_rate", "value_learning_rate",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_prompt_length", "seed",
    "max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
)  # fmt: skip
"""Settings of `TFPOConfig` that decide what a doctor learns: they are fingerprinted and written on its card."""

RECORDED_IF_CHANGED = (
    "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs",
    "bf16", "fp16", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "dataloader_in_order",
    "accelerator_config", "auto_find_batch_size", "ignore_data_skip", "world_size",
)  # fmt: skip
"""Further ones, of transformers, that hardly anybody touches: recorded where they are not at their defaults, so that
what was made without a word of them is still what it was."""


@dataclass(frozen=True)
class DoctorOptions:
    """What is trained.

    Attributes:
        lora: train a LoRA adapter; False trains all weights.
        lora_rank: rank of the adapter; more holds more behaviour and costs more.
        lora_layers: share of the layers, from the top, that carry adapters. Backward passes end at the lowest of
            them, so 0.5 nearly halves their cost.
        value_hidden: width of the value head's hidden layer; 0 is a linear head.
        eval_fraction: share of the pairs held out for evaluation, the last ones of the data.
    """

    lora: bool = True
    lora_rank: int = 16
    lora_layers: float = 0.5
    value_hidden: int = 0
    eval_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise UserError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if not 0 < self.lora_layers <= 1:
            raise UserError(f"lora_layers must lie in (0, 1], got {self.lora_layers}")
        if self.value_hidden < 0:
            raise UserError(f"value_hidden must not be negative, got {self.value_hidden}")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction must lie in [0, 1), got {self.eval_fraction}")


def recorded(config: TFPOConfig) -> dict[str, Any]:
    """What decides what a doctor learns, ready for JSON: `RECORDED`, and of the rest what is not at its default."""
    usual = {field.name: field.default for field in fields(config)}
    usual |= {"accelerator_config": AcceleratorConfig(), "world_size": 1}
    # Not every version of transformers has all of them.
    changed = [name for name in RECORDED_IF_CHANGED if getattr(config, name, None) != usual.get(name)]
    settings = {**config.to_dict(), "world_size": config.world_size}
    return {name: settings[name] for name in (*RECORDED, *changed)}


def training_record(config: TFPOConfig, options: DoctorOptions, rounds: RoundOptions) -> dict[str, Any]:
    """What a doctor's card says of its training: `recorded`, what is trained, and how the rounds go."""
    if not rounds.rounds:
        # Nothing else of them decides anything then.
        rounds = RoundOptions(rounds=0, round_batch_size=rounds.round_batch_size)
    settings = {**recorded(config), **vars(options), **vars(rounds)}
    if not rounds.merges:
        # They decide nothing then, and what was made before they were there is still what it was.
        del settings["pairs_weight"], settings["pairs_objective"]
    return settings


def decisive(training: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a doctor's card says of its training, all that decides what it learned."""
    return {name: value for name, value in training.items() if name != "round_batch_size"}


def lora_arguments(model: Any, options: DoctorOptions) -> dict[str, Any]:
    """`peft.LoraConfig` arguments: every linear layer of the upper `lora_layers` share of the decoder.

    Raises:
        UserError: there is none that LoRA knows.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layers = model.config.get_text_config().num_hidden_layers
    first = layers - max(1, round(layers * options.lora_layers))
    targets: dict[str, Any] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        index = next((int(part) for part in parts if part.isdigit()), None)
        if isinstance(module, nn.Linear | Conv1D) and index is not None and index >= first:
            targets[name] = module
    if not targets:
        raise UserError(
            f"{type(model).__name__} has no linear layers that an adapter could be put on; train all of its weights "
            "(lora False, rounds 0), or give another base"
        )
    return {
        "r": options.lora_rank,
        "lora_alpha": 2 * options.lora_rank,
        "target_modules": list(targets),
        "bias": "none",
        # GPT-2 keeps its weights the other way round.
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in targets.values()),
    }
