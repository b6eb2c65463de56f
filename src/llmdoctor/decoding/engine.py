"""The decode loop: several models, one token at a time, a batch of independent rows.

Shapes: B rows alive, V vocabulary, D guides. Every model keeps its own cache and never recomputes a prefix.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from llmdoctor.decoding.cache import new_cache, sees_everything
from llmdoctor.decoding.device import CPU_BLOCK, fetched, sent
from llmdoctor.decoding.guides import Guide, LaneSpec, Voice, lanes_of
from llmdoctor.decoding.memory import give_up, is_out_of_memory, let_go
from llmdoctor.decoding.mixture import Mixture, warped
from llmdoctor.decoding.pace import Pace
from llmdoctor.decoding.request import Completion, Request, listed
from llmdoctor.decoding.row import Row, Tally, open_row
from llmdoctor.decoding.sampling import sample
from llmdoctor.decoding.speculation import stand_in
from llmdoctor.decoding.ward import Ward
from llmdoctor.errors import UserError
from llmdoctor.models.context import context_of, text_config
from llmdoctor.models.draft import DraftModel
from llmdoctor.models.loading import LoadedModel

_BLOCK = 64
"""Rows whose logits are alive at once; on a CPU rows times voices, because larger tensors are taken from the system,
page by page, every time."""

_UNGUIDED = Mixture([], [])

_ADMIT_BELOW = 0.75
"""Waiting rows are taken in when at most this share of the places is in use."""


class GuidedDecoder:
    """Draws tokens from π_patient^α · Π_i (π_doctor_i [/ π_ref_i])^β_i, with α and β of every request its own.

    Args:
        patient: the frozen model.
        guides: from `load_guide`; none decodes the patient alone.
        max_batch_size: rows decoded together.
        draft: guesses what comes next, so that a pass of the patient gives several tokens where guesses hold: a model
            from `load_draft` for this patient, or "doctors", which lets the doctors do it, as far as they are models of
            their own. It changes no token, but for the rounding of passes of other shapes.
        max_guesses: guesses a pass at most, up to 32; how many pay is measured while decoding, and may be none.

    Attributes:
        tally: of the translation of doctors of other vocabularies, summed over all requests finished so far.
    """

    def __init__(
        self,
        patient: LoadedModel,
        guides: Sequence[Guide] = (),
        *,
        max_batch_size: int = 32,
        draft: DraftModel | Literal["doctors"] | None = None,
        max_guesses: int = 16,
    ) -> None:
        if max_batch_size < 1:
            raise UserError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if max_guesses < 1:
            raise UserError(f"max_guesses must be at least 1, got {max_guesses}; leave the draft out for none")
        self.names = [guide.name for guide in _guides(guides)]
        if len(set(self.names)) != len(self.names):
            raise UserError(f"two doctors share a name: {', '.join(self.names)}; give each its own")
        self.lanes, voices, references = lanes_of(patient, list(guides))
        self.mixture = Mixture(voices, references)
        self._draft: DraftModel | Voice | None = None
        if draft is not None:
            _check_lanes(self.lanes)
            self._draft = stand_in(self.lanes, references) if draft == "doctors" else _checked(draft, self.lanes)
        self.pace = Pace(max_guesses)
        self.encoder = self.lanes[0].encoder
        self.max_batch_size = max_batch_size
        self.tally = Tally()
        self._contexts = [context_of(lane.model) for lane in self.lanes]
        self.context = min(self._contexts)
        self._translated = [number for number, lane in enumerate(self.lanes) if lane.translation is not None]
        # The same with and without doctors that are listened to, or a row's draws would depend on its neighbours.
        self._width = min(
            lane.head.linear.weight.shape[0] if lane.translation is None else lane.translation.width
            for lane in self.lanes
        )

    def generate(
        self,
        requests: Iterable[Request],
        *,
        on_done: Callable[[int, Completion], None] | None = None,
        cancelled: Callable[[int], bool] | None = None,
    ) -> list[Completion]:
        """Complete all requests, similar prompt lengths together; results come in the order of the requests.

        Args:
            requests: each with its own prompt, mixture and sampling.
            on_done: called with a request's index and its completion as soon as it is finished.
            cancelled: asked before every round of passes with the index of each request that is under way or waiting;
                where it says True, that request ends with the tokens it has, and its place is free for another.

        Raises:
            UserError: what is no request, an unknown doctor, or a prompt that leaves no room in a model's context.
        """
        rows = [self._open(index, request) for index, request in enumerate(listed(requests))]
        # In the order of their lengths, so that rows decoded together have little padding.
        for finished in self._decode(sorted(rows, key=lambda row: (len(row.prompts[0]), row.index)), cancelled):
            if on_done:
                for row in finished:
                    on_done(row.index, row.completion)
        return [row.completion for row in rows]

    def stream(self, request: Request) -> Generator[str, None, Completion]:
        """Yield the completion's text piece by piece; the generator's return value is the `Completion`."""
        (asked,) = listed([request])
        row = self._open(0, asked)
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
        unknown = set(request.betas or {}) - set(self.names)
        if unknown:
            known = ", ".join(self.names) or "none"
            raise UserError(f"no doctor is named {', '.join(sorted(unknown))}; loaded: {known}")
        prompts = [lane.encoder.prompt_ids(request.messages, lane.system) for lane in self.lanes]
        return open_row(index, request, prompts, self.encoder, self._contexts, self._translated)

    @torch.inference_mode()
    def _decode(self, batch: list[Row], cancelled: Callable[[int], bool] | None = None) -> Iterator[list[Row]]:
        """Decode rows to their ends; yields before and after every token the rows that have just finished.

        Rows that are done make place for the next ones of `batch`. Where memory does not suffice, fewer go on together.
        """
        finished = [row for row in batch if row.request.sampling.max_new_tokens == 0]
        for row in finished:
            row.finish("length")
        waiting = deque(row for row in batch if not row.done)
        guided = any(row.request.beta_of(name) != 0 for row in waiting for name in self.names)
        lanes = self.lanes if guided else [replace(self.lanes[0], voices=[None])]
        # Doctors that nobody listens to are not run, so they cannot guess.
        draft = self._draft if guided or isinstance(self._draft, DraftModel) else None
        ward = Ward(lanes, self.names, self.mixture if guided else _UNGUIDED, draft)
        size = self.max_batch_size
        # That failed by itself, and has taken no step since.
        stuck: Row | None = None
        while True:
            if cancelled is not None:
                given_up = [row for row in (*ward.rows, *waiting) if not row.done and cancelled(row.index)]
                for row in given_up:
                    row.finish("cancelled")
                finished += given_up
                waiting = deque(row for row in waiting if not row.done)
            for row in finished:
                row.reported = True
                done = row.completion
                done.patient_forwards = len(done.token_ids) + done.guessed - done.guesses_held
                done.guide_forwards = ward.guide_forwards * done.patient_forwards
                done.unmapped_mass = row.tally.unmapped_mass
                self.tally += row.tally
            yield finished
            if not waiting and all(row.done for row in ward.rows):
                return
            new: list[Row] = []
            try:
                ward.discharge()
                # Taking rows in copies every cache, so it waits until there is place for several.
                admits = waiting and (not ward.rows or (ward.can_admit and len(ward.rows) <= _ADMIT_BELOW * size))
                with self.pace.round(ward.rows, ward.can_guess and not admits, ward.get_ready) as tree:
                    ward.step(tree)
                    if admits:
                        new = [waiting.popleft() for _ in range(min(size - len(ward.rows), len(waiting)))]
                        ward.admit(new, self.pace.most if draft is not None else 0)
                    self._draw(ward, guided)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                back = list(dict.fromkeys([*ward.rows, *new]))
                alone = back[0] if len(back) == 1 and not back[0].done else None
                if alone is not None and (new or alone is stuck):
                    give_up(back[0], error, alone=len(batch) == 1)
                    # Its length was the reason, not how many rows there were.
                    size = self.max_batch_size
                elif alone is not None:
                    # What other rows left behind, or a copy, may have been too much: once more with all memory free.
                    stuck, size = alone, 1
                else:
                    size = max(1, len(back) // 2)
                waiting.extendleft(reversed([row for row in back if not row.done]))
                finished = [row for row in back if row.done and not row.reported]
                ward.clear()
            else:
                finished = [row for row in ward.rows if row.done and not row.reported]
                if not new:
                    stuck = None
                continue
            # Out here the error, and with it the frames that hold the tensors, is gone.
            let_go(size)

    def _draw(self, ward: Ward, guided: bool) -> None:
        """Draw and book the next token of every row and, for as long as its guesses hold, those behind them."""
        tree, on_cpu = ward.tree, ward.controls.device.type == "cpu"
        # Asking for them waits for the whole pass.
        guesses = ward.guesses.tolist() if tree.guesses else []
        drawn: list[list[int]] = [[] for _ in ward.rows]
        nodes: list[list[int]] = [[] for _ in ward.rows]
        at = {place: 0 for place, row in enumerate(ward.rows) if not row.done}
        for place in at:
            ward.rows[place].completion.guessed += tree.guesses
        while at:
            for places in _blocks(list(at), max(1, _BLOCK // ward.voices) if on_cpu else _BLOCK):
                logits = ward.logits(places, [at[place] for place in places])
                tokens: list[int] = []
                for block in _blocks(places, CPU_BLOCK if on_cpu else _BLOCK):
                    part = slice(len(tokens), len(tokens) + len(block))
                    tokens += self._draw_block(ward, [tensor[:, part] for tensor in logits], block, guided)
                for place, token in zip(places, tokens, strict=True):
                    drawn[place].append(token)
                    nodes[place].append(at[place])
            follows = {}
            for place, node in at.items():
                row, children = ward.rows[place], tree.children[node]
                if row.done or not children:
                    continue
                rank = next(
                    (rank for rank, child in enumerate(children) if guesses[place][child] == drawn[place][-1]), None
                )
                row.guesses_tried[: len(children)] += 1
                if rank is not None:
                    row.guesses_held[rank] += 1
                    row.completion.guesses_held += 1
                    follows[place] = children[rank]
            at = follows
        ward.book(drawn, nodes)

    def _draw_block(self, ward: Ward, logits: list[Tensor], places: list[int], guided: bool) -> list[int]:
        """Draw and book a token for the rows at `places` from each lane's logits [M, b, V]; returns the tokens."""
        device = logits[0].device
        # Each voice is looked at several times.
        logits = [tensor[..., : self._width].to(device).float() for tensor in logits]
        # Views where the rows stand side by side.
        whole = slice(places[0], places[-1] + 1)
        rows = [ward.rows[place] for place in places]
        controls = ward.controls.of(whole if len(places) == whole.stop - whole.start else places)
        controls = controls.at([len(row.completion.token_ids) for row in rows])
        patient = logits[0][0]
        raw = (self.mixture if guided else _UNGUIDED).scores(logits, controls)
        scores = warped(raw, controls)
        keys = [row.key(len(row.completion.token_ids)) for row in rows]
        tokens = sample(scores, keys, controls.greedy)
        if controls.penalises:
            ward.controls.seen[sent(places, device), tokens] = True

        def logps_of(unnormalised: Tensor) -> Tensor:
            return unnormalised.gather(1, tokens[:, None])[:, 0] - unnormalised.logsumexp(-1)

        columns = [logps_of(raw)]
        if guided or bool((controls.alpha != 1).any()):
            columns.append(logps_of(patient))
        if controls.warps:
            columns.append(logps_of(scores).masked_fill(sent(controls.greedy, device), 0.0))
        numbers, logps, *others = fetched(tokens, *columns)
        drawn_logps = others.pop() if controls.warps else logps
        patient_logps = others.pop() if others else logps
        found = list(map(int, numbers))
        for place, (row, token) in enumerate(zip(rows, found, strict=True)):
            # The sum over a row with a NaN is NaN, so this also finds rows in which a model broke.
            if not math.isfinite(logps[place]):
                row.finish("error")
            else:
                row.append(token, logps[place], patient_logps[place], drawn_logps[place])
                ward.count(places[place], token)
        return found


def _guides(guides: Any) -> Sequence[Guide]:
    """`guides`; UserError where they are no list of guides."""
    if not isinstance(guides, Sequence) or isinstance(guides, str):
        raise UserError(
            f"guides must be a list of what load_guide(folder, patient) gives, got a {type(guides).__name__}"
        )
    for guide in guides:
        if not isinstance(guide, Guide):
            raise UserError(
                f"a guide must be what load_guide(folder, patient) gives, got a {type(guide).__name__}; give "
                "load_guide the doctor's folder (a Doctor in memory is written to one by save_pretrained)"
            )
    return guides


def _checked(draft: Any, lanes: Sequence[LaneSpec]) -> DraftModel:
    """The draft model; UserError where it is none, or what it guesses cannot be checked."""
    if not isinstance(draft, DraftModel):
        raise UserError(f'draft must be a model from load_draft, or "doctors", got {draft!r:.80}')
    if draft.get_input_embeddings() is not lanes[0].model.get_input_embeddings():
        raise UserError("the draft model was loaded for another patient; load it with load_draft(folder, patient)")
    width = min(int(lane.head.linear.weight.shape[0]) for lane in lanes)
    if int(draft.vocabulary.max()) >= width:
        raise UserError(
            f"the draft model may guess tokens from {width} on, for which a doctor has no logits; make one with a "
            "smaller vocabulary (llmdoctor draft --vocabulary)"
        )
    return draft


def _check_lanes(lanes: Sequence[LaneSpec]) -> None:
    """UserError where a model cannot read guesses."""
    for lane in lanes:
        name = type(lane.model).__name__
        if lane.translation is not None:
            raise UserError(
                "guesses cannot be made beside a doctor of another vocabulary: a text that goes on may be split "
                "otherwise, so several of them cannot be checked in one pass; leave draft or doctor out"
            )
        config = text_config(lane.model)
        if not sees_everything(new_cache(config, 0), config):
            raise UserError(
                f"guesses cannot be made with {name}: it has layers that see a window or a state, or counts distances "
                "in columns (ALiBi), so guesses that do not hold cannot be taken back; leave the draft out"
            )


def _blocks(places: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]
