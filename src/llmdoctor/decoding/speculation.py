"""Guessing what comes next, so that one pass of the large models checks several tokens at once.

A guess is drawn with the very noise that will decide its place (`decoding.sampling`), from an estimate of the guided
distribution: the formula of guided decoding over what the draft model expects of the patient, and of the doctors that
are adapters on it, and over what other doctors, which are run ahead, do say. Without a draft model, one of those that
are run ahead anyway stands in for the patient (`stand_in`). The patient then reads all guesses in one
pass, and tokens are drawn from the logits as if there had been no guesses: a guess holds where it is what was drawn. So
guessing changes no token, whatever is guessed; it decides only how many come out of a pass.

Speculative decoding: Leviathan et al., arXiv 2211.17192; with shared noise: Daliri et al., arXiv 2408.07978.

Shapes: B rows, M voices, K tokens side by side, P columns of the prompts, W tokens a draft may guess, D what a draft
reads of a lane's states: the hidden size, and as much again for each lower layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmdoctor.decoding.device import sent
from llmdoctor.decoding.guides import LaneSpec, Voice
from llmdoctor.decoding.lane import Lane
from llmdoctor.errors import UserError
from llmdoctor.models.draft import DraftModel
from llmdoctor.models.layers import weights_read

_UNNOTICED = 16
"""Columns that the draft reads beside the newest one at hardly any cost."""

_LATEST = 256
"""Columns that may wait to be read: while nothing is guessed, states would otherwise pile up. What waits until its row
is done is never read."""


def stand_in(lanes: Sequence[LaneSpec], references: Sequence[Voice | None]) -> Voice:
    """The voice that is taken for the patient's while it has not read the guesses.

    A reference, which is not steered, rather than a doctor; one that reads the patient's prompt rather than one with a
    system prompt of its own; then the larger model.

    Raises:
        UserError: the patient's is the only model.
    """
    found = [
        (((lane, voice) in references, spec.system is None, weights_read(spec.model)), (lane, voice))
        for lane, spec in enumerate(lanes)
        if lane
        for voice in range(len(spec.voices))
    ]
    if not found:
        raise UserError(
            "no doctor here can guess what comes next: that takes one on a base of its own, smaller than the patient; "
            "beside doctors that are adapters on the patient, a draft model can (make one with `llmdoctor draft`)"
        )
    return max(found, key=lambda entry: entry[0])[1]


class DraftLane:
    """A draft model that follows the voices of one lane. Call inside `torch.inference_mode()`.

    It has a row for every voice of every row, the voices of one row side by side.

    Args:
        draft: the model.
        voices: M.
        prompts: [B, P] ids, left-padded.
        mask: [B, P] of what is no padding.
        states: [M·B, P, D] what the draft reads of the lane on them, voice by voice (`Lane`'s states).
        room: tokens that will be appended.
    """

    def __init__(
        self, draft: DraftModel, voices: int, prompts: Tensor, mask: Tensor, states: Tensor, room: int
    ) -> None:
        self.draft = draft
        self._voices = voices
        spec = LaneSpec(draft, None, draft.head)  # type: ignore[arg-type]  # a draft reads no conversations
        self._lane = Lane.empty(spec, len(prompts) * voices, prompts.shape[1] + room)
        # A token goes with the state that it was drawn from, so the first one of a prompt goes with none.
        states = self._by_row(states)
        self._pending = [(prompts[:, 1:], mask[:, :-1].bool(), states[:, :, :-1])]
        if prompts.shape[1] == 1:
            # Something has to be read, or there is no cache that others could join.
            self._pending = [(prompts, mask.bool(), torch.zeros_like(states))]
        self._states = states[:, :, -1:]
        self._ahead = 0

    def observe(self, tokens: Tensor, kept: Tensor, branch: Tensor) -> None:
        """Hear of the tokens [B, K] that were drawn, of which the first `kept` [B] count.

        `branch` [B, K] says which of the states expected they were drawn from.
        """
        if sum(tokens.shape[1] for tokens, _, _ in self._pending) >= _LATEST:
            self._read()
        mask = torch.arange(tokens.shape[1], device=kept.device) < kept[:, None]
        rows = torch.arange(len(branch), device=branch.device)[:, None]
        self._pending.append((tokens, mask, self._states.transpose(1, 2)[rows, branch].transpose(1, 2)))

    def catch_up(self) -> None:
        """Read what was observed but for the newest, where it is more than `begin` reads without noticing."""
        if sum(tokens.shape[1] for tokens, _, _ in self._pending) > _UNNOTICED:
            newest = self._pending.pop()
            self._read()
            self._pending = [newest]

    def expect(self, states: Tensor) -> None:
        """Hear of the states [M·B, K, D] that the next tokens are drawn from."""
        self._states = self._by_row(states)

    def begin(self) -> Tensor:
        """Read what was observed; returns the logits [M, B, 1, W] expected of the lane after each row's last token."""
        mask, hidden = self._read()
        last = mask.shape[1] - 1 - mask.flip(-1).int().argmax(-1)
        rows = torch.arange(len(hidden), device=hidden.device)
        self._guesses = hidden[rows, last.repeat_interleave(self._voices)][:, None]
        return self._logits(1)

    def go_on(self, tokens: Tensor, parents: Sequence[int]) -> Tensor:
        """Append guesses [B, K] to the tree; returns the logits [M, B, K, W] expected after them.

        Args:
            tokens: what is guessed.
            parents: of each, its number among the guesses so far, from 0; −1 follows what was observed.
        """
        # The guesses' states stand behind that of the last token observed.
        states = self._guesses[:, sent([parent + 1 for parent in parents], self._guesses.device)]
        embedded = self.draft.embed(tokens.repeat_interleave(self._voices, dim=0), states)
        self._guesses = torch.cat([self._guesses, self._lane.grow(embedded, parents)], dim=1)
        return self._logits(len(parents))

    def end(self) -> None:
        """Forget the guesses."""
        self._lane.forget()
        if self.has_holes:
            self.pack()

    def keep(self, places: list[int]) -> None:
        """Make the rows those at `places`."""
        self._lane.keep([place * self._voices + voice for place in places for voice in range(self._voices)])
        self._pending = [(tokens[places], mask[places], states[places]) for tokens, mask, states in self._pending]
        self._states = self._states[places]

    @property
    def has_holes(self) -> bool:
        """Whether `pack` pays."""
        return self._lane.has_holes

    def pack(self) -> None:
        """Drop the columns that no row sees."""
        self._lane.pack()

    def join(self, other: DraftLane, room: int) -> None:
        """Append the rows of `other`, a lane of the same draft and voices, into which `room` more tokens fit."""
        for lane in (self, other):
            if lane._pending:
                lane._read()
        self._lane.join(other._lane, room)
        self._states = torch.cat([self._states, other._states])

    def _read(self) -> tuple[Tensor, Tensor]:
        """Feed what is pending: its mask [B, K] and the outputs [B·M, K, D]."""
        tokens, masks, states = zip(*self._pending, strict=True)
        self._pending = []
        mask = torch.cat(masks, dim=1)
        spread = torch.cat(tokens, dim=1).repeat_interleave(self._voices, dim=0)
        embedded = self.draft.embed(spread, torch.cat(states, dim=2).flatten(0, 1))
        return mask, self._lane.feed(embedded, mask.repeat_interleave(self._voices, dim=0))

    def _logits(self, count: int) -> Tensor:
        """[M, B, K, W] after the last K guesses."""
        logits = self._lane.outputs(self._guesses[:, -count:].contiguous())
        return logits.unflatten(0, (-1, self._voices)).transpose(0, 1)

    def _by_row(self, states: Tensor) -> Tensor:
        """[M·B, K, D] -> [B, M, K, D], on the draft's device: a model spread over several ends on another one."""
        return states.unflatten(0, (self._voices, -1)).transpose(0, 1).to(self._lane.device)
