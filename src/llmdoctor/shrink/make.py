"""A small model from a patient: some of its layers, distilled on the patient's own answers."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmdoctor.data.prompts import Prompt
from llmdoctor.errors import FingerprintMismatch, TrainingDiverged, UserError
from llmdoctor.files import atomic_folder, claim, digest, write_json
from llmdoctor.models.layers import cast_weights, choose_layers, decoder_layers, keep_layers, parse_layers, weights_read
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.logps import LogitsHead
from llmdoctor.shrink.losses import distillation_loss, mean_overlap
from llmdoctor.shrink.samples import Answer, Sampler, right_padded
from llmdoctor.tfpo.train import last_checkpoint

RECORD_NAME = "shrink.json"
SCHEMA = 1
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ShrinkOptions:
    """What is kept and how it is trained.

    Attributes:
        layers: how many layers to keep: the first ones and the last. Fewer are faster and agree less with the patient.
        keep: which layers to keep instead, by number from 0, such as 0,1,2,29.
        tokens: how many tokens of the patient's own answers to learn from. More cost time in proportion and agree
            better; most of the time goes into drawing them and into the passes over them.
        epochs: passes over the answers.
        max_new_tokens: longest answer. The small model is at its best up to about this length.
        held_out: prompts whose answers are not learned from but measured on.
        learning_rate: peak of a cosine schedule.
        batch_tokens: tokens of a step, prompts and padding included. Smaller makes more steps of the same tokens.
        tv_weight: the loss starts as the Kullback-Leibler divergence from the patient and ends as this share of total
            variation distance, the chance that a draft token is rejected. 0 gives a lower divergence, 1 more accepted
            drafts.
        seed: of all draws.
    """

    layers: int = 5
    keep: str | None = None
    tokens: int = 150000
    epochs: float = 3.0
    max_new_tokens: int = 128
    held_out: int = 32
    learning_rate: float = 1e-3
    batch_tokens: int = 256
    tv_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "layers": (self.layers >= 1, "at least 1"),
            "tokens": (self.tokens >= 1, "at least 1"),
            "epochs": (0 < self.epochs < math.inf, "positive"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "held_out": (self.held_out >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "positive"),
            "batch_tokens": (self.batch_tokens >= 1, "at least 1"),
            "tv_weight": (0 <= self.tv_weight <= 1, "in [0, 1]"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def shrink(
    patient: LoadedModel,
    prompts: Sequence[Prompt],
    output: str | Path,
    *,
    options: ShrinkOptions | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a small model with the patient's vocabulary to the folder `output`, with `shrink.json` in it.

    Some layers of the patient, its embeddings and its head become a model of their own; its layers are trained to give
    the patient's next-token distribution (knowledge distillation, arXiv 1503.02531) at every token of answers that the
    patient itself draws at temperature 1, which is where a draft model for it will be used (DistillSpec, arXiv
    2310.08461). Embeddings and head stay the patient's. Answers and checkpoints are kept in `NAME.parts/` while it
    runs, so a killed run goes on where it stopped; a finished one does nothing.

    Args:
        patient: a decoder-only model with its layers in `get_decoder().layers`; it is not changed.
        prompts: what it answers; the last `held_out` after shuffling are measured on.
        output: the small model's folder, which appears whole or not at all.
        options: defaults if None.
        callbacks: more `TrainerCallback`s, for the progress of the training.
        progress: called with the number of tokens just drawn, over `options.tokens` in all.

    Returns:
        What `shrink.json` says: layers, settings, fingerprints, versions, and of the held-out answers the acceptance
        Σ_v min(p_v, q_v) and KL(p ‖ q) in nats, means over their tokens, of the kept layers before and after training.

    Raises:
        UserError: layers that cannot be kept, too few prompts, or a folder that holds something else.
        FingerprintMismatch: the folder, or the unfinished run beside it, is of another patient or other settings.
        TrainingDiverged: the loss is no longer finite; checkpoints from before are kept.
    """
    options = options or ShrinkOptions()
    output = Path(output)
    total = len(decoder_layers(patient.model))
    kept = parse_layers(options.keep, total) if options.keep is not None else choose_layers(total, options.layers)
    if len(prompts) <= options.held_out:
        raise UserError(f"{len(prompts)} prompts leave none to learn from with held_out {options.held_out}")
    fingerprint = {
        "patient": digest(patient.fingerprint),
        "prompts": digest([[prompt.id, list(prompt.messages)] for prompt in prompts]),
        "options": digest({**asdict(options), "kept": kept}),
    }
    finished = _finished(output, fingerprint)
    parts = output.with_name(f"{output.name}.parts")
    if finished is not None:
        # A run that was killed at its very end.
        shutil.rmtree(parts, ignore_errors=True)
        return finished
    # Refused before anything is drawn, not after hours.
    small = keep_layers(patient.model, kept)
    try:
        head = LogitsHead.for_model(patient.model)
    except ValueError as error:
        raise UserError(f"{patient.spec} cannot be shrunk: {error}") from error
    claim(parts, fingerprint, "Delete that folder, or give another output folder.")
    learned, held = _answers(patient, prompts, parts / "answers", options, progress)
    before = _measure(small, held, head)
    _train(small, learned, head, parts / "checkpoints", options, callbacks)
    cast_weights(small, patient.model.dtype)
    record = {
        "schema": SCHEMA,
        "patient": patient.spec,
        "patient_fingerprint": dict(patient.fingerprint),
        "layers": kept,
        "of_layers": total,
        "weights_read": {"patient": weights_read(patient.model), "small": weights_read(small)},
        "options": asdict(options),
        "answers": {"learned": len(learned), "held_out": len(held)},
        "tokens": {"learned": _tokens(learned), "held_out": _tokens(held)},
        "held_out": {"before": before, "after": _measure(small, held, head)},
        "fingerprint": fingerprint,
        "versions": {name: version(name) for name in ("llmdoctor", "torch", "transformers")},
    }
    _save(small, patient, record, output)
    shutil.rmtree(parts)
    return record


class _Distiller(Trainer):
    """Trains a student to its teacher's distributions; a batch comes with the teacher's states."""

    def __init__(self, head: LogitsHead, tv_weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = head
        self.tv_weight = tv_weight

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the batch's answer tokens; the share of total variation grows with the steps.

        Far from the teacher, where q is small wherever p is large, total variation has next to no gradient.
        """
        with _in_dtype_of(self.head):
            hidden = model.get_decoder()(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
        tv_weight = self.tv_weight * self.state.global_step / self.state.max_steps
        loss = distillation_loss(hidden[inputs["before"]], inputs["states"], self.head, tv_weight).mean()
        if not bool(torch.isfinite(loss)):
            raise TrainingDiverged(
                f"training diverged at step {self.state.global_step + 1}: the loss is not finite; lower learning_rate. "
                f"Checkpoints from before are in {self.args.output_dir}"
            )
        return (loss, hidden) if return_outputs else loss


class _Batches(torch.utils.data.Dataset[Sequence[Answer]]):
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


def collate(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """Answers to one right-padded batch, and the teacher's states on their tokens.

    Example, prompts [5, 6] and [5] with answers [7, 2] and [8] (the padding that rounds the width up is not shown):

        out: {"input_ids": [[5, 6, 7, 2], [5, 8, 0, 0]],
              "before": [[F, T, T, F], [T, F, F, F]],    # the columns from which answer tokens are predicted
              "states": [3, D]}                          # the teacher's, at these columns, row after row
    """
    ids, mask = right_padded([(answer.prompt_ids, answer.completion_ids) for answer in answers])
    columns = torch.arange(ids.shape[1])
    begin = torch.tensor([len(answer.prompt_ids) - 1 for answer in answers])[:, None]
    before = (columns >= begin) & (columns < mask.sum(-1, keepdim=True) - 1)
    return {"input_ids": ids, "before": before, "states": torch.cat([answer.states() for answer in answers])}


def _answers(
    patient: LoadedModel, prompts: Sequence[Prompt], folder: Path, options: ShrinkOptions, progress: Progress | None
) -> tuple[list[Answer], list[Answer]]:
    """Answers to learn from and held-out ones."""
    # Prompts of a file often come topic by topic, and a short run sees the first ones alone.
    mixed = random.Random(options.seed).sample(list(prompts), len(prompts))
    sampler = Sampler(patient, folder, options.max_new_tokens, options.seed)
    held = sampler.draw("held-out", mixed[-options.held_out :], 1)
    learned = sampler.draw("learned", mixed[: -options.held_out], options.tokens, progress)
    return learned, held


def _train(
    small: Any,
    answers: Sequence[Answer],
    head: LogitsHead,
    checkpoints: Path,
    options: ShrinkOptions,
    callbacks: Sequence[TrainerCallback],
) -> None:
    small.requires_grad_(True)
    # Most of a small model's weights are its embeddings; frozen, they cost neither gradients nor optimizer states.
    small.get_input_embeddings().requires_grad_(False)
    small.get_output_embeddings().requires_grad_(False)
    on_cpu = small.device.type == "cpu"
    if on_cpu:
        # As in `train_doctor`: fused attention has no fast bf16 backward on CPUs.
        small.set_attn_implementation("eager")
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
        raise UserError("shrink trains on one device: show it a single GPU with CUDA_VISIBLE_DEVICES=0")
    trainer = _Distiller(
        head,
        options.tv_weight,
        model=small,
        args=args,
        train_dataset=_Batches(answers, options.batch_tokens),
        data_collator=lambda batches: collate(batches[0]),
        callbacks=list(callbacks),
    )
    checkpoint = last_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


@torch.no_grad()
def _measure(small: Any, answers: Sequence[Answer], head: LogitsHead) -> dict[str, float]:
    """Mean acceptance and KL(patient ‖ small) over the tokens of held-out answers."""
    small.eval()
    accepted = nats = 0.0
    for first in range(0, len(answers), 16):
        batch = {name: tensor.to(small.device) for name, tensor in collate(answers[first : first + 16]).items()}
        with _in_dtype_of(head):
            hidden = small.get_decoder()(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        a, k = mean_overlap(hidden[batch["before"]], batch["states"], head)
        accepted, nats = accepted + a, nats + k
    tokens = _tokens(answers)
    return {"acceptance": accepted / tokens, "kl": nats / tokens}


def _in_dtype_of(head: LogitsHead) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 where the patient's are: float32 weights keep small updates, products need not."""
    weight = head.linear.weight
    return torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=weight.dtype == torch.bfloat16)


def _tokens(answers: Sequence[Answer]) -> int:
    return sum(len(answer.completion_ids) for answer in answers)


def _finished(output: Path, fingerprint: dict[str, str]) -> dict[str, Any] | None:
    """The record of a finished run of the same settings, or None where nothing is."""
    if not output.exists():
        return None
    if not (output / RECORD_NAME).is_file():
        if output.is_dir() and not any(output.iterdir()):
            return None
        raise UserError(f"{output} holds something else than a shrunk model; give the small model a folder of its own")
    record: dict[str, Any] = json.loads((output / RECORD_NAME).read_text(encoding="utf-8"))
    if record["fingerprint"] != fingerprint:
        raise FingerprintMismatch(
            str(output), record["fingerprint"], fingerprint, "Delete that folder, or give another output folder."
        )
    return record


def _save(small: Any, patient: LoadedModel, record: dict[str, Any], output: Path) -> None:
    tokenizer = copy.deepcopy(patient.tokenizer)
    # Neither the folder they were read from nor how says anything to who loads the copy.
    for leftover in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(leftover, None)
    with atomic_folder(output) as folder:
        small.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / RECORD_NAME, record)
