"""Contrastive search: likely tokens whose representation is unlike those before.

Source: Su et al., "A Contrastive Framework for Neural Text Generation" (2022, arXiv 2202.06417), equation 5.
Shapes: B rows, K candidates, P prompt columns, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmdoctor.baselines.method import Method, newly_finished, room_of, survivors
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.row import Row
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel


class ContrastiveSearch(Method):
    """Takes, of the K likeliest tokens v, the one of the highest (1 − α) π(v) − α · max_j cos(h_v, h_j).

    h_v is the patient's last hidden state once v is appended, h_j those of all tokens before it, the prompt's included.
    Deterministic: a completion's `logps` are 0. Each token costs one forward pass over K positions.

    Args:
        patient: the frozen model.
        penalty: α in [0, 1]; the paper uses 0.6. 0 is greedy search.
        top_k: K; the paper uses 4 to 10.
        max_batch_size: rows decoded together.

    Raises:
        UserError: a penalty outside [0, 1], or no candidate.
    """

    name = "contrastive search"

    def __init__(self, patient: LoadedModel, *, penalty: float = 0.6, top_k: int = 5, max_batch_size: int = 32) -> None:
        super().__init__(patient, max_batch_size=max_batch_size)
        if not 0 <= penalty <= 1:
            raise UserError(f"the penalty of contrastive search must be in [0, 1], got {penalty}")
        if top_k < 1:
            raise UserError(f"contrastive search needs at least 1 candidate, got top_k {top_k}")
        self.penalty = penalty
        self.top_k = min(top_k, self.width)

    def _search(self, rows: list[Row]) -> Iterator[list[Row]]:
        lane = Lane(self.patient, [row.prompts[0] for row in rows], room_of(rows) + self.top_k)
        hidden = lane.prefill_states()
        logits = lane.outputs(hidden[:, -1].contiguous())
        history = _directions(hidden)
        while True:
            logps, candidates = logits[:, : self.width].float().log_softmax(-1).topk(self.top_k, dim=-1)
            states = lane.peek(candidates)
            # Of a model that is spread over several devices states, mask and outputs need not lie on one.
            alike = _directions(states) @ history.transpose(1, 2)
            alike = alike.masked_fill(~lane.mask.bool()[:, None].to(alike.device), -torch.inf)
            scores = (1 - self.penalty) * logps.exp() - self.penalty * alike.amax(-1).to(logps.device)
            broken = (~scores.amax(-1).isfinite()).tolist()
            choice = scores.nan_to_num(nan=0.0).argmax(-1)
            tokens = candidates.gather(1, choice[:, None])[:, 0].tolist()
            patient = logps.gather(1, choice[:, None])[:, 0].tolist()
            for place, row in enumerate(rows):
                if row.done:
                    continue
                if broken[place]:
                    row.finish("error")
                    continue
                row.append(tokens[place], 0.0, patient[place])
                row.completion.patient_forwards += self.top_k
            yield newly_finished(rows)
            if all(row.done for row in rows):
                return
            lane.accept(choice)
            chosen = states[torch.arange(len(rows), device=states.device), choice.to(states.device)]
            history = torch.cat([history, _directions(chosen)[:, None]], dim=1)
            keep = survivors(rows)
            if keep is not None:
                rows = [rows[place] for place in keep]
                lane.keep(keep)
                history, chosen = history[keep], chosen[keep]
            logits = lane.outputs(chosen)


def _directions(hidden: Tensor) -> Tensor:
    """[..., D] -> [..., D] float32 of length 1, so that a product is a cosine."""
    return torch.nn.functional.normalize(hidden.float(), dim=-1)
