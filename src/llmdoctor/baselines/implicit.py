"""What a guide itself thinks of given responses: its implicit reward, token by token.

Shapes: L⁺, L⁻ tokens of the chosen and of the rejected response.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.formats import PreferencePair
from llmdoctor.errors import UserError
from llmdoctor.models.doctor import Doctor
from llmdoctor.models.loading import LoadedModel
from llmdoctor.rewards.face_scorer import FaceScorer
from llmdoctor.rewards.store import SIDES
from llmdoctor.tfpo.trainer import preference_metrics

WITHOUT_REFERENCE = ("genarm",)
"""Methods whose reward is log π itself; that of all others is log π/π_ref."""

Scores = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Of the chosen and of the rejected response, [L⁺] and [L⁻] log-probs in nats."""


@dataclass(frozen=True)
class ImplicitReward:
    """The reward of both responses of one pair: `chosen` [L⁺] and `rejected` [L⁻], float32, in nats a token."""

    chosen: NDArray[np.float32]
    rejected: NDArray[np.float32]

    @property
    def totals(self) -> tuple[float, float]:
        """The responses' sums, which are what preferences compare."""
        return float(self.chosen.sum(dtype=np.float64)), float(self.rejected.sum(dtype=np.float64))


def implicit_rewards(
    guide: Doctor | str | Path,
    pairs: Iterable[PreferencePair | Mapping[str, Any]],
    *,
    base: LoadedModel | None = None,
    reference: bool | None = None,
    references: Sequence[Scores] | None = None,
    max_completion_length: int | None = 512,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[ImplicitReward]:
    """Per-token log π/π_ref (doctors, DPO) or log π (GenARM) of both responses of every pair.

    Prompts are read once for both responses, and pairs of similar lengths together.

    Args:
        guide: a doctor or a doctor's folder, whatever objective trained it.
        pairs: preference pairs, or rows of a reward store (`prompt`, `chosen_ids`, `rejected_ids`).
        base: the guide's base model if already loaded, for a folder; it becomes part of the guide.
        reference: subtract the reference's log-probs; None does what the guide's method means.
        references: these log-probs, from `reference_logps` of the same pairs and base, to be subtracted instead of
            being read anew for every guide.
        max_completion_length: of pairs given as text, keep only so many tokens of a response, as stage 1 does.
        batch_size: pairs in one forward pass.
        progress: called with the number of pairs just finished.

    Returns:
        One `ImplicitReward` a pair, in their order.

    Raises:
        UserError: a fully trained guide where the reference is needed (it keeps none), or an empty response.
    """
    doctor = guide if isinstance(guide, Doctor) else Doctor.from_pretrained(guide, base=base)
    if reference is None:
        reference = doctor.doctor_config.training.get("method") not in WITHOUT_REFERENCE
    if reference and references is None:
        _need_reference(doctor)
    rows = _rows(doctor, pairs, max_completion_length)
    if references is not None and _lengths(references) != [tuple(map(len, row.completions)) for row in rows]:
        raise UserError("the reference's log-probs are of other pairs, or of another tokenizer")
    was_training = doctor.training
    doctor.eval()
    scorer, of_reference = _scorer(doctor), None
    if reference and references is None:
        with doctor.as_reference():
            # Its own: a scorer keeps the states of what all prompts begin with.
            of_reference = _scorer(doctor)
    found: dict[int, ImplicitReward] = {}
    for places in _by_length(rows, batch_size):
        batch = [rows[index] for index in places]
        scores = _scores(scorer, batch)
        known: Sequence[Scores] | None = None
        if of_reference is not None:
            with doctor.as_reference():
                known = _scores(of_reference, batch)
        elif reference and references is not None:
            known = [references[index] for index in places]
        if known is not None:
            scores = [(a - ref_a, b - ref_b) for (a, b), (ref_a, ref_b) in zip(scores, known, strict=True)]
        found |= {index: ImplicitReward(*both) for index, both in zip(places, scores, strict=True)}
        if progress:
            progress(len(batch))
    doctor.train(was_training)
    return [found[index] for index in range(len(rows))]


def reference_logps(
    guide: Doctor | str | Path,
    pairs: Iterable[PreferencePair | Mapping[str, Any]],
    *,
    base: LoadedModel | None = None,
    max_completion_length: int | None = 512,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Scores]:
    """Per-token log π_ref of both responses of every pair: what the guide's base says without the adapter.

    Arguments and errors are as `implicit_rewards`'.
    """
    doctor = guide if isinstance(guide, Doctor) else Doctor.from_pretrained(guide, base=base)
    _need_reference(doctor)
    rows = _rows(doctor, pairs, max_completion_length)
    was_training = doctor.training
    doctor.eval()
    found: dict[int, Scores] = {}
    with doctor.as_reference():
        scorer = _scorer(doctor)
        for places in _by_length(rows, batch_size):
            found |= dict(zip(places, _scores(scorer, [rows[index] for index in places]), strict=True))
            if progress:
                progress(len(places))
    doctor.train(was_training)
    return [found[index] for index in range(len(rows))]


def accuracy(rewards: Sequence[ImplicitReward]) -> float:
    """Share of the pairs whose chosen response has the higher total; a tie counts one half."""
    margins = [chosen - rejected for chosen, rejected in (reward.totals for reward in rewards)]
    return sum((margin > 0) + 0.5 * (margin == 0) for margin in margins) / len(margins)


def held_out_metrics(doctor: Doctor, rows: Any | None) -> dict[str, float]:
    """`preference_metrics` of a trained guide on rows of a store; none for no rows."""
    if rows is None:
        return {}
    totals = np.array([reward.totals for reward in implicit_rewards(doctor, rows)])
    return preference_metrics(EvalPrediction(predictions=totals, label_ids=np.ones(len(totals))))


@dataclass(frozen=True)
class _Ids:
    """One pair as token ids."""

    prompt: list[int]
    completions: tuple[list[int], list[int]]

    @property
    def length(self) -> int:
        return len(self.prompt) + max(map(len, self.completions))


def _need_reference(doctor: Doctor) -> None:
    if not doctor.doctor_config.lora:
        raise UserError("a guide whose weights were all trained keeps no reference; give one with a LoRA adapter")


def _rows(doctor: Doctor, pairs: Iterable[PreferencePair | Mapping[str, Any]], max_length: int | None) -> list[_Ids]:
    return [_ids(number, pair, doctor.encoder, max_length) for number, pair in enumerate(pairs, start=1)]


def _lengths(scores: Sequence[Scores]) -> list[tuple[int, ...]]:
    return [(len(chosen), len(rejected)) for chosen, rejected in scores]


def _ids(number: int, pair: PreferencePair | Mapping[str, Any], encoder: ChatEncoder, max_length: int | None) -> _Ids:
    if isinstance(pair, PreferencePair):
        prompt = encoder.prompt_ids(pair.prompt)
        chosen = encoder.completion(pair.chosen, pair.chosen_complete, max_length).ids
        rejected = encoder.completion(pair.rejected, pair.rejected_complete, max_length).ids
    else:
        prompt = encoder.prompt_ids(json.loads(pair["prompt"]))
        chosen, rejected = (list(pair[f"{side}_ids"]) for side in SIDES)
    if not chosen or not rejected:
        raise UserError(f"pair {number} has an empty response that is not complete; there is nothing to score")
    return _Ids(prompt, (chosen, rejected))


def _scorer(doctor: Doctor) -> FaceScorer:
    return FaceScorer(doctor.causal_lm, doctor.encoder, doctor.logits_head, system=None)


def _scores(scorer: FaceScorer, rows: Sequence[_Ids]) -> list[Scores]:
    """Log-probs of both responses of every row, under the model as it is now."""
    scored = scorer.score([row.prompt for row in rows], [row.completions for row in rows])
    return [(scored[2 * place].numpy(), scored[2 * place + 1].numpy()) for place in range(len(rows))]


def _by_length(rows: Sequence[_Ids], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda index: -rows[index].length)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
