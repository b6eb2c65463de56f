"""Settings of stage 2 say what they expected and what they got."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import SchedulerType

from llmdoctor.errors import UserError
from llmdoctor.tfpo.config import TFPOConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "eta must be positive and finite, got 0.0"),
        ({"eta": float("nan")}, "eta must be positive and finite, got nan"),
        ({"subtb_lambda": 1.5}, r"subtb_lambda must lie in \[0, 1\], got 1.5"),
        ({"objective": "dpo"}, "objective must be one of subtb, squared_error, none, got 'dpo'"),
        ({"value_coef": -1.0}, "value_coef and value_margin must not be negative, got -1.0 and "),
        ({"value_margin": float("nan")}, r"value_coef and value_margin must not be negative, got .* and nan"),
        ({"leaf_coef": -1.0}, "leaf_coef must not be negative and leaf_beta must be positive, got -1.0 and 0.1"),
        ({"leaf_beta": 0.0}, r"leaf_coef must not be negative and leaf_beta must be positive, got .* and 0.0"),
        ({"objective": "none", "value_coef": 0.0, "leaf_coef": 0.0}, "leaves nothing to train"),
        ({"value_learning_rate": 0.0}, "value_learning_rate must be positive, got 0.0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"num_train_epochs": 0.0}, "num_train_epochs must be positive, got 0.0"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 for as many as epochs take, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, or None, got 0"),
        ({"seed": -1}, r"seed must be in \[0, 2\^32\), got -1"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
        ({"save_only_model": True}, "save_only_model is not supported: without the optimizer's state a run that is"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end is not supported: a doctor is what its last step"),
    ],
)
def test_config_checks_itself(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TFPOConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("name", ["cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"])
def test_a_schedule_that_wants_settings_of_its_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"lr_scheduler_type {name} cannot be used with lr_scheduler_kwargs None"):
        TFPOConfig(output_dir=str(tmp_path), lr_scheduler_type=name)
    given = {"num_decay_steps": 2} if name == "warmup_stable_decay" else {"min_lr": 1e-5}
    assert TFPOConfig(output_dir=str(tmp_path), lr_scheduler_type=name, lr_scheduler_kwargs=given).learning_rate > 0
    with pytest.raises(UserError, match="unexpected keyword argument 'speed'"):
        TFPOConfig(output_dir=str(tmp_path), lr_scheduler_type="cosine", lr_scheduler_kwargs={"speed": 1})


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_other_schedule_is_taken(tmp_path: Path, name: str) -> None:
    if name not in ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"):
        assert TFPOConfig(output_dir=str(tmp_path), lr_scheduler_type=name).lr_scheduler_type == name


def test_unknown_settings_raise(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'etta'"):
        TFPOConfig(output_dir=str(tmp_path), etta=1.0)


def test_a_training_of_one_step_is_not_all_warm_up(tmp_path: Path) -> None:
    config = TFPOConfig(output_dir=str(tmp_path))
    assert [config.get_warmup_steps(steps) for steps in (1, 2, 20, 40, 68)] == [0, 1, 1, 2, 4]
    assert TFPOConfig(output_dir=str(tmp_path), warmup_steps=5).get_warmup_steps(3) == 0
