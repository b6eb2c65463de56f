"""What the baselines that are trained share: the budget, the folder they fill, and the run that goes on after a kill.

Every one of them is trained on the token ids of a reward store, with the LoRA adapter, schedule and number of steps
that a doctor would get, so that a comparison compares objectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmdoctor.baselines.implicit import held_out_metrics
from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.collate import SCORES_A_TOKEN_IN_MEMORY, RewardCollator, tokens_worth
from llmdoctor.errors import TrainingDiverged, UserError
from llmdoctor.files import fill_folder, write_text
from llmdoctor.models.doctor import CONFIG_NAME, Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel, need_one_gpu
from llmdoctor.models.lora import WEIGHTS
from llmdoctor.models.reward_model import CONFIG_NAME as REWARD_CONFIG_NAME
from llmdoctor.models.reward_model import RewardModelConfig
from llmdoctor.rewards.store import RewardStore
from llmdoctor.rewards.transfer import rewards_for
from llmdoctor.tfpo.checkpoints import check_same_training, claim_checkpoints, training_identity
from llmdoctor.tfpo.lesson import need_room, split_rows
from llmdoctor.tfpo.options import DoctorOptions, lora_arguments

TOKENS_AT_ONCE = 8192
"""That TRL's trainers read at once, with their padding, in the worst of all batches, counted as `data.collate.in_parts`
does; what a batch has beyond that is added up."""


@dataclass(frozen=True)
class BaselineOptions:
    """One budget for every trained baseline; the defaults are those a doctor is trained with.

    Attributes:
        epochs: passes over the pairs.
        batch_pairs: pairs in a step, two responses each.
        learning_rate: peak of a cosine schedule; LoRA wants about ten times a full model's.
        warmup: share of the steps that warm up.
        max_grad_norm: gradients are clipped to this norm.
        lora_rank, lora_layers: as `DoctorOptions`'.
        beta: how hard the log-probabilities (DPO: log-ratios) are pushed apart; None is the method's own: DPO 0.1,
            GenARM 0.05. A reward model has none.
        eval_fraction: share of the pairs held out, the last ones of the data: the same as a doctor's.
        seed: of the adapter's initial weights and of the order of the pairs.
    """

    epochs: float = 2.0
    batch_pairs: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    lora_rank: int = 16
    lora_layers: float = 0.5
    beta: float | None = None
    eval_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "epochs": (0 < self.epochs < math.inf, "positive"),
            "batch_pairs": (self.batch_pairs >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "positive"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "max_grad_norm": (0 < self.max_grad_norm < math.inf, "positive"),
            "beta": (self.beta is None or 0 < self.beta < math.inf, "positive, or None"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        self.doctor_options()

    def doctor_options(self) -> DoctorOptions:
        """What is trained, in the words of stage 2."""
        return DoctorOptions(lora_rank=self.lora_rank, lora_layers=self.lora_layers, eval_fraction=self.eval_fraction)

    def training_arguments(self, checkpoints: Path, on_cpu: bool, longest: int = 1) -> dict[str, Any]:
        """Arguments of `transformers.TrainingArguments`; the base stays in the dtype it was loaded in.

        `longest` is how many tokens the longest response has, its prompt included: where a step's pairs would be too
        much at once, gradients of fewer are added up.
        """
        # On a CPU attention is eager (`open_run`).
        scores = SCORES_A_TOKEN_IN_MEMORY if on_cpu else math.inf
        fitting = [
            pairs
            for pairs in range(1, self.batch_pairs + 1)
            if self.batch_pairs % pairs == 0 and tokens_worth(2 * pairs, longest, scores) <= TOKENS_AT_ONCE
        ]
        at_once = max(fitting, default=1)
        return {
            "output_dir": str(checkpoints),
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": self.batch_pairs // at_once,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": self.warmup,
            "weight_decay": 0.0,
            "max_grad_norm": self.max_grad_norm,
            "seed": self.seed,
            "logging_steps": 5,
            # Ten times: an epoch of many pairs is too much to lose.
            "save_strategy": "steps",
            "save_steps": 0.1,
            "save_total_limit": 2,
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": on_cpu,
        }


AnyConfig = DoctorConfig | RewardModelConfig


@dataclass(frozen=True)
class BaselineRun:
    """A training that may begin, go on, or need nothing more.

    Attributes:
        output: the folder it fills; checkpoints lie in `output/checkpoints`.
        train_set, held_out: rows of the store; no held-out ones is None.
        checkpoint: the one to go on from, or None.
        done: the folder holds the finished result of these very settings.
    """

    output: Path
    train_set: Any
    held_out: Any | None
    checkpoint: Path | None
    done: bool

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.output / "checkpoints"

    @property
    def resume_from(self) -> str | None:
        """The checkpoint as `Trainer.train` wants it."""
        return None if self.checkpoint is None else str(self.checkpoint)

    @property
    def counts(self) -> dict[str, float]:
        """How many pairs are trained on and held out, in the words of `train_doctor`."""
        return {"train_pairs": float(len(self.train_set)), "held_out_pairs": float(len(self.held_out or ()))}


def made_from(
    base: LoadedModel, rewards: RewardStore, method: str, options: BaselineOptions, beta: float | None
) -> dict[str, Any]:
    """What a result's config says of its making; `training` has the β that was really used, if the method has one."""
    training = {"method": method, **asdict(options), "beta": beta}
    return {
        "base": base.spec,
        "base_fingerprint": dict(base.fingerprint),
        "rewards_fingerprint": dict(rewards_for(base, rewards).fingerprint),
        "training": {name: value for name, value in training.items() if value is not None},
        "versions": _versions("llmdoctor", "torch", "transformers", "peft", "trl"),
    }


def open_run(
    base: LoadedModel, rewards: RewardStore, output: Path, config: AnyConfig, eval_fraction: float, resume: bool
) -> BaselineRun:
    """Split the store, see what stands in `output`, and make the base ready to be trained.

    Raises:
        UserError: rewards in the output folder itself or of another tokenizer whose tokens are no bytes, too few
            pairs, one that does not fit into the base's context, or a `base` that is part of a doctor already.
        FingerprintMismatch: the folder holds another result, or checkpoints of one.
    """
    need_one_gpu(base.model)
    if output.resolve() == rewards.folder.resolve():
        method = config.training["method"]
        raise UserError(f"{output} holds the token rewards; give the {method} baseline a folder of its own")
    if hasattr(base.model, "peft_config"):
        raise UserError(f"{base.spec} carries an adapter already; load the base again for another baseline")
    carried = rewards_for(base, rewards)
    need_room(base, carried)
    train_set, held_out = split_rows(carried, eval_fraction)
    finished = output / _last_file(config)
    if not resume:
        # Else a run that is cut would leave the result of other settings to be found.
        finished.unlink(missing_ok=True)
    elif finished.is_file():
        check_same_training(output, training_identity(type(config).load(output)), training_identity(config))
        return BaselineRun(output, train_set, held_out, None, done=True)
    checkpoint = claim_checkpoints(output / "checkpoints", config, resume)
    if base.model.device.type == "cpu":
        # As in `train_doctor`: fused attention has no fast bf16 backward on CPUs.
        base.model.set_attn_implementation("eager")
    return BaselineRun(output, train_set, held_out, checkpoint, done=False)


def finish_doctor(run: BaselineRun, doctor: Doctor, config: DoctorConfig) -> None:
    """Measure a trained guide on the held-out pairs and write it as a doctor's folder."""
    config.metrics = {**held_out_metrics(doctor, run.held_out), **run.counts}
    doctor.doctor_config = config

    def save(folder: Path) -> None:
        doctor.save_pretrained(folder)
        # The card of a doctor speaks of flow balance.
        write_text(folder / "README.md", _card(config))

    place(run, config, save)


def place(run: BaselineRun, config: AnyConfig, save: Callable[[Path], None]) -> None:
    """Put what `save` writes beside the checkpoints; the config comes last and makes the folder a result."""
    fill_folder(run.output, save, last=_last_file(config))


def token_rows(rows: Any, encoder: ChatEncoder) -> dict[str, list[list[int]]]:
    """Columns `prompt_ids`, `chosen_ids`, `rejected_ids` of store rows: the very ids that a doctor is trained on."""
    collator = RewardCollator(encoder)
    return {
        "prompt_ids": [collator.prompt_ids({"prompt": prompt}) for prompt in rows["prompt"]],
        "chosen_ids": [list(ids) for ids in rows["chosen_ids"]],
        "rejected_ids": [list(ids) for ids in rows["rejected_ids"]],
    }


def longest_response(columns: dict[str, list[list[int]]]) -> int:
    """Tokens of the longest prompt with a response behind it, of `token_rows`."""
    both = (columns["chosen_ids"], columns["rejected_ids"])
    return max(len(p) + len(ids) for side in both for p, ids in zip(columns["prompt_ids"], side, strict=True))


def lora_config(model: Any, options: BaselineOptions, task_type: str, **extra: Any) -> Any:
    """The `peft.LoraConfig` of a doctor, for `model`."""
    from peft import LoraConfig

    return LoraConfig(task_type=task_type, **lora_arguments(model, options.doctor_options()), **extra)


def require_trl(method: str) -> None:
    """Raise UserError unless TRL can be imported."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{method} is trained by TRL, which is not installed: pip install -e '.[bench]' in llmdoctor's folder"
        ) from error


class AdapterTraining:
    """For TRL's trainers, to stand before them among the bases: our data as it is, adapters alone in checkpoints.

    Raises:
        TrainingDiverged: loss or gradient is not finite; checkpoints from before are kept.
    """

    model: Any
    args: Any
    state: Any
    accelerator: Any

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        # Rows are token ids already; TRL would tokenise text once more, with its own joins and end-of-turn tokens.
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: a checkpoint needs no card, and TRL's would name a folder of this machine."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass; stops the training where it is no longer finite."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if not bool(torch.isfinite(loss) & torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            raise TrainingDiverged(
                f"training diverged at step {self.state.global_step + 1}: loss or gradient is not finite; lower "
                f"learning_rate. Checkpoints from before are in {self.args.output_dir}"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        # Left to find out whether the embeddings were trained, peft would look the base up on the hub.
        self.accelerator.unwrap_model(self.model).save_pretrained(str(folder), save_embedding_layers=False)
        # Names the folder of this machine where the base's files lie.
        (folder / "README.md").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        set_peft_model_state_dict(self.accelerator.unwrap_model(model or self.model), weights)


def _last_file(config: AnyConfig) -> str:
    return CONFIG_NAME if isinstance(config, DoctorConfig) else REWARD_CONFIG_NAME


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _card(config: DoctorConfig) -> str:
    method = config.training["method"]
    table = "\n".join(f"| {name} | {value} |" for name, value in {**config.training, **config.metrics}.items())
    return (
        f"# Baseline {method}: {config.dimension}\n\nA LoRA adapter on `{config.base}`, trained with the objective "
        f"`{method}` to compare doctors with. It has a doctor's layout; its value head is untrained.\n\n"
        f"| name | value |\n|---|---|\n{table}\n"
    )
