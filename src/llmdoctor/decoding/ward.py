"""The rows that are decoded together, on every model that is run for them.

Shapes: B rows, M voices of a lane, N nodes of a tree of guesses, D hidden size, V vocabulary, W tokens a draft may
guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmdoctor.decoding.controls import Controls
from llmdoctor.decoding.device import sent
from llmdoctor.decoding.guides import LaneSpec, Voice
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.mixture import Mixture, warped
from llmdoctor.decoding.row import Row
from llmdoctor.decoding.sampling import candidates
from llmdoctor.decoding.speculation import DraftLane
from llmdoctor.decoding.translated_lane import TranslatedLane, open_lane
from llmdoctor.decoding.tree import Tree
from llmdoctor.models.draft import DraftModel

_COMPACT_BELOW = 0.75
"""Finished rows are dropped when at most this share is alive: dropping copies every cache."""

_FEW_STATES = 32
"""So many states under the head at once cost little more than one, because most of it is reading the head. Of more,
only those are brought to logits that are drawn from."""


class Ward:
    """Rows, their caches on all lanes, and what the next tokens are drawn from.

    Args:
        specs: the models, the patient first.
        names: of the guides, in the order of the columns of β.
        mixture: how the models' logits make a distribution.
        draft: guesses tokens of the first lane's: a model for that, or the voice of another lane that stands in for it
            (`speculation.stand_in`); None where nothing is to be guessed.

    Attributes:
        rows: B rows; some may be done and not yet dropped.
        tree: of the last step's guesses.
        guesses: [B, N] the tokens at its nodes, each row's last token at the root.
        controls: of the rows.
        voices: most of any lane.
    """

    def __init__(
        self,
        specs: Sequence[LaneSpec],
        names: Sequence[str],
        mixture: Mixture,
        draft: DraftModel | Voice | None = None,
    ) -> None:
        self._specs = list(specs)
        self._names = names
        self._mixture = mixture
        self._model = draft if isinstance(draft, DraftModel) else None
        self._stand_in = None if isinstance(draft, DraftModel) else draft
        if self._model is not None and self._model.lower:
            self._specs[0] = replace(specs[0], tapped=self._model.lower)
        # Of each guide, the lanes that are translated for it.
        self._translated = {
            name: {at[0] for at in voices if at is not None and specs[at[0]].translation is not None}
            for name, *voices in zip(names, mixture.guides, mixture.references, strict=False)
        }
        self.voices = max(len(spec.voices) for spec in specs)
        self.guide_forwards = sum(len(spec.voices) for spec in specs) - 1
        self._width = min(int(spec.head.linear.weight.shape[0]) for spec in specs)
        self.controls: Controls
        self.clear()

    def clear(self) -> None:
        """Let all rows go."""
        self.rows: list[Row] = []
        self._lanes: list[Lane | TranslatedLane] = []
        self._draft: DraftLane | None = None
        self._tokens = torch.empty(0, dtype=torch.long)
        # Of each lane, the states [M, B, N, D] that tokens are drawn from, or for one that translates the logits
        # themselves, [1, B, 1, V].
        self._states: list[Tensor] = []
        # Of lanes that were read in full, the logits [M, B, N, V].
        self._read: dict[int, Tensor] = {}
        # Where a lane guesses itself, the logits [M, B, n, W] of each lane but the first after the nodes in `_asked`.
        self._said: list[Tensor] = []
        self._asked: list[int] = []
        # Of the guesses that the draft has read, their numbers in its own tree.
        self._known: dict[int, int] = {}
        self.tree = Tree()
        self.guesses = self._tokens[:, None]

    @property
    def can_admit(self) -> bool:
        """Whether rows may join others that are under way."""
        return all(lane.sees_everything for lane in self._lanes)

    @property
    def can_guess(self) -> bool:
        """Whether `step` may be asked for guesses."""
        return self._draft is not None or self._stand_in is not None

    def get_ready(self) -> None:
        """Do what is due before guesses can be made and was put off while there were none."""
        if self._draft is not None:
            self._draft.catch_up()

    def step(self, tree: Tree) -> None:
        """Append the tokens that were booked to all rows, and behind them a tree of guesses of what may follow."""
        if not self.rows:
            return
        self.tree, self.guesses = tree, self._tokens[:, None]
        self._read, self._said, self._asked = {}, [], []
        if not tree.guesses:
            read = [_advance(lane, self._tokens) for lane in self._lanes]
            if self._draft is not None:
                self._draft.expect(read[0])
            self._states = [self._by_voice(states) for states in read]
            return
        # Doctors that are models of their own are run ahead, level by level; the first lane then reads all at once.
        patient, others = self._lanes[0], self._lanes[1:]
        assert isinstance(patient, Lane)
        ahead: list[list[Tensor]] = [[] for _ in others]
        whole: list[list[Tensor]] = []
        for level in tree.levels:
            tokens = self.guesses[:, level[0] :]
            parents = [tree.parents[node - 1] if node else -1 for node in level]
            for lane, states in zip(others, ahead, strict=True):
                assert isinstance(lane, Lane)
                states.append(self._by_voice(lane.grow(tokens, parents)))
            inner = [node for node in level if tree.children[node]]
            if inner:
                places = [node - level[0] for node in inner]
                says = [
                    self._guessable(spec, states[-1][:, :, sent(places, states[-1].device)])
                    for spec, states in zip(self._specs[1:], ahead, strict=True)
                ]
                self._guess(tree, inner, says)
                if self._draft is None:
                    # Whole logits, from which tokens will be drawn, too.
                    whole.append(says)
                    self._asked += inner
        self._said = [torch.cat(levels, dim=2) for levels in zip(*whole, strict=True)]
        first = patient.grow(self.guesses, [-1, *tree.parents])
        if self._draft is not None:
            self._draft.end()
            self._draft.expect(first)
        self._states = [self._by_voice(first), *(torch.cat(levels, dim=2) for levels in ahead)]

    def _guess(self, tree: Tree, inner: Sequence[int], says: list[Tensor]) -> None:
        """Append the children of some nodes of one level to the guesses.

        `says` has of each lane but the first the logits [M, B, n, W] after these nodes.
        """
        expected = self._expected(tree, inner, says)
        count = len(inner)
        depth = next(number for number, level in enumerate(tree.levels) if inner[0] in level)
        rows = [row for row in self.rows for _ in inner]
        said = [len(row.completion.token_ids) + depth for row in rows]
        controls = self.controls.of([place for place in range(len(self.rows)) for _ in inner]).at(said)
        # A stand-in may be on another device than the patient, where the controls are.
        device = controls.device
        logits = [tensor.flatten(1, 2).to(device) for tensor in (expected, *says)]
        vocabulary = self._vocabulary(device)
        seen = controls.seen[:, vocabulary] if controls.penalises else None
        scores = warped(self._mixture.scores(logits, controls), controls, seen).nan_to_num(nan=0.0)
        keys = [row.key(place) for row, place in zip(rows, said, strict=True)]
        most = max(len(tree.children[node]) for node in inner)
        found = candidates(scores, keys, controls.greedy, most, vocabulary).unflatten(0, (-1, count))
        found = found.to(self.guesses.device)
        columns = [found[:, place, : len(tree.children[node])] for place, node in enumerate(inner)]
        self.guesses = torch.cat([self.guesses, *columns], dim=1)

    def _expected(self, tree: Tree, inner: Sequence[int], says: Sequence[Tensor]) -> Tensor:
        """What the first lane is thought to say after these nodes: logits [M, B, n, W]."""
        if self._draft is None:
            assert self._stand_in is not None
            lane, voice = self._stand_in
            # An adapter on the patient is thought to change nothing.
            return says[lane - 1][voice].expand(len(self._specs[0].voices), -1, -1, -1)
        if inner[0] == 0:
            self._known = {0: -1}
            return self._draft.begin()
        # The draft reads what it has to guess behind, and no leaves.
        parents = [self._known[tree.parents[node - 1]] for node in inner]
        self._known |= {node: number for number, node in enumerate(inner, len(self._known) - 1)}
        return self._draft.go_on(self.guesses[:, sent(inner, self.guesses.device)], parents)

    def _vocabulary(self, device: torch.device) -> Tensor:
        """[W] the tokens that may be guessed."""
        if self._model is not None:
            return self._model.vocabulary.to(device)
        return torch.arange(self._width, device=device)

    def _guessable(self, spec: LaneSpec, states: Tensor) -> Tensor:
        """States [M, B, n, D] of a lane -> its logits [M, B, n, W] of the tokens that may be guessed."""
        if self._model is not None:
            return self._model.cut(spec.head).logits(states)
        return spec.head.logits(states.contiguous())[..., : self._width]

    def logits(self, places: Sequence[int], nodes: Sequence[int]) -> list[Tensor]:
        """Of each lane the logits [M, b, V] at one node of each of the rows at `places`."""

        def there(tensor: Tensor, columns: Sequence[int] = nodes) -> Tensor:
            return tensor[:, sent(places, tensor.device), sent(columns, tensor.device)]

        found = []
        for number, (lane, states) in enumerate(zip(self._lanes, self._states, strict=True)):
            if not isinstance(lane, Lane):
                found.append(there(states))
            elif number and self._said and all(node in self._asked for node in nodes):
                found.append(there(self._said[number - 1], [self._asked.index(node) for node in nodes]))
            elif self.tree.guesses and states.shape[:3].numel() <= _FEW_STATES:
                if number not in self._read:
                    self._read[number] = lane.outputs(states)
                found.append(there(self._read[number]))
            else:
                found.append(lane.outputs(there(states)))
        return found

    def count(self, place: int, token: int) -> None:
        """Book in the tally of the row at `place` what translation left out of what its next `token` is drawn from."""
        row = self.rows[place]
        heard = (lanes for name, lanes in self._translated.items() if row.request.beta_of(name))
        for number in set().union(*heard):
            lane = self._lanes[number]
            assert isinstance(lane, TranslatedLane)
            lane.count(place, token, row.tally)

    def admit(self, rows: Sequence[Row], most: int = 0) -> None:
        """Read the prompts of more rows, and what they have said already, in a pass of their own.

        `most` is how many guesses a step may be asked for. The last step must have made none.
        """
        rows = list(rows)
        # Asked before this ward changes: what fails in here leaves it as it was.
        room = 1 + most + max(min(row.request.sampling.max_new_tokens, row.room) for row in (*self.rows, *rows))
        said = [row.completion.token_ids for row in rows]
        lanes = [
            open_lane(spec, [row.prompts[index] for row in rows], said, room) for index, spec in enumerate(self._specs)
        ]
        read = [_read(lane) for lane in lanes]
        draft = None
        if self._model is not None and isinstance(lanes[0], Lane):
            draft = DraftLane(self._model, len(self._specs[0].voices), *lanes[0].prompts, read[0], room)
        # Copied, so that what was read may go.
        states = [tensor[:, -1:].clone().unflatten(0, (-1, len(rows))) for tensor in read]
        everyone = [*self.rows, *rows]
        # Where the logits are: of a model that is spread over several devices, not where its tokens go in.
        controls = Controls(everyone, self._names, self._specs[0].head.linear.weight.device, lanes[0].width)
        if self.rows:
            for lane, other in zip(self._lanes, lanes, strict=True):
                lane.join(other, room)  # type: ignore[arg-type]  # lanes of one spec are of one kind
            if self._draft is not None and draft is not None:
                self._draft.join(draft, room)
            self._states = [torch.cat(pair, dim=1) for pair in zip(self._states, states, strict=True)]
        else:
            self._lanes, self._draft, self._states = lanes, draft, states
        self.rows, self.controls = everyone, controls
        self.guesses = torch.zeros(len(everyone), 1, dtype=torch.long, device=lanes[0].device)
        self.tree = Tree()

    def book(self, drawn: Sequence[Sequence[int]], nodes: Sequence[Sequence[int]]) -> None:
        """Take note of the tokens that each row has drawn, and of the nodes that it has drawn them at.

        All other guesses are forgotten.
        """
        device = self._lanes[0].device
        width = max(1, *map(len, drawn))

        def padded(lists: Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor([[*row, *[0] * (width - len(row))] for row in lists])

        branch, kept = padded(nodes), torch.tensor([len(row) for row in drawn])
        if self.tree.guesses:
            for lane in self._lanes:
                assert isinstance(lane, Lane)
                lane.prune(branch, kept)
                if lane.has_holes:
                    lane.pack()
        if self._draft is not None:
            self._draft.observe(sent(padded(drawn), device), sent(kept, device), sent(branch, device))
        self._tokens = sent([row[-1] if row else 0 for row in drawn], device)

    def _by_voice(self, states: Tensor) -> Tensor:
        """[M·B, …] -> [M, B, …]."""
        return states.unflatten(0, (-1, len(self.rows)))

    def discharge(self) -> None:
        """Drop the rows that are done, once they are many enough."""
        alive = [place for place, row in enumerate(self.rows) if not row.done]
        if not alive:
            self.clear()
        elif len(alive) <= _COMPACT_BELOW * len(self.rows):
            self.rows = [self.rows[place] for place in alive]
            for lane in (*self._lanes, *([] if self._draft is None else [self._draft])):
                lane.keep(alive)
                # The longest row may be among those that left.
                if not isinstance(lane, TranslatedLane) and lane.has_holes:
                    lane.pack()
            self.controls.keep(alive)
            self._tokens = self._tokens[sent(alive, self._tokens.device)]


def _advance(lane: Lane | TranslatedLane, tokens: Tensor) -> Tensor:
    """Append a token [B]; what the next one is drawn from: states [M·B, 1, D] or logits [B, 1, V]."""
    return lane.step_states(tokens) if isinstance(lane, Lane) else lane.step(tokens)[:, None]


def _read(lane: Lane | TranslatedLane) -> Tensor:
    """Read the prompts: states [M·B, P, D] or the logits after them [B, 1, V]."""
    return lane.prefill_states() if isinstance(lane, Lane) else lane.prefill()[:, None]
