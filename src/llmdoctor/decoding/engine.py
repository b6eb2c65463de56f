"""The decode loop: several models, one token at a time, a batch of independent rows.

Shapes: B rows alive, V vocabulary, D guides. Every model keeps its own cache and never recomputes a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from llmdoctor.decoding.controls import Controls
from llmdoctor.decoding.guidance import guided_scores, penalise_repetition, sample, warp
from llmdoctor.decoding.guides import Guide, lanes_of
from llmdoctor.decoding.lane import context_of
from llmdoctor.decoding.request import Completion, Request
from llmdoctor.decoding.row import Row, complete, open_row
from llmdoctor.decoding.translated_lane import open_lane
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel

_CPU_BLOCK = 16
"""Rows whose scores are worked on together on a CPU: a block's vocabulary-wide tensors then stay in its cache."""

_COMPACT_BELOW = 0.75
"""Finished rows are dropped from the batch when at most this share is alive: dropping copies every cache."""


class GuidedDecoder:
    """Draws tokens from π_patient^α · Π_i (π_doctor_i [/ π_ref_i])^β_i, with α and β of every request its own.

    Args:
        patient: the frozen model.
        guides: from `load_guide`; none decodes the patient alone.
        max_batch_size: rows decoded together.
    """

    def __init__(self, patient: LoadedModel, guides: Sequence[Guide] = (), *, max_batch_size: int = 32) -> None:
        if max_batch_size < 1:
            raise UserError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self.names = [guide.name for guide in guides]
        if len(set(self.names)) != len(self.names):
            raise UserError(f"two doctors share a name: {', '.join(self.names)}; give each its own")
        self.lanes, self._guide_lanes, self._reference_lanes = lanes_of(patient, list(guides))
        self.encoder = self.lanes[0].encoder
        self.max_batch_size = max_batch_size
        self.context = min(context_of(lane.model) for lane in self.lanes)

    def generate(
        self, requests: Iterable[Request], *, on_done: Callable[[int, Completion], None] | None = None
    ) -> list[Completion]:
        """Complete all requests, similar prompt lengths together; results come in the order of the requests.

        Args:
            requests: each with its own prompt, mixture and sampling.
            on_done: called with a request's index and its completion as soon as it is finished.

        Raises:
            UserError: an unknown doctor, or a prompt that leaves no room in a model's context.
        """
        rows = [self._open(index, request) for index, request in enumerate(requests)]
        return complete(rows, self.max_batch_size, self._decode, on_done)

    def stream(self, request: Request) -> Generator[str, None, Completion]:
        """Yield the completion's text piece by piece; the generator's return value is the `Completion`."""
        row = self._open(0, request)
        shown = 0
        for _ in self._decode([row]):
            text = row.visible_text()
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
        if len(row.completion.text) > shown:
            yield row.completion.text[shown:]
        return row.completion

    def _open(self, index: int, request: Request) -> Row:
        unknown = set(request.betas) - set(self.names)
        if unknown:
            known = ", ".join(self.names) or "none"
            raise UserError(f"no doctor is named {', '.join(sorted(unknown))}; loaded: {known}")
        prompts = [lane.encoder.prompt_ids(request.messages, lane.system) for lane in self.lanes]
        return open_row(index, request, prompts, self.encoder, self.context)

    @torch.inference_mode()
    def _decode(self, batch: list[Row]) -> Iterator[list[Row]]:
        """Decode rows to their ends; yields after every token the rows that have just finished."""
        for row in batch:
            if row.request.sampling.max_new_tokens == 0:
                row.finish("length")
        finished = [row for row in batch if row.done]
        if finished:
            yield finished
        rows = [row for row in batch if not row.done]
        if not rows:
            return
        guided = any(beta != 0 for row in rows for beta in row.request.betas.values())
        used = sorted({0, *self._guide_lanes, *(i for i in self._reference_lanes if i is not None)}) if guided else [0]
        room = max(min(row.request.sampling.max_new_tokens, row.room) for row in rows)
        lanes = {index: open_lane(self.lanes[index], [row.prompts[index] for row in rows], room) for index in used}
        controls = Controls(rows, self.names, lanes[0].device, lanes[0].width)
        logits = {index: lane.prefill() for index, lane in lanes.items()}
        while True:
            tokens = self._draw(rows, logits, controls, guided)
            finished = [row for row in rows if row.done and not row.reported]
            for row in finished:
                row.reported = True
                row.completion.patient_forwards = len(row.completion.token_ids)
                row.completion.guide_forwards = (len(used) - 1) * len(row.completion.token_ids)
            yield finished
            keep = [place for place, row in enumerate(rows) if not row.done]
            if not keep:
                return
            if len(keep) <= _COMPACT_BELOW * len(rows):
                rows = [rows[place] for place in keep]
                for lane in lanes.values():
                    lane.keep(keep)
                controls.keep(keep)
                tokens = tokens[keep]
            logits = {index: lane.step(tokens) for index, lane in lanes.items()}

    def _draw(self, rows: list[Row], logits: dict[int, Tensor], controls: Controls, guided: bool) -> Tensor:
        """Draw one token for every row from the guided distribution, and book it. Returns [B]."""
        width = min(tensor.shape[-1] for tensor in logits.values())
        logits = {index: tensor[:, :width].to(logits[0].device) for index, tensor in logits.items()}
        size = len(rows) if logits[0].device.type != "cpu" else _CPU_BLOCK
        tokens = [
            self._draw_block(
                rows[start : start + size],
                {index: tensor[start : start + size] for index, tensor in logits.items()},
                controls.block(start, start + size),
                guided,
            )
            for start in range(0, len(rows), size)
        ]
        return torch.cat(tokens)

    def _draw_block(self, rows: list[Row], logits: dict[int, Tensor], controls: Controls, guided: bool) -> Tensor:
        width = logits[0].shape[-1]
        patient = logits[0].float()
        guides = [logits[lane] for lane in self._guide_lanes] if guided else []
        references = [None if lane is None else logits[lane] for lane in self._reference_lanes] if guided else None
        raw = guided_scores(patient, guides, controls.alpha, controls.betas, references)
        # The maximum of a row with a NaN is NaN, so this also finds rows in which a model broke.
        broken = (~raw.amax(-1).isfinite()).tolist()
        scores = raw
        if controls.penalises:
            scores = penalise_repetition(scores, controls.seen[:, :width], controls.penalty)
        if controls.warps:
            scores = warp(scores, controls.temperature, controls.top_k, controls.top_p, controls.min_p)
        uniforms = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=raw.device)
        tokens = sample(scores.nan_to_num(nan=0.0) if any(broken) else scores, uniforms, controls.greedy)
        chosen = tokens[:, None]
        logps = (raw.gather(1, chosen)[:, 0] - raw.logsumexp(-1)).tolist()
        patient_logps = logps
        if raw is not patient:
            patient_logps = (patient.gather(1, chosen)[:, 0] - patient.logsumexp(-1)).tolist()
        drawn_logps = logps
        if controls.warps:
            drawn = scores.gather(1, chosen)[:, 0] - scores.logsumexp(-1)
            drawn_logps = torch.where(controls.greedy, torch.zeros_like(drawn), drawn).tolist()
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if row.done:
                continue
            if broken[place]:
                row.finish("error")
            else:
                row.append(token, logps[place], patient_logps[place], drawn_logps[place])
        if controls.penalises:
            controls.seen.scatter_(1, chosen, True)
        return tokens
