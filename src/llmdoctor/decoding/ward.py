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
from llmdoctor.decoding.row import Row
from llmdoctor.decoding.translated_lane import TranslatedLane, open_lane

_COMPACT_BELOW = 0.75
"""Finished rows are dropped when at most this share is alive: dropping copies every cache."""


class Ward:
    """Rows, their caches on all lanes, and what the next token is drawn from.

    Args:
        specs: the models, the patient first.
        names: of the guides, in the order of the columns of β.

    Attributes:
        rows: B rows; some may be done and not yet dropped.
        logits: of each lane, [M, B, V].
        tokens: [B] the last token of each row, to be set by whoever draws.
        controls: of the rows.
    """

    def __init__(self, specs: Sequence[LaneSpec], names: Sequence[str]) -> None:
        self._specs = specs
        self._names = names
        self.guide_forwards = sum(len(spec.voices) for spec in specs) - 1
        self.controls: Controls
        self.clear()

    def clear(self) -> None:
        """Let all rows go."""
        self.rows: list[Row] = []
        self._lanes: list[Lane | TranslatedLane] = []
        self.logits: list[Tensor] = []
        self.tokens = torch.empty(0, dtype=torch.long)

    @property
    def can_admit(self) -> bool:
        """Whether rows may join others that are under way."""
        return all(lane.sees_everything for lane in self._lanes)

    def step(self) -> None:
        """Append `tokens` to all rows."""
        if self.rows:
            self.logits = [lane.step(self.tokens).unflatten(0, (-1, len(self.rows))) for lane in self._lanes]

    def admit(self, rows: Sequence[Row]) -> None:
        """Read the prompts of more rows, and what they have said already, in a pass of their own."""
        rows = list(rows)
        # Asked before this ward changes: what fails in here leaves it as it was.
        room = max(min(row.request.sampling.max_new_tokens, row.room) for row in (*self.rows, *rows))
        said = [row.completion.token_ids for row in rows]
        fresh = [
            open_lane(spec, [row.prompts[index] for row in rows], said, room) for index, spec in enumerate(self._specs)
        ]
        logits = [lane.prefill().unflatten(0, (-1, len(rows))) for lane in fresh]
        everyone = [*self.rows, *rows]
        controls = Controls(everyone, self._names, fresh[0].device, fresh[0].width)
        if self.rows:
            for lane, other in zip(self._lanes, fresh, strict=True):
                lane.join(other, room)  # type: ignore[arg-type]  # lanes of one spec are of one kind
            self.logits = [torch.cat(pair, dim=1) for pair in zip(self.logits, logits, strict=True)]
        else:
            self._lanes, self.logits = fresh, logits
        self.rows, self.controls = everyone, controls

    def discharge(self) -> None:
        """Drop the rows that are done, once they are many enough."""
        alive = [place for place, row in enumerate(self.rows) if not row.done]
        if not alive:
            self.clear()
        elif len(alive) <= _COMPACT_BELOW * len(self.rows):
            self.rows = [self.rows[place] for place in alive]
            for lane in self._lanes:
                lane.keep(alive)
            self.controls.keep(alive)
            self.tokens = self.tokens[alive]
