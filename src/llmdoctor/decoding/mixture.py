"""From the logits of all models that run to the distribution that is drawn from.

Shapes: B rows, M voices of a lane, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmdoctor.decoding.controls import Controls
from llmdoctor.decoding.device import sent
from llmdoctor.decoding.guidance import guided_scores, penalise_repetition, warp
from llmdoctor.decoding.guides import Voice


@dataclass
class Mixture:
    """Which voice of which lane has which part in the guided distribution.

    Attributes:
        guides: of each guide.
        references: of each guide's reference; None in the product form.
    """

    guides: Sequence[Voice]
    references: Sequence[Voice | None]

    def scores(self, logits: Sequence[Tensor], controls: Controls) -> Tensor:
        """log π_dec [B, V] up to a constant per row, before warpers, from each lane's logits [M, B, V]."""
        guides = [_settled(logits[lane][voice], controls) for lane, voice in self.guides]
        references = [None if at is None else _settled(logits[at[0]][at[1]], controls) for at in self.references]
        return guided_scores(logits[0][0].float(), guides, controls.alpha, controls.betas, references)


def _settled(logits: Tensor, controls: Controls) -> Tensor:
    """A guide's logits; where repetition is penalised, which goes by the sign of the scores, its log-probabilities.

    Their constant means nothing, and must not decide how hard a token is penalised. The patient's own is left, so that
    without a guide the penalty is what it is elsewhere.
    """
    if not controls.penalises:
        return logits
    logits = logits.float()
    penalised = sent(controls.penalty != 1, logits.device)
    return torch.where(penalised[:, None], logits.log_softmax(-1), logits)


def warped(scores: Tensor, controls: Controls, seen: Tensor | None = None) -> Tensor:
    """What is drawn from: scores [B, V] after repetition penalty, temperature and cuts.

    `seen` [B, V] are the tokens to be penalised, where they are not the controls' own.
    """
    if controls.penalises:
        seen = controls.seen[:, : scores.shape[-1]] if seen is None else seen
        scores = penalise_repetition(scores, seen, controls.penalty)
    if controls.warps:
        scores = warp(scores, controls.temperature, controls.top_k, controls.top_p, controls.min_p)
    return scores
