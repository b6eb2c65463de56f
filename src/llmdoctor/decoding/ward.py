"""The rows that are decoded together, on every model that is run for them.

Shapes: B rows, M voices of a lane, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmdoctor.decoding.controls import Controls
from llmdoctor.decoding.guides import LaneSpec
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.mixture import Mixture, warped
from llmdoctor.decoding.row import Row
from llmdoctor.decoding.sampling import sample
from llmdoctor.decoding.speculation import DraftLane
from llmdoctor.decoding.translated_lane import TranslatedLane, open_lane
from llmdoctor.models.draft import DraftModel

_COMPACT_BELOW = 0.75
"""Finished rows are dropped when at most this share is alive: dropping copies every cache."""


class Ward:
    """Rows, their caches on all lanes, and what the next tokens are drawn from.

    Args:
        specs: the models, the patient first.
        names: of the guides, in the order of the columns of β.
        mixture: how the models' logits make a distribution.
        draft: guesses tokens of the first lane's; None where nothing is to be guessed.

    Attributes:
        rows: B rows; some may be done and not yet dropped.
        logits: for the next token, and then for the one behind each guess: of each lane, [M, B, V].
        guesses: the guessed tokens, [B] each.
        controls: of the rows.
    """

    def __init__(
        self, specs: Sequence[LaneSpec], names: Sequence[str], mixture: Mixture, draft: DraftModel | None = None
    ) -> None:
        self._specs = specs
        self._names = names
        self._mixture = mixture
        self._model = draft
        self.guide_forwards = sum(len(spec.voices) for spec in specs) - 1
        self.controls: Controls
        self.clear()

    def clear(self) -> None:
        """Let all rows go."""
        self.rows: list[Row] = []
        self._lanes: list[Lane | TranslatedLane] = []
        self._draft: DraftLane | None = None
        self._tokens = torch.empty(0, dtype=torch.long)
        self.logits: list[list[Tensor]] = []
        self.guesses: list[Tensor] = []

    @property
    def can_admit(self) -> bool:
        """Whether rows may join others that are under way."""
        return all(lane.sees_everything for lane in self._lanes)

    @property
    def can_guess(self) -> bool:
        """Whether `step` may be asked for guesses."""
        return self._draft is not None

    def step(self, count: int = 0) -> None:
        """Append the tokens that were booked to all rows, and `count` guesses of what may follow behind them."""
        if not self.rows:
            return
        if self._draft is None:
            self.guesses = []
            self.logits = [[lane.step(self._tokens).unflatten(0, (-1, len(self.rows))) for lane in self._lanes]]
            return
        # Doctors that are models of their own are run ahead; the first lane then reads everything at once.
        ahead: list[list[Tensor]] = []
        tokens = self._tokens
        self.guesses = []
        seen = self.controls.seen.clone() if self.controls.penalises else None
        for place in range(count + 1):
            ahead.append([lane.step(tokens).unflatten(0, (-1, len(self.rows))) for lane in self._lanes[1:]])
            if place < count:
                expected = self._draft.begin() if place == 0 else self._draft.go_on(tokens)
                tokens = self._guess([expected, *ahead[-1]], place, seen)
                self.guesses.append(tokens)
        self._draft.end()
        patient = self._lanes[0]
        assert isinstance(patient, Lane)
        fed = torch.stack([self._tokens, *self.guesses], dim=1)
        states = patient.feed(fed, torch.ones_like(fed))
        self._draft.expect(states)
        logits = patient.outputs(states.contiguous()).unflatten(0, (-1, len(self.rows)))
        self.logits = [[logits[:, :, place], *others] for place, others in enumerate(ahead)]

    def _guess(self, logits: list[Tensor], place: int, seen: Tensor | None) -> Tensor:
        """Guess a token [B] from what is expected of the first lane, [M, B, W], and what the others say."""
        assert self._draft is not None
        vocabulary = self._draft.draft.vocabulary
        logits = [logits[0], *(tensor[..., vocabulary] for tensor in logits[1:])]
        penalised = None if seen is None else seen[:, vocabulary]
        scores = warped(self._mixture.scores(logits, self.controls), self.controls, penalised).nan_to_num(nan=0.0)
        keys = [row.key(len(row.completion.token_ids) + place) for row in self.rows]
        tokens = vocabulary[sample(scores, keys, self.controls.greedy, vocabulary)]
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        return tokens

    def admit(self, rows: Sequence[Row], most: int = 0) -> None:
        """Read the prompts of more rows, and what they have said already, in a pass of their own.

        `most` is how many guesses a step may be asked for. The last step must have made none.
        """
        rows = list(rows)
        # Asked before this ward changes: what fails in here leaves it as it was.
        room = most + max(min(row.request.sampling.max_new_tokens, row.room) for row in (*self.rows, *rows))
        said = [row.completion.token_ids for row in rows]
        fresh = [
            open_lane(spec, [row.prompts[index] for row in rows], said, room) for index, spec in enumerate(self._specs)
        ]
        draft = None
        if self._model is not None and isinstance(fresh[0], Lane) and all(isinstance(lane, Lane) for lane in fresh):
            logits, states = fresh[0].prefill_states()
            prompts, mask = fresh[0].prompts
            draft = DraftLane(self._model, len(self._specs[0].voices), prompts, mask, states, room)
            first = [logits, *(lane.prefill() for lane in fresh[1:])]
        else:
            first = [lane.prefill() for lane in fresh]
        first = [logits.unflatten(0, (-1, len(rows))) for logits in first]
        everyone = [*self.rows, *rows]
        controls = Controls(everyone, self._names, fresh[0].device, fresh[0].width)
        if self.rows:
            for lane, other in zip(self._lanes, fresh, strict=True):
                lane.join(other, room)  # type: ignore[arg-type]  # lanes of one spec are of one kind
            if self._draft is not None and draft is not None:
                self._draft.join(draft, room)
            first = [torch.cat(pair, dim=1) for pair in zip(self.logits[0], first, strict=True)]
            self.logits[0] = first
        else:
            self._lanes, self._draft, self.logits, self.guesses = fresh, draft, [first], []
        self.rows, self.controls = everyone, controls

    def book(self, drawn: Sequence[Sequence[int]]) -> None:
        """Take note of the tokens that each row has drawn from `logits`, in their order; of the last one, if none.

        Guesses that they have not confirmed are forgotten.
        """
        width = len(self.logits)
        device = self._lanes[0].device
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in drawn], device=device)
        kept = torch.tensor([len(row) for row in drawn], device=device)
        if width > 1:
            for lane in self._lanes:
                assert isinstance(lane, Lane)
                lane.retract(width, kept)
                if lane.has_holes:
                    lane.pack()
        if self._draft is not None:
            self._draft.observe(tokens, kept)
        self._tokens = tokens[torch.arange(len(drawn), device=device), (kept - 1).clamp(min=0)]

    def discharge(self) -> None:
        """Drop the rows that are done, once they are many enough."""
        alive = [place for place, row in enumerate(self.rows) if not row.done]
        if not alive:
            self.clear()
        elif len(alive) <= _COMPACT_BELOW * len(self.rows):
            self.rows = [self.rows[place] for place in alive]
            for lane in (*self._lanes, *([] if self._draft is None else [self._draft])):
                lane.keep(alive)
            self.controls.keep(alive)
            self._tokens = self._tokens[alive]
