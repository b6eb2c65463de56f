"""A lane whose model has another vocabulary than the patient.

It reads the text that the patient's tokens spell, split as its own tokenizer would split it, and answers in the
patient's vocabulary (see `models.vocab`).

The end of a text so far may be split otherwise once it goes on: after " hel" the doctor's next token may begin there,
or its last one may turn out to be " hello". Both count: at every place j tokens back the doctor's tokens that spell the
end of the text and go on, and that the patient would have split as it did, are weighed against the split as it stands,

    log w_j = Σ_{i < k−j} log π(c_{i+1} | c_{≤ i})        c the doctor's k tokens of the text so far

of which only differences matter, so it costs heads and no forward pass.

Shapes: B rows, K tokens side by side, D hidden size, V the patient's vocabulary, W the doctor's.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmdoctor.decoding.guides import LaneSpec
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.row import Tally
from llmdoctor.models.context import context_of
from llmdoctor.models.vocab import Translation

_FURTHEST_BACK = 8
"""Tokens that may be taken back: a character of four bytes may be as many tokens, and a word's end some more."""

_logger = logging.getLogger(__name__)


@dataclass
class _Text:
    """What one row has said, as the patient split it and as the doctor does."""

    prompt_length: int
    data: bytes = b""
    patient_ids: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=lambda: [0])
    doctor_ids: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    ended: bool = False
    overflown: bool = False
    # Of the last answer, the probability of what stands for none of the patient's tokens.
    unmapped: float = 0.0

    def copy(self) -> _Text:
        """The same text, to go on by itself."""
        lists: dict[str, Any] = {
            name: list(getattr(self, name)) for name in ("patient_ids", "ends", "doctor_ids", "columns", "states")
        }
        return replace(self, **lists)


@dataclass
class _Ending:
    """Tokens of the doctor's that would take the place of a row's last `back` ones, and where the patient goes then."""

    back: int
    tokens: list[int]
    targets: list[int]


class TranslatedLane:
    """As `Lane`, for a model of another vocabulary: tokens in and log-probabilities out are the patient's.

    Args:
        spec: the model; its `translation` is set.
        prompts: B lists of the model's own ids.
        room: tokens of the patient's that will be appended.
        said: B lists of the patient's tokens that the rows begin with.

    Raises:
        UserError: a model whose attention is not full in every layer: a text that goes on may be split otherwise, and
            then tokens are taken back.
    """

    def __init__(self, spec: LaneSpec, prompts: list[list[int]], room: int, said: Sequence[Sequence[int]] = ()) -> None:
        if len(spec.voices) != 1:
            raise ValueError(f"a lane that translates has one voice, got {len(spec.voices)}")
        if spec.translation is None:
            raise ValueError("a lane of the patient's own vocabulary needs no translation")
        self._translation: Translation = spec.translation
        self._spec = spec
        self._lane = Lane(spec, prompts, room)
        self._lane.need_full_attention()
        self._said = said
        self._context = context_of(spec.model)
        self._texts = [_Text(len(ids)) for ids in prompts]
        self.device = self._lane.device

    @property
    def width(self) -> int:
        """V."""
        return self._translation.width

    @property
    def sees_everything(self) -> bool:
        """Whether rows may join others: always, because tokens are taken back in all of them."""
        return self._lane.sees_everything

    @property
    def mask(self) -> Tensor:
        """[B, T] 1 on the columns of the doctor's cache that a row sees."""
        return self._lane.mask

    def prefill(self) -> Tensor:
        """Run the prompts; returns log-probabilities [B, V] of each row's first token, in nats."""
        hidden = self._lane.prefill_states()
        for text, states in zip(self._texts, hidden, strict=True):
            text.states = [states[-1].clone()]
        logps = self._answer()
        for place in range(max(map(len, self._said), default=0)):
            active = torch.tensor([place < len(row) for row in self._said])
            logps = self.step(
                torch.tensor([tokens[place] if place < len(tokens) else 0 for tokens in self._said]), active
            )
        return logps

    def step(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """Append one of the patient's tokens [B] to every row, or to the `active` [B] ones; returns the next [B, V].

        Where a row sits the step out the result is that of its last.
        """
        takes_part = [True] * len(self._texts) if active is None else [bool(flag) for flag in active.tolist()]
        fresh: list[list[int]] = []
        erased: list[tuple[int, int]] = []
        for place, (text, token) in enumerate(zip(self._texts, tokens.tolist(), strict=True)):
            fresh.append([])
            if takes_part[place] and self._append(text, token):
                fresh[-1], start = self._read(text)
                if start is not None:
                    erased.append((place, start))
        if erased:
            self._lane.erase([place for place, _ in erased], [start for _, start in erased])
        self._feed(fresh)
        return self._answer()

    def count(self, place: int, token: int, tally: Tally) -> None:
        """Book in `tally` what was left out of the last answer for a row, from which the patient's `token` is drawn."""
        text = self._texts[place]
        table = self._translation.inside if text.data else self._translation.start
        tally.positions += 1
        tally.unmapped += text.unmapped
        tally.first_pieces += token < self.width and bool(table.pieces[token])

    def keep(self, places: list[int]) -> None:
        """Make the rows those at `places`, in that order; a place may be named more than once."""
        self._lane.keep(places)
        self._texts = [self._texts[place].copy() for place in places]

    def join(self, other: TranslatedLane, room: int) -> None:
        """Append the rows of `other`, a lane of the same model, into which `room` more tokens fit."""
        for lane in (self, other):
            lane._pack()
        width = max(lane._lane.mask.shape[1] for lane in (self, other))
        for lane in (self, other):
            moved = width - lane._lane.mask.shape[1]
            for text in lane._texts:
                text.columns = [column + moved for column in text.columns]
        self._lane.join(other._lane, room)
        self._texts += other._texts

    def _pack(self) -> None:
        for text, moved in zip(self._texts, self._lane.pack().tolist(), strict=True):
            text.columns = [moved[column] for column in text.columns]

    def _append(self, text: _Text, token: int) -> bool:
        """Add the patient's token to a row; whether there is something new to read."""
        patient = self._translation.patient
        if token in patient.stop_ids:
            text.ended = True
            return False
        spelled = (patient.spelled[token] if token < len(patient) else None) or b""
        if not text.patient_ids and patient.lead:
            spelled = spelled.removeprefix(patient.lead)
        if not spelled:
            return False
        text.data += spelled
        text.patient_ids.append(token)
        text.ends.append(len(text.data))
        return True

    def _read(self, text: _Text) -> tuple[list[int], int | None]:
        """Split a row's text anew; returns the tokens to feed, and the column from which on it must forget, if any."""
        ids = self._translation.read(text.data, self._spec.encoder.text_ids)
        if text.prompt_length + len(ids) > self._context:
            if not text.overflown:
                _logger.warning("a doctor's context of %d tokens is full; it is silent from there on", self._context)
            text.overflown = True
            return [], None
        known = _common_prefix(text.doctor_ids, ids)
        start = text.columns[known] if known < len(text.columns) else None
        text.doctor_ids = ids
        del text.columns[known:], text.states[known + 1 :]
        return ids[known:], start

    def _feed(self, fresh: list[list[int]]) -> None:
        width = max(map(len, fresh))
        if width == 0:
            return
        ids = torch.zeros(len(fresh), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(fresh):
            ids[place, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[place, : len(row)] = 1
        begin = self._lane.mask.shape[1]
        hidden = self._lane.feed(ids.to(self.device), mask.to(self.device))
        for text, row, states in zip(self._texts, fresh, hidden, strict=True):
            text.columns += range(begin, begin + len(row))
            text.states += [states[place].clone() for place in range(len(row))]
        if self._lane.has_holes:
            self._pack()

    def _answer(self) -> Tensor:
        """Log-probabilities [B, V] of what comes next, in nats."""
        endings = [self._endings(text) for text in self._texts]
        # The states before every token that may be taken back, row after row, behind the B last ones.
        back = [max((ending.back for ending in row), default=0) for row in endings]
        states = [text.states[-1] for text in self._texts]
        for text, count in zip(self._texts, back, strict=True):
            states += text.states[len(text.states) - 1 - count : len(text.states) - 1]
        logps = self._lane.outputs(torch.stack(states)).float().log_softmax(-1)
        mapped, unmapped = self._map(logps[: len(self._texts)])
        place = len(self._texts)
        for row, (text, ends, count) in enumerate(zip(self._texts, endings, back, strict=True)):
            if ends:
                share = self._weigh(mapped[row], logps[place : place + count], text.doctor_ids[-count:], ends)
                unmapped[row] *= share
            place += count
            if text.overflown:
                mapped[row], unmapped[row] = -math.log(self.width), 1.0
        for text, mass in zip(self._texts, unmapped.tolist(), strict=True):
            text.unmapped = mass
        return mapped

    def _map(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """[B, W] of the next tokens -> [B, V] and [B] the mass that stands for no token."""
        inside, start = self._translation.inside, self._translation.start
        begins = torch.tensor([not text.data for text in self._texts], device=logps.device)
        if inside is start or not bool(begins.any()):
            return inside.apply(logps)
        if bool(begins.all()):
            return start.apply(logps)
        (one, one_unmapped), (other, other_unmapped) = start.apply(logps), inside.apply(logps)
        return torch.where(begins[:, None], one, other), torch.where(begins, one_unmapped, other_unmapped)

    def _endings(self, text: _Text) -> list[_Ending]:
        found: list[_Ending] = []
        if text.ended or text.overflown:
            return found
        doctor = self._translation.doctor
        for back in range(1, min(_FURTHEST_BACK, len(text.doctor_ids)) + 1):
            first = back == len(text.doctor_ids)
            tail = doctor.spell(text.doctor_ids[-back:])
            if first:
                tail = tail.removeprefix(doctor.lead)
            # A tokenizer that normalises its text, or lacks a byte, spells something else.
            if not tail or len(tail) >= doctor.inside.longest_token or not text.data.endswith(tail):
                break
            begin = len(text.data) - len(tail)
            cut = bisect_right(text.ends, begin) - 1
            tokens, targets = self._translation.continuations(
                text.patient_ids[cut:], text.data[text.ends[cut] : begin], tail, start=cut == 0, first=first
            )
            if tokens:
                found.append(_Ending(back, tokens, targets))
        return found

    def _weigh(self, mapped: Tensor, before: Tensor, last: Sequence[int], endings: Sequence[_Ending]) -> float:
        """Add other endings of a row's text to what follows its own split: changes `mapped` [V] in place.

        Args:
            before: [n, W] log-probabilities before each of the n tokens that may be taken back.
            last: those n tokens.

        Returns:
            The probability of the split as it stands, given the text.
        """
        steps = before.double().gather(1, torch.tensor(last, device=before.device)[:, None])[:, 0]
        # weights[i]: of the text without the tokens from i on; the last entry keeps them all.
        weights = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
        places: list[int] = []
        parts = []
        for ending in endings:
            row = len(last) - ending.back
            parts.append(before[row, torch.tensor(ending.tokens, device=before.device)].double() + weights[row])
            places += ending.targets
        targets, group = torch.tensor(places, device=before.device).unique(return_inverse=True)
        others = torch.cat(parts)
        total = torch.cat([others, weights[-1:]]).logsumexp(0)
        sums = torch.zeros(len(targets), dtype=others.dtype, device=others.device)
        sums = sums.index_add(0, group, (others - total).exp())
        own = weights[-1] - total
        added = torch.logaddexp(mapped[targets].double() + own, sums.log()).to(mapped)
        mapped += own.to(mapped)
        mapped[targets] = added
        # Of these the doctor says nothing, so its reference must not differ in them.
        mapped[self._translation.inside.silent.to(mapped.device)] = -math.log(self.width)
        return float(own.exp())


def open_lane(spec: LaneSpec, prompts: list[list[int]], said: Sequence[list[int]], room: int) -> Lane | TranslatedLane:
    """The lane for a model, one that translates where its vocabulary is not the patient's.

    Args:
        spec: the model.
        prompts: B lists of the model's own ids.
        said: B lists of the patient's tokens that the rows begin with.
        room: tokens that will be appended.
    """
    if spec.translation is not None:
        return TranslatedLane(spec, prompts, room, said)
    return Lane(spec, [prompt + tokens for prompt, tokens in zip(prompts, said, strict=True)], room)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
