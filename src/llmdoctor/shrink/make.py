"""A small model from a patient: some of its layers, distilled on the patient's own answers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from llmdoctor.data.prompts import Prompt
from llmdoctor.files import atomic_folder, claim, write_json
from llmdoctor.models.layers import cast_weights, choose_layers, decoder_layers, keep_layers, parse_layers, weights_read
from llmdoctor.models.loading import LoadedModel, need_one_gpu
from llmdoctor.models.logps import LogitsHead
from llmdoctor.shrink.distil import (
    Batch,
    DistilOptions,
    Progress,
    answer_tokens,
    describe,
    draw_answers,
    fingerprint_of,
    finished_record,
    in_dtype_of,
    parts_of,
    patient_head,
    settings_of,
    to_measure,
    train,
)
from llmdoctor.shrink.losses import distillation_loss, mean_overlap
from llmdoctor.shrink.samples import Answer, right_padded

RECORD_NAME = "shrink.json"
SCHEMA = 1


@dataclass(frozen=True)
class ShrinkOptions(DistilOptions):
    """What is kept and how it is trained.

    Attributes:
        layers: how many layers to keep: the first ones and the last. Fewer are faster and agree less with the patient.
        keep: which layers to keep instead, by number from 0, such as 0,1,2,29.
    """

    layers: int = 5
    keep: str | None = None

    def __post_init__(self) -> None:
        self._check(layers=(self.layers >= 1, "at least 1"))
        super().__post_init__()


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
    fingerprint = fingerprint_of(patient, prompts, options, kept=kept)
    settings = settings_of(patient, options)
    finished = finished_record(output / RECORD_NAME, fingerprint, settings, "a shrunk model")
    if finished is not None:
        return finished
    # Refused before anything is drawn, not after hours.
    need_one_gpu(patient.model)
    small = keep_layers(patient.model, kept)
    head = patient_head(patient)
    parts = parts_of(output)
    claim(parts, fingerprint, "Delete that folder, or give another output folder.", settings)
    learned, held = draw_answers(patient, prompts, parts / "answers", options, progress)
    before = _measure(small, held, head)
    small.requires_grad_(True)
    # Most of a small model's weights are its embeddings; frozen, they cost neither gradients nor optimizer states.
    small.get_input_embeddings().requires_grad_(False)
    small.get_output_embeddings().requires_grad_(False)

    def loss(model: Any, batch: Batch, tv_weight: float) -> Tensor:
        hidden = _read(model, batch, head)
        return distillation_loss(hidden[batch["before"]], batch["states"], head, tv_weight).mean()

    train(small, learned, collate, loss, parts / "checkpoints", options, callbacks)
    cast_weights(small, patient.model.dtype)
    record = {
        "schema": SCHEMA,
        "patient": patient.spec,
        "patient_fingerprint": dict(patient.fingerprint),
        "layers": kept,
        "of_layers": total,
        "weights_read": {"patient": weights_read(patient.model), "small": weights_read(small)},
        **describe(options, learned, held, (before, _measure(small, held, head)), fingerprint),
    }
    _save(small, patient, record, output)
    shutil.rmtree(parts)
    return record


def collate(answers: Sequence[Answer]) -> Batch:
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
    states = torch.cat([answer.states()[len(answer.prompt_ids) - 1 :] for answer in answers])
    return {"input_ids": ids, "before": before, "states": states}


def _read(small: Any, batch: Batch, head: LogitsHead) -> Tensor:
    """[B, T, D] the small model's states on a batch."""
    with in_dtype_of(head):
        hidden: Tensor = small.get_decoder()(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def _measure(small: Any, answers: Sequence[Answer], head: LogitsHead) -> dict[str, float]:
    """Mean acceptance and KL(patient ‖ small) over the tokens of held-out answers."""
    small.eval()
    accepted = nats = 0.0
    for batch in to_measure(answers, collate, small.device):
        a, k, _ = mean_overlap(_read(small, batch, head)[batch["before"]], batch["states"], head)
        accepted, nats = accepted + a, nats + k
    tokens = answer_tokens(answers)
    return {"acceptance": accepted / tokens, "kl": nats / tokens}


def _save(small: Any, patient: LoadedModel, record: dict[str, Any], output: Path) -> None:
    tokenizer = copy.deepcopy(patient.tokenizer)
    # Neither the folder they were read from nor how says anything to who loads the copy.
    for leftover in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(leftover, None)
    with atomic_folder(output) as folder:
        small.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / RECORD_NAME, record)
