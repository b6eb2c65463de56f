"""A draft model from a patient: `models.draft` trained on the patient's own answers.

Shapes: M places where a guess is due, D hidden size, S lower layers that are read, V vocabulary, W tokens that may be
guessed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.prompts import Prompt
from llmdoctor.decoding.cache import new_cache, sees_everything
from llmdoctor.decoding.row import RANKS
from llmdoctor.errors import UserError
from llmdoctor.files import claim
from llmdoctor.models.draft import CONFIG_NAME, DraftModel, save_draft
from llmdoctor.models.layers import decoder_layers, lower_layers
from llmdoctor.models.loading import LoadedModel, need_one_gpu
from llmdoctor.shrink.distil import (
    Batch,
    DistilOptions,
    Progress,
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

_BLIND = 0.15
"""Share of the places at which training hides the lower layers: behind a guess there are none."""

_LATER = 0.7
"""A guess is only looked at where the ones before it held, so what it weighs falls with each."""


@dataclass(frozen=True)
class DraftOptions(DistilOptions):
    """What the draft model is and how it is trained.

    Attributes:
        layers: how many layers it has; they begin as the patient's last ones. More agree better and make a guess cost
            more.
        lower_layers: how many of the patient's lower layers, at even distances, it reads beside the last states. They
            know of the text what the last layer has no use for; answers take so many times more on disk meanwhile.
        vocabulary: how many tokens may be guessed, the most frequent of the answers learned from. Fewer make a guess
            cost less, because most of it is the head, and miss the rarer tokens.
        unroll: guesses in a row to train. At 1 it learns to guess from the patient's states alone; at more also from
            its own estimates, as later guesses do, for as many times the passes.
    """

    tokens: int = 300000
    layers: int = 1
    lower_layers: int = 2
    vocabulary: int = 16384
    unroll: int = 1
    epochs: float = 6.0
    learning_rate: float = 3e-3
    batch_tokens: int = 512

    def __post_init__(self) -> None:
        self._check(
            layers=(self.layers >= 1, "at least 1"),
            lower_layers=(self.lower_layers >= 0, "at least 0"),
            vocabulary=(self.vocabulary >= RANKS, f"at least {RANKS}"),
            unroll=(self.unroll >= 1, "at least 1"),
        )
        super().__post_init__()


def make_draft(
    patient: LoadedModel,
    prompts: Sequence[Prompt],
    output: str | Path,
    *,
    options: DraftOptions | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a draft model for the patient to the folder `output`; `models.draft.load_draft` reads it.

    It reads at every token the patient's last hidden state that the token was drawn from and what some lower layers put
    out there, and learns to give the patient's next-token distribution (EAGLE, arXiv 2401.15077; EAGLE-3, arXiv
    2503.01840) on answers that the patient itself draws at temperature
    1, which is where it will be used (DistillSpec, arXiv 2310.08461), over the tokens that are frequent there
    (FR-Spec, arXiv 2502.14856). The patient's embeddings and head stay as they are and are not stored. Answers and
    checkpoints are kept in `NAME.parts/` while it runs, so a killed run goes on where it stopped; a finished one does
    nothing.

    Args:
        patient: a decoder-only model with its layers in `get_decoder().layers`; it is not changed.
        prompts: what it answers; the last `held_out` after shuffling are measured on.
        output: the draft model's folder, which appears whole or not at all.
        options: defaults if None.
        callbacks: more `TrainerCallback`s, for the progress of the training.
        progress: called with the number of tokens just drawn, over `options.tokens` in all.

    Returns:
        What `draft.json` says: layers, settings, fingerprints, versions, and of the held-out answers, before and after
        training, what `_measure` finds.

    Raises:
        UserError: more layers than there are, too few prompts, or a folder that holds something else.
        FingerprintMismatch: the folder, or the unfinished run beside it, is of another patient or other settings.
        TrainingDiverged: the loss is no longer finite; checkpoints from before are kept.
    """
    options = options or DraftOptions()
    output = Path(output)
    total = len(decoder_layers(patient.model))
    if options.layers > total:
        raise UserError(f"layers must be at most the {total} there are, got {options.layers}")
    layers, lower = range(total - options.layers, total), lower_layers(total, options.lower_layers)
    fingerprint = fingerprint_of(patient, prompts, options)
    settings = settings_of(patient, options)
    finished = finished_record(output / CONFIG_NAME, fingerprint, settings, "a draft model")
    if finished is not None:
        return finished
    # Refused before anything is drawn, not after hours.
    config = patient.model.config.get_text_config()
    if not sees_everything(new_cache(config, 0), config):
        raise UserError(
            f"{type(patient.model).__name__} cannot have a draft model: it has layers that see a window or a state, "
            "from which guesses that do not hold cannot be taken back"
        )
    size = patient_head(patient).weight.shape[0]
    need_one_gpu(patient.model)
    DraftModel.from_layers(patient.model, layers, torch.arange(1))
    parts = parts_of(output)
    claim(parts, fingerprint, "Delete that folder, or give another output folder.", settings)
    learned, held = draw_answers(patient, prompts, parts / "answers", options, progress, lower)
    stops = ChatEncoder.for_model(patient.model, patient.tokenizer).stop_ids
    vocabulary = choose_vocabulary(learned, min(options.vocabulary, size), size, stops)
    draft = DraftModel.from_layers(patient.model, layers, vocabulary, lower)
    draft.cast(torch.float32)
    before = _measure(draft, held)
    loss = partial(_loss, unroll=options.unroll)
    train(draft, learned, collate, loss, parts / "checkpoints", options, callbacks)
    draft.cast(patient.model.dtype)
    record = describe(options, learned, held, (before, _measure(draft, held)), fingerprint)
    whole = save_draft(draft, patient, record, output)
    shutil.rmtree(parts)
    return whole


def choose_vocabulary(answers: Sequence[Answer], size: int, total: int, stops: Iterable[int]) -> Tensor:
    """[W] ascending ids of the `size` most frequent tokens of the answers.

    Args:
        answers: to count in.
        size: how many; of tokens that are equally frequent, or not there, the lowest ids.
        total: V, all ids there are.
        stops: ids that are always among them, because every answer ends.
    """
    ids = [token for answer in answers for token in answer.completion_ids]
    counts = torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=total)
    first = sorted(set(stops))
    counts[first] = len(ids) + 1
    return counts.sort(descending=True, stable=True).indices[: max(size, len(first))].sort().values


def collate(answers: Sequence[Answer]) -> Batch:
    """Answers to one right-padded batch with the teacher's states.

    Example, prompts [5, 6] and [5] with answers [7, 2] and [8] (the padding that rounds the width up is not shown).
    The first token of an answer is drawn before anything is guessed, so only the 2 of the first row is:

        out: {"input_ids": [[5, 6, 7, 2], [5, 8, 0, 0]],
              "states": [2, 4, D (1 + S)],               # the teacher's on every token but the last; 0 elsewhere
              "log_normalisers": [2, 4],                 # of its distribution after these tokens; 0 elsewhere
              "guesses": [[0, 0, 1, 0], [0, 0, 0, 0]]}   # at each token, of how many guesses in a row the last is due
    """
    ids, _ = right_padded([(answer.prompt_ids, answer.completion_ids) for answer in answers])
    states = [answer.states() for answer in answers]
    padded = torch.zeros(*ids.shape, states[0].shape[-1], dtype=states[0].dtype)
    normalisers = torch.zeros(ids.shape)
    guesses = torch.zeros(ids.shape, dtype=torch.long)
    for row, answer in enumerate(answers):
        known = answer.length - 1
        padded[row, :known] = states[row]
        normalisers[row, :known] = answer.log_normalisers()
        guesses[row, len(answer.prompt_ids) : known] = torch.arange(1, len(answer.completion_ids))
    return {"input_ids": ids, "states": padded, "log_normalisers": normalisers, "guesses": guesses}


def _guesses(draft: DraftModel, batch: Batch, count: int, blind: float = 0.0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The 1st … `count`th guess in a row, at the M places where one is due.

    The first reads the teacher's states and its lower layers'. Each further one reads the one before it in their place,
    at all tokens at once; in decoding only the latest states are estimates. At a share `blind` of the places, drawn
    anew, the first reads no lower layers either.

    Returns:
        Of each guess the draft's states [M, D], the teacher's [M, D] and the teacher's log-normalisers [M].
    """
    tokens, states = batch["input_ids"][:, 1:], batch["states"][:, :-1]
    width = draft.fuse.out_features
    last = batch["states"][..., :width]
    if blind:
        hidden_from = torch.rand(states.shape[:2], device=states.device) < blind
        states = torch.cat([states[..., :width], states[..., width:].masked_fill(hidden_from[..., None], 0)], dim=-1)
    found = []
    for number in range(1, count + 1):
        with in_dtype_of(draft.head):
            hidden = draft.decoder(inputs_embeds=draft.embed(tokens, states), use_cache=False).last_hidden_state
        due = batch["guesses"][:, 1:] >= number
        found.append((hidden[due], last[:, 1:][due], batch["log_normalisers"][:, 1:][due]))
        states = torch.cat([last[:, :1], hidden[:, :-1]], dim=1)
    return found


def _loss(draft: DraftModel, batch: Batch, tv_weight: float, *, unroll: int) -> Tensor:
    """Of each guess in a row the mean over the places where one is due, weighted and added up."""
    total = torch.zeros((), device=batch["input_ids"].device)
    blind = _BLIND if draft.lower else 0.0
    for number, (hidden, states, normalisers) in enumerate(_guesses(draft, batch, unroll, blind)):
        each = distillation_loss(hidden, states, draft.head, tv_weight, normalisers)
        # Answers may all be too short for so many guesses.
        total = total + _LATER**number * each.sum() / max(len(each), 1)
    return total


@torch.no_grad()
def _measure(draft: DraftModel, answers: Sequence[Answer]) -> dict[str, float]:
    """Means over the guesses of held-out answers.

    Returns:
        `acceptance` Σ_v min(p_v, q_v) of the first guess, `second_acceptance` of the one that reads it, `mass` P of the
        patient's distribution that can be guessed at all, and `kl` Σ_v p_v log(p_v / q_v) of the first guess in nats.
    """
    draft.eval()
    sums = torch.zeros(2, 4, dtype=torch.float64)
    for batch in to_measure(answers, collate, draft.decoder.device):
        for number, (hidden, states, normalisers) in enumerate(_guesses(draft, batch, 2)):
            found = mean_overlap(hidden, states, draft.head, normalisers)
            sums[number] += torch.tensor([*found, len(hidden)], dtype=torch.float64)
    first, second = sums[:, :3] / sums[:, 3:].clamp(min=1)
    return {
        "acceptance": float(first[0]),
        "second_acceptance": float(second[0]),
        "mass": float(first[2]),
        "kl": float(first[1]),
    }
