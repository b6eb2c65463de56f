"""A student trained to a patient's distributions on the patient's own answers: what small and draft models share."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmdoctor.data.prompts import Prompt
from llmdoctor.errors import FingerprintMismatch, Settings, TrainingDiverged, UserError
from llmdoctor.files import digest
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.logps import LogitsHead
from llmdoctor.shrink.losses import Head
from llmdoctor.shrink.samples import Answer, Sampler
from llmdoctor.tfpo.checkpoints import last_checkpoint

Progress = Callable[[int], None]
Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Answer]], Batch]
Loss = Callable[[Any, Batch, float], Tensor]
"""Of a student, a batch and the share of total variation: one number."""


@dataclass(frozen=True)
class DistilOptions:
    """What is drawn and how a student is trained on it.

    Attributes:
        tokens: how many tokens of the patient's own answers to learn from. More cost time in proportion and agree
            better; most of the time goes into drawing them and into the passes over them.
        epochs: passes over the answers.
        max_new_tokens: longest answer. What is trained is at its best up to about this length.
        held_out: prompts whose answers are not learned from but measured on.
        learning_rate: peak of a cosine schedule.
        batch_tokens: tokens of a step, prompts and padding to the longest included (then rows are filled up to a
            multiple of 16). Smaller makes more steps of the same tokens.
        tv_weight: the loss starts as the Kullback-Leibler divergence from the patient and ends as this share of total
            variation distance, the chance that a draft token is rejected. 0 gives a lower divergence, 1 more accepted
            drafts.
        seed: of all draws.
    """

    tokens: int = 150000
    epochs: float = 3.0
    max_new_tokens: int = 128
    held_out: int = 32
    learning_rate: float = 1e-3
    batch_tokens: int = 256
    tv_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check(
            tokens=(self.tokens >= 1, "at least 1"),
            epochs=(0 < self.epochs < math.inf, "positive"),
            max_new_tokens=(self.max_new_tokens >= 1, "at least 1"),
            held_out=(self.held_out >= 1, "at least 1"),
            learning_rate=(0 < self.learning_rate < math.inf, "positive"),
            batch_tokens=(self.batch_tokens >= 1, "at least 1"),
            tv_weight=(0 <= self.tv_weight <= 1, "in [0, 1]"),
        )

    def _check(self, **checks: tuple[bool, str]) -> None:
        for name, (good, expected) in checks.items():
            if not good:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def fingerprint_of(
    patient: LoadedModel, prompts: Sequence[Prompt], options: DistilOptions, **chosen: Any
) -> dict[str, str]:
    """What a run is made from; `chosen` is what follows from patient and options. UserError for too few prompts."""
    check_prompts(len(prompts), options)
    return {
        "patient": digest(patient.fingerprint),
        "prompts": digest([[prompt.id, list(prompt.messages)] for prompt in prompts]),
        "options": digest({**asdict(options), **chosen}),
    }


def check_prompts(count: int, options: DistilOptions) -> None:
    """UserError for too few prompts to learn from some and measure on others."""
    if count <= options.held_out:
        raise UserError(f"{count} prompts leave none to learn from with held_out {options.held_out}")


def check_place(record_path: Path, kind: str) -> None:
    """UserError where the folder of a record holds something else than `kind`, such as "a shrunk model"."""
    output = record_path.parent
    there = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if there and not record_path.is_file():
        raise UserError(f"{output} holds something else than {kind}; give {kind} a folder of its own")


def parts_of(output: Path) -> Path:
    """Where an unfinished run keeps answers and checkpoints."""
    return output.with_name(f"{output.name}.parts")


def settings_of(patient: LoadedModel, options: DistilOptions) -> Settings:
    """What stands behind the fingerprints of `fingerprint_of`, as far as it is settings."""
    return {"patient": {"patient": patient.spec, **patient.fingerprint}, "options": asdict(options)}


def finished_record(
    record_path: Path, fingerprint: dict[str, str], settings: Settings, kind: str
) -> dict[str, Any] | None:
    """The record of a finished run of the same settings, or None where nothing is.

    Args:
        record_path: the file of it in the output folder.
        fingerprint: what the run is made from.
        settings: those of `settings_of`.
        kind: what the folder should hold, such as "a shrunk model".

    Raises:
        UserError: the folder holds something else.
        FingerprintMismatch: it is of another run.
    """
    output = record_path.parent
    check_place(record_path, kind)
    if not record_path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(record_path.read_text(encoding="utf-8"))
        stored, was = record["fingerprint"], {"options": record["options"]}
        was["patient"] = {"patient": record["patient"], **record["patient_fingerprint"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record_path} is broken ({error!r}); delete {output}, or give another folder") from error
    if stored != fingerprint:
        raise FingerprintMismatch(
            str(output), stored, fingerprint, "Delete that folder, or give another output folder.", was, settings
        )
    # A run that was killed at its very end.
    shutil.rmtree(parts_of(output), ignore_errors=True)
    return record


def patient_head(patient: LoadedModel) -> LogitsHead:
    """The patient's head; UserError where its logits are no known function of its states."""
    try:
        return LogitsHead.for_model(patient.model)
    except UserError as error:
        raise UserError(f"{patient.spec} cannot be shrunk: {error}") from error


def draw_answers(
    patient: LoadedModel,
    prompts: Sequence[Prompt],
    folder: Path,
    options: DistilOptions,
    progress: Progress | None,
    tapped: Sequence[int] = (),
) -> tuple[list[Answer], list[Answer]]:
    """Answers to learn from and held-out ones, with what the tapped layers say."""
    # Prompts of a file often come topic by topic, and a short run sees the first ones alone.
    mixed = random.Random(options.seed).sample(list(prompts), len(prompts))
    sampler = Sampler(patient, folder, options.max_new_tokens, options.seed, tapped)
    held = sampler.draw("held-out", mixed[-options.held_out :], None)
    learned = sampler.draw("learned", mixed[: -options.held_out], options.tokens, progress)
    return learned, held


def train(
    student: Any,
    answers: Sequence[Answer],
    collate: Collate,
    loss: Loss,
    checkpoints: Path,
    options: DistilOptions,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Train what of the student requires gradients, from the newest checkpoint on.

    Raises:
        TrainingDiverged: the loss is no longer finite; checkpoints from before are kept.
    """
    decoder = student.get_decoder()
    on_cpu = decoder.device.type == "cpu"
    if on_cpu:
        # As in `train_doctor`: fused attention has no fast bf16 backward on CPUs.
        decoder.set_attn_implementation("eager")
    args = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=options.seed,
        logging_steps=20,
        save_strategy="steps",
        save_steps=0.1,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        remove_unused_columns=False,
    )
    if args.n_gpu > 1 or args.world_size > 1:
        raise UserError("distillation runs on one device: show it a single GPU with CUDA_VISIBLE_DEVICES=0")
    trainer = _Distiller(
        loss,
        options.tv_weight,
        model=student,
        args=args,
        train_dataset=Batches(answers, options.batch_tokens),
        data_collator=lambda batches: collate(batches[0]),
        callbacks=list(callbacks),
    )
    checkpoint = last_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


class _Distiller(Trainer):
    """Trains with a `Loss` in which the share of total variation grows with the steps.

    Far from the teacher, where q is small wherever p is large, total variation has next to no gradient.
    """

    def __init__(self, loss: Loss, tv_weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = loss
        self.tv_weight = tv_weight

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch."""
        loss = self.loss(model, inputs, self.tv_weight * self.state.global_step / self.state.max_steps)
        if not bool(torch.isfinite(loss)):
            raise TrainingDiverged(
                f"training diverged at step {self.state.global_step + 1}: the loss is not finite; lower learning_rate. "
                f"Checkpoints from before are in {self.args.output_dir}"
            )
        return (loss, {}) if return_outputs else loss


class Batches(torch.utils.data.Dataset[Sequence[Answer]]):
    """Answers of about the same length together, at most `batch_tokens` tokens, padding included, at a time."""

    def __init__(self, answers: Sequence[Answer], batch_tokens: int) -> None:
        self.batches: list[list[Answer]] = []
        for answer in sorted(answers, key=lambda answer: answer.length):
            # Sorted, so the newest is the longest.
            if self.batches and (len(self.batches[-1]) + 1) * answer.length <= batch_tokens:
                self.batches[-1].append(answer)
            else:
                self.batches.append([answer])

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Sequence[Answer]:
        return self.batches[index]


def to_measure(answers: Sequence[Answer], collate: Collate, device: torch.device) -> Iterator[Batch]:
    """All answers in their order, a few at a time."""
    for first in range(0, len(answers), 16):
        yield {name: tensor.to(device) for name, tensor in collate(answers[first : first + 16]).items()}


def in_dtype_of(head: Head) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 where the patient's are: float32 weights keep small updates, products need not."""
    weight = head.weight
    return torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=weight.dtype == torch.bfloat16)


def answer_tokens(answers: Sequence[Answer]) -> int:
    """Tokens of all answers, prompts left out."""
    return sum(len(answer.completion_ids) for answer in answers)


def describe(
    options: DistilOptions,
    learned: Sequence[Answer],
    held: Sequence[Answer],
    figures: tuple[dict[str, float], dict[str, float]],
    fingerprint: dict[str, str],
) -> dict[str, Any]:
    """What every record says: settings, sizes, the held-out figures before and after training, versions."""
    before, after = figures
    return {
        "options": asdict(options),
        "answers": {"learned": len(learned), "held_out": len(held)},
        "tokens": {"learned": answer_tokens(learned), "held_out": answer_tokens(held)},
        "held_out": {"before": before, "after": after},
        "fingerprint": fingerprint,
        "versions": {name: version(name) for name in ("llmdoctor", "torch", "transformers")},
    }
