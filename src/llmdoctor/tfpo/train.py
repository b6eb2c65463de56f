"""Stage 2 as one call: a base model and token rewards to a doctor's folder."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_pt_utils import AcceleratorConfig

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.files import digest, write_json
from llmdoctor.models.doctor import CONFIG_NAME, Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.rewards.readout import CONFIG_NAME as READOUT_CONFIG
from llmdoctor.rewards.readout import Readout, fit_readout_to_ids
from llmdoctor.rewards.store import SIDES, RewardStore
from llmdoctor.rewards.transfer import rewards_for
from llmdoctor.tfpo.config import TFPOConfig
from llmdoctor.tfpo.rounds import ReadoutJudge, RoundOptions, RoundsTrainer, answering
from llmdoctor.tfpo.trainer import Progress, TFPOTrainer

_log = logging.getLogger(__name__)

Told = Callable[[str, int], None]

READOUT_FOLDER = "readout"
"""Within a doctor's folder: the judge of its rounds."""

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
    "accelerator_config", "auto_find_batch_size", "ignore_data_skip", "save_only_model", "world_size",
)  # fmt: skip
"""Further ones, of transformers, that hardly anybody touches: recorded where they are not at their defaults, so that
what was made without a word of them is still what it was."""

_OF_PAIRS = {"eta": "round_eta", "branch_coef": "round_branch_coef", "leaf_coef": "round_leaf_coef",
             "leaf_beta": "a round_leaf_coef with it", "value_coef": "", "value_margin": ""}  # fmt: skip
"""Settings of `TFPOConfig` that rounds do not go by, and what they go by instead."""


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


def train_doctor(
    base: LoadedModel,
    rewards: RewardStore,
    config: TFPOConfig,
    *,
    options: DoctorOptions | None = None,
    rounds: RoundOptions | None = None,
    patient: LoadedModel | None = None,
    dimension: str = "",
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
    told: Told | None = None,
) -> Path:
    """Train a doctor on `base`, in rounds or on the pairs, and write it to `config.output_dir`.

    Checkpoints go to `output_dir/checkpoints`; a run that was cut goes on from the last whole one and ends with the
    same weights as an uninterrupted one.

    Args:
        base: the doctor's base model; it is trained in place (adapters on top, or all weights).
        rewards: from stage 1; where the base has another tokenizer than the patient that gave them, they are carried
            over to its tokens (`rewards.transfer`).
        config: training arguments; `output_dir` is the doctor's folder.
        options: what is trained; defaults if None.
        rounds: how the rounds go; defaults if None. Without rounds it learns from the pairs and their token rewards.
        patient: the model that gave the rewards, which in rounds judges answers and, where it is not the doctor's base,
            gives them; loaded as the rewards' manifest names it if None. Never `base` itself, which training changes.
        dimension: name of what the doctor is for; the faces' name if empty.
        resume: go on from a checkpoint if there is one; False starts anew.
        callbacks: more `TrainerCallback`s, for the progress of the training.
        progress: called with the number of pairs that the untrained model has just read, before the training.
        told: called with what has just begun and the number of its units (pairs read for the read-out, answers drawn),
            then with "" and the number of those just finished.

    Returns:
        The doctor's folder.

    Raises:
        UserError: rewards in the doctor's own folder or of another tokenizer whose tokens are no bytes, too few pairs,
            or a setting of `config` that rounds do not go by.
        FingerprintMismatch: the checkpoints there belong to other settings or rewards.
        TrainingDiverged: see `TFPOTrainer`.
    """
    options, rounds = options or DoctorOptions(), rounds or RoundOptions()
    _check_heard(config, rounds)
    output = Path(config.output_dir)
    if rounds.rounds and not options.lora:
        raise UserError(
            "rounds need a LoRA doctor: a fully trained one keeps no reference to tilt from; with rounds 0 all weights "
            "are trained on the pairs"
        )
    if output.resolve() == rewards.folder.resolve():
        raise UserError(f"{output} holds the token rewards; give the doctor a folder of its own")
    given, rewards = rewards, rewards_for(base, rewards)
    doctor = _untrained(base, rewards, config, options, rounds, dimension)
    train_set, eval_set = _split(rewards, options.eval_fraction)
    config = copy.copy(config)
    config.output_dir = str(output / "checkpoints")
    if eval_set is None:
        config.eval_strategy = "no"
    checkpoint = _claim_checkpoints(Path(config.output_dir), doctor.doctor_config, resume)
    callbacks = list(callbacks)
    trainer: TFPOTrainer | None = None
    if not rounds.rounds or rounds.pairs_first:
        trainer = TFPOTrainer(doctor, config, train_set, eval_set, progress=progress, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if rounds.rounds:
        told = told or _silent
        patient = _patient_of(given, patient)
        answerer = None if doctor.doctor_config.is_on(patient) else patient
        if answerer is not None:
            # What cannot answer is told now, not after the pairs were read.
            answering(doctor, answerer, 1)
        readout = _readout(Path(config.output_dir), given, len(train_set), patient, told)
        length = rounds.round_max_new_tokens or max(
            len(ids)
            for row in (train_set if answerer is None else given.rows(len(train_set)))
            for ids in (row[f"{side}_ids"] for side in SIDES)
        )
        trainer = _rounds_trainer(
            doctor, config, rounds, ReadoutJudge(readout, base), length, answerer, train_set, eval_set, told, callbacks
        )
        checkpoint = last_checkpoint(Path(trainer.args.output_dir))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        readout.save_pretrained(output / READOUT_FOLDER)
    assert trainer is not None
    doctor.doctor_config.metrics = {
        **_held_out_figures(trainer),
        "train_pairs": float(len(train_set)),
        "held_out_pairs": float(len(eval_set or ())),
    }
    _write_into(output, doctor)
    return output


def _check_heard(config: TFPOConfig, rounds: RoundOptions) -> None:
    """UserError for a setting that was changed and that nothing in this training would go by."""
    if not rounds.rounds or rounds.pairs_first:
        return
    defaults = {field.name: field.default for field in fields(TFPOConfig)}
    for name, instead in _OF_PAIRS.items():
        if getattr(config, name) == defaults[name] or (name == "leaf_beta" and rounds.round_leaf_coef):
            continue
        raise UserError(
            f"{name} {getattr(config, name)} is a setting of the training on pairs, and these are rounds: "
            + (f"give {instead}, or rounds 0" if instead else "leave it out, or give rounds 0")
        )


def _untrained(
    base: LoadedModel,
    rewards: RewardStore,
    config: TFPOConfig,
    options: DoctorOptions,
    rounds: RoundOptions,
    dimension: str,
) -> Doctor:
    """The doctor before its first step, with what it will be trained by on its card."""
    doctor = Doctor.from_base(
        base,
        lora=lora_arguments(base.model, options) if options.lora else None,
        value_hidden=options.value_hidden,
        dimension=dimension or str(rewards.manifest["faces"]["name"]),
        seed=config.seed,
    )
    if base.model.device.type == "cpu":
        # Fused attention has no fast bf16 backward on CPUs; at completion lengths the plain product is faster.
        base.model.set_attn_implementation("eager")
    doctor.doctor_config.rewards_fingerprint = dict(rewards.fingerprint)
    doctor.doctor_config.training = {**recorded(config), **vars(options), **vars(rounds)}
    return doctor


def _patient_of(rewards: RewardStore, patient: LoadedModel | None) -> LoadedModel:
    """The patient, loaded if need be; UserError if the rewards are another one's."""
    patient = patient or load_model(str(rewards.manifest["patient"]))
    if patient.fingerprint.get("model") != rewards.fingerprint.get("model"):
        raise UserError(
            f"{patient.spec} is not the patient that gave the rewards in {rewards.folder} "
            f"({rewards.manifest['patient']}); rounds need that one to judge answers"
        )
    return patient


def _readout(checkpoints: Path, rewards: RewardStore, count: int, patient: LoadedModel, told: Told) -> Readout:
    """The patient's read-out of the first `count` pairs, kept among the checkpoints, which belong to these rewards."""
    if count < 4:
        raise UserError(f"rounds need at least 4 pairs to fit a judge to, got {count}; with rounds 0 the pairs suffice")
    folder = checkpoints / READOUT_FOLDER
    if (folder / READOUT_CONFIG).is_file():
        return Readout.from_pretrained(folder, patient)
    encoder = ChatEncoder.for_model(patient.model, patient.tokenizer)
    told("reading the pairs for the read-out", count)
    readout = fit_readout_to_ids(
        patient,
        [
            (encoder.prompt_ids(json.loads(row["prompt"])), row["chosen_ids"], row["rejected_ids"])
            for row in rewards.rows(count)
        ],
        # Few pairs are left out in fewer parts.
        folds=min(5, count // 2),
        progress=lambda units: told("", units),
    )
    readout.save_pretrained(folder)
    if readout.fit.accuracy < 0.55:
        _log.warning(
            "On pairs left out the read-out prefers the right answer in %.0f %% of the cases only: the doctor learns "
            "little from it. More pairs may help, or rounds 0.",
            100 * readout.fit.accuracy,
        )
    return readout


def _rounds_trainer(
    doctor: Doctor,
    config: TFPOConfig,
    rounds: RoundOptions,
    judge: ReadoutJudge,
    length: int,
    patient: LoadedModel | None,
    train_set: Any,
    eval_set: Any,
    told: Told,
    callbacks: list[TrainerCallback],
) -> RoundsTrainer:
    most = config.max_prompt_length
    prompts = [
        prompt
        for prompt in dict.fromkeys(train_set["prompt"])
        if most is None or len(doctor.encoder.prompt_ids(json.loads(prompt))) <= most
    ]
    config = copy.copy(config)
    config.output_dir = str(Path(config.output_dir) / "rounds")
    if eval_set is not None:
        told("reading the pairs held out", len(eval_set))
    return RoundsTrainer(
        doctor, config, rounds, prompts, judge, length, patient=patient, eval_dataset=eval_set, told=told,
        callbacks=callbacks, progress=lambda units: told("", units),
    )  # fmt: skip


def _silent(what: str, units: int) -> None:
    """Tells nobody."""


def recorded(config: TFPOConfig) -> dict[str, Any]:
    """What decides what a doctor learns, ready for JSON: `RECORDED`, and of the rest what is not at its default."""
    usual = {field.name: field.default for field in fields(config)}
    usual |= {"accelerator_config": AcceleratorConfig(), "world_size": 1}
    # Not every version of transformers has all of them.
    changed = [name for name in RECORDED_IF_CHANGED if getattr(config, name, None) != usual.get(name)]
    settings = {**config.to_dict(), "world_size": config.world_size}
    return {name: settings[name] for name in (*RECORDED, *changed)}


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


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; the trainer writes its state file last, so one without it was cut."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) > 0 and _is_json(path / "trainer_state.json"):
            whole.append((int(number), path))
    return max(whole)[1] if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _split(rewards: RewardStore, eval_fraction: float) -> tuple[Any, Any | None]:
    dataset = rewards.dataset()
    held_out = round(len(dataset) * eval_fraction)
    cut = len(dataset) - held_out
    if cut < 1:
        raise UserError(f"{len(dataset)} pairs leave none to train on with eval_fraction {eval_fraction}")
    return dataset.select(range(cut)), dataset.select(range(cut, len(dataset))) if held_out else None


def _claim_checkpoints(folder: Path, config: DoctorConfig, resume: bool) -> Path | None:
    current = {
        "base": digest(config.base_fingerprint),
        "rewards": digest(config.rewards_fingerprint),
        "settings": digest(decisive(config.training)),
    }
    marker = folder / "fingerprint.json"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    if _is_json(marker):
        stored = json.loads(marker.read_text(encoding="utf-8"))
        if stored != current:
            raise FingerprintMismatch(
                str(folder), stored, current, "Start anew with resume switched off, or give another output folder."
            )
    write_json(marker, current)
    return last_checkpoint(folder)


def _held_out_figures(trainer: TFPOTrainer) -> dict[str, float]:
    """The metrics of the final weights; evaluated here unless the last evaluation was of them."""
    if trainer.eval_dataset is None:
        return {}
    done = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    figures = done[-1] if done and done[-1]["step"] == trainer.state.global_step else trainer.evaluate()
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in figures.items()
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second"))
    }


def _write_into(output: Path, doctor: Doctor) -> None:
    """Put the finished doctor beside its checkpoints; `doctor.json` comes last and makes the folder a doctor."""
    # A doctor that is replaced file by file is none until its last file is there.
    (output / CONFIG_NAME).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        folder = Path(scratch) / "doctor"
        doctor.save_pretrained(folder)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            target = output / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
