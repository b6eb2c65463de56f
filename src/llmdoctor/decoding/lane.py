"""One model with its cache over the rows alive.

Shapes: B rows, M voices (the model itself, or an adapter on it), T columns of the cache, P columns of the prompts, K
tokens side by side, D hidden size, V vocabulary. What is [M·B, …] has the rows of the first voice first.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from llmdoctor.decoding.cache import InPlaceLayer, new_cache, sees_everything
from llmdoctor.decoding.device import sent
from llmdoctor.decoding.guides import LaneSpec
from llmdoctor.decoding.network import network_of
from llmdoctor.errors import UserError
from llmdoctor.models.context import context_of, text_config
from llmdoctor.models.layers import tapped
from llmdoctor.models.logps import LogitsHead, position_ids

_PACK_ABOVE = 1.5
_PACK_SLACK = 32
"""Columns may exceed what the longest row sees by this factor and this many before it pays to close the holes."""

_SHARE_ABOVE = 128
"""Prompts that begin alike have their beginning read once where that saves more tokens than this: it is one pass more,
which costs the reading of all weights."""

_TABLE_ENTRIES = 1 << 26
"""Of the table of who sees whom, at once: 128 MB in bfloat16."""

_READ_PADDING = ("recurrent_gemma",)
"""Their states go on over tokens that a mask hides."""

_SHORTEST_PIECE = 64
"""Tokens of a row that are read at once at least, however large their table."""


class Lane:
    """One model with its cache over the rows alive, in all its voices at once.

    Rows need not be in step: a row may sit a step out, and columns may be erased from a row again. Layers below the
    first that an adapter changes are run, and cached, once for all voices.

    Args:
        spec: the model; its head makes the outputs, logits as a rule.
        prompts: B lists of ids.
        room: tokens that will be appended.
    """

    def __init__(self, spec: LaneSpec, prompts: list[list[int]], room: int) -> None:
        # Several samples of one prompt are one row until their first token.
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        self._source = [distinct.index(tuple(ids)) for ids in prompts]
        longest = max(map(len, distinct))
        begin = _common_beginning(distinct)
        if (len(distinct) - 1) * begin <= _SHARE_ABOVE:
            begin = 0
        self._set_up(spec, longest + room)
        self._begin = begin if self.sees_everything else 0
        self._ids = torch.zeros(len(distinct), longest, dtype=torch.long)
        self._mask = torch.zeros(len(distinct), longest, dtype=torch.long)
        for place, ids in enumerate(distinct):
            self._ids[place, longest - len(ids) :] = torch.tensor(ids)
            self._mask[place, longest - len(ids) :] = 1
        self._ids, self._mask = self._ids.to(self.device), self._mask.to(self.device)

    @classmethod
    def empty(cls, spec: LaneSpec, rows: int, room: int) -> Lane:
        """A lane of `rows` rows that have not read anything, and will not read more than `room` tokens."""
        lane = cls.__new__(cls)
        lane._set_up(spec, room)
        lane._mask = torch.zeros(rows, 0, dtype=torch.long, device=lane.device)
        return lane

    def _set_up(self, spec: LaneSpec, room: int) -> None:
        self._spec = spec
        self._decoder = spec.model.get_decoder()
        self._config = text_config(spec.model)
        if self._config.model_type in _READ_PADDING:
            raise UserError(
                f"{type(spec.model).__name__} reads padding as if it were text, so that answers would depend on the "
                "prompts beside them; it is not supported"
            )
        if "past_key_values" not in inspect.signature(type(self._decoder).forward).parameters:
            raise UserError(
                f"{type(spec.model).__name__} keeps what it has read in a state of its own kind, which is not supported"
            )
        self._network = network_of(self._decoder)
        self._group = 1 if self._network is None else self._network.group
        self._head = spec.head
        # Other heads are small, or have weights of their own.
        if isinstance(spec.head, LogitsHead):
            spec.head.prepare()
        self._voices = spec.voices
        adapters = [voice for voice in spec.voices if voice is not None]
        if adapters and self._network is None:
            raise ValueError(f"{type(spec.model).__name__} cannot be run with adapters beside it")
        self._shared = min((adapter.first_layer for adapter in adapters), default=None)
        self.device = spec.model.get_input_embeddings().weight.device
        self._last_position = context_of(spec.model) - 1
        self._cache = new_cache(spec.model.config, room)
        # Of each token of the tree that `grow` makes, the numbers of those on its branch, itself the last.
        self._branches: list[list[int]] = []
        self._dense_up_to = 0.0

    @property
    def width(self) -> int:
        """V."""
        return int(self._spec.model.get_output_embeddings().weight.shape[0])

    @property
    def prompts(self) -> tuple[Tensor, Tensor]:
        """The prompts' ids [B, P], left-padded, and their mask; after `prefill` and before anything is appended."""
        return self._ids[self._source], self._mask

    @property
    def mask(self) -> Tensor:
        """[B, T] 1 on the columns that a row sees."""
        return self._mask

    @property
    def sees_everything(self) -> bool:
        """Whether its attention is full in every layer, so that rows may come, go and sit out at will."""
        return sees_everything(self._cache, self._config)

    @property
    def has_holes(self) -> bool:
        """Whether `pack` can drop columns that no row sees, and they are so many that it pays."""
        width = self._mask.shape[1]
        if width <= self._dense_up_to or not self.sees_everything:
            return False
        # As long as rows only grow there is nothing to ask a device for up to that width.
        self._dense_up_to = _PACK_ABOVE * int(self._mask.sum(-1).max()) + _PACK_SLACK
        return width > self._dense_up_to

    def prefill(self) -> Tensor:
        """Run the prompts; returns the logits [M·B, V] of each row's first token."""
        return self._outputs(self.prefill_states())

    def prefill_states(self) -> Tensor:
        """Run the prompts; returns their hidden states [M·B, P, D]."""
        distinct = len(self._ids)
        if self._begin:
            hidden = self._read_beginning_once()
        else:
            whole, self._mask = self._mask, self._mask[:, :0]
            hidden = self.feed(self._ids, whole)
        if len(self._source) > distinct:
            self.keep(self._source)
            hidden = hidden[self._spread(torch.tensor(self._source, device=hidden.device), distinct)]
        return hidden

    def _read_beginning_once(self) -> Tensor:
        """As a pass over the prompts, but what all of them begin with is read in one row."""
        count, begin, whole = len(self._ids), self._begin, self._mask
        own = whole * (whole.cumsum(-1) > begin)
        first = self._ids[:1][whole[:1].bool()][None, :begin]
        self._mask = whole[:1, :0]
        hidden = self.feed(first, torch.ones_like(first))
        spread = self._spread(torch.zeros(count, dtype=torch.long, device=hidden.device), 1)
        self.keep([0] * count)
        hidden = torch.cat([hidden[spread], self.feed(self._ids[:, begin:], own[:, begin:])], dim=1)
        if bool(whole.all()):
            return hidden
        # A shorter prompt's padding lies behind the beginning; it belongs before it.
        order = self._order().repeat(len(self._voices), 1).to(hidden.device)
        self.pack()
        return hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))

    def step(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """Append one token [B] to every row, or to the `active` [B] ones; returns the next logits [M·B, V].

        The logits of a row that sits the step out mean nothing.
        """
        return self._outputs(self.step_states(tokens, active))

    def step_states(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """As `step`, but returns the hidden states [M·B, 1, D]."""
        column = self._mask.new_ones(self._mask.shape[0], 1) if active is None else active.to(self._mask)[:, None]
        self._mask = torch.cat([self._mask, column], dim=1)
        # A finished row that was not dropped yet may have run past the context; where it looks does not matter.
        positions = (self._mask.sum(-1, keepdim=True) - 1).clamp(max=self._last_position)
        return self._forward(tokens.to(self.device)[:, None], positions)

    def keep(self, places: list[int]) -> None:
        """Make the rows those at `places`, in that order; a place may be named more than once."""
        index = sent(places, self.device)
        spread = self._spread(index, len(self._mask))
        self._mask = self._mask[index]
        self._dense_up_to = 0.0
        for number, layer in enumerate(self._cache.layers):
            which = spread if self._is_forked(number) else index
            if isinstance(layer, InPlaceLayer):
                layer.batch_select_indices(which)
            else:
                # transformers' layers with a state have no other way to choose rows.
                layer.reorder_cache(which)

    def grow(self, tokens: Tensor, parents: Sequence[int]) -> Tensor:
        """Hidden states [M·B, K, D] after K tokens that hang on a tree, in one pass.

        Each sees its row and its own branch. The tree stays in the cache, unseen by all else, and may be grown further,
        until `prune` is called.

        Args:
            tokens: [B, K] ids, or what stands in place of their embeddings [B, K, D].
            parents: of each, its number in the tree, which counts on from call to call; −1 follows the row itself.

        Raises:
            UserError: a model whose attention is not full in every layer.
        """
        self.need_full_attention()
        first = len(self._branches)
        for number, parent in enumerate(parents, first):
            self._branches.append([*(self._branches[parent] if parent >= 0 else []), number])
        new = self._branches[first:]
        branch = torch.zeros(len(new), len(self._branches), dtype=torch.bool)
        for place, numbers in enumerate(new):
            branch[place, numbers] = True
        rows = len(self._mask)
        seen = torch.cat(
            [self._mask.bool()[:, None].expand(-1, len(new), -1), sent(branch, self.device).expand(rows, -1, -1)],
            dim=-1,
        )
        dtype = self._decoder.dtype
        # Additive, because eager attention adds whatever it is given.
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill(~seen, torch.finfo(dtype).min)
        depths = sent([len(numbers) - 1 for numbers in new], self.device)
        positions = (self._mask.sum(-1, keepdim=True) + depths).clamp(max=self._last_position)
        return self._forward(tokens.to(self.device), positions, mask[:, None])

    def prune(self, branch: Tensor, kept: Tensor) -> None:
        """Append, of the tree of the last calls of `grow`, the first `kept` [B] of `branch` [B, L]; drop the rest.

        Best on the host: what is to be done depends on them.
        """
        self._branches = []
        start, most = self._mask.shape[1], int(kept.max())
        branch, kept = branch[:, :most].cpu(), kept.cpu()
        places = torch.arange(most)
        column = places < kept[:, None]
        rows, order = ((branch != places) & column).nonzero(as_tuple=True)
        if len(rows):
            sources, targets = sent(start + branch[rows, order], self.device), sent(start + order, self.device)
            rows = sent(rows, self.device)
            voices = len(self._voices)
            everywhere = self._spread(rows, len(self._mask)), sources.repeat(voices), targets.repeat(voices)
            for number, layer in enumerate(self._cache.layers):
                layer.move(*(everywhere if self._is_forked(number) else (rows, sources, targets)))
        if (excess := self._cache.get_seq_length() - start - most) > 0:
            self._cache.crop(-excess)
        self._mask = torch.cat([self._mask, sent(column, self.device, self._mask.dtype)], dim=1)

    def peek(self, candidates: Tensor) -> Tensor:
        """Hidden states [M·B, K, D] after each of K next tokens [B, K]; `accept` or `forget` must be next."""
        return self.grow(candidates, [-1] * candidates.shape[1])

    def outputs(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]: the head's outputs. What tapped layers left behind the last states is not read."""
        if self._spec.tapped:
            hidden = hidden[..., : hidden.shape[-1] // (1 + len(self._spec.tapped))].contiguous()
        return self._head.logits(hidden)

    def accept(self, choice: Tensor) -> None:
        """Append, of the candidates of the last `peek`, that at `choice` [B] in every row."""
        self.prune(choice[:, None], torch.ones_like(choice))

    def forget(self) -> None:
        """Drop the candidates of the last `peek`."""
        nothing = torch.zeros(len(self._mask), 1, dtype=torch.long)
        self.prune(nothing, nothing[:, 0])

    def feed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Append of K tokens to each row those where `mask` [B, K] is 1; returns their states [M·B, K, D].

        `tokens` are ids [B, K], or what stands in place of their embeddings [B, K, D]. Many are read piece by piece:
        who sees whom is a table of all rows' tokens by all their columns.
        """
        piece = count = tokens.shape[1]
        if self.sees_everything:
            columns = (self._mask.shape[1] + count) * len(self._mask) * len(self._voices) * self._group
            piece = max(_SHORTEST_PIECE, _TABLE_ENTRIES // columns)
        pieces = [self._feed(tokens[:, at : at + piece], mask[:, at : at + piece]) for at in range(0, count, piece)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _feed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        start = self._mask.shape[1]
        self._mask = torch.cat([self._mask, mask.to(self._mask)], dim=1)
        positions = position_ids(self._mask)[:, start:].clamp(max=self._last_position)
        return self._forward(tokens.to(self.device), positions)

    def fork(self, places: list[int], room: int) -> Lane:
        """A lane of its own with the rows at `places` (more than once, perhaps), into which `room` tokens fit.

        Raises:
            UserError: a model whose attention is not full in every layer.
        """
        self.need_full_attention()
        index = sent(places, self.device)
        spread = self._spread(index, len(self._mask))
        twin = copy.copy(self)
        twin._branches, twin._dense_up_to = [], 0.0
        twin._mask = self._mask[index]
        twin._cache = new_cache(self._spec.model.config, self._mask.shape[1] + room)
        for number, (layer, own) in enumerate(zip(twin._cache.layers, self._cache.layers, strict=True)):
            which = (spread if self._is_forked(number) else index).to(own.keys.device)
            layer.update(own.keys[which], own.values[which])
        return twin

    def absorb(self, fork: Lane, sources: list[int], places: list[int]) -> None:
        """Append to the rows at `places` what the rows at `sources` of their `fork` have seen since it was made."""
        start = self._mask.shape[1]
        mask = torch.zeros(len(self._mask), fork._mask.shape[1] - start, dtype=torch.long, device=self.device)
        mask[places] = fork._mask[sources, start:]
        # Columns that only rows which are not absorbed have are of no use here.
        width = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 0
        into, out_of = torch.tensor(places, device=self.device), torch.tensor(sources, device=self.device)
        spread = self._spread(into, len(self._mask)), self._spread(out_of, len(fork._mask))
        for number, (layer, theirs) in enumerate(zip(self._cache.layers, fork._cache.layers, strict=True)):
            forked = self._is_forked(number)
            to, of = spread if forked else (into, out_of)
            blocks = []
            for states in (theirs.keys, theirs.values):
                rows = len(self._mask) * (len(self._voices) if forked else 1)
                block = states.new_zeros(rows, states.shape[1], width, states.shape[3])
                block[to.to(states.device)] = states[of.to(states.device), :, start : start + width]
                blocks.append(block)
            layer.update(*blocks)
        self._mask = torch.cat([self._mask, mask[:, :width]], dim=1)

    def erase(self, places: list[int], starts: list[int]) -> None:
        """Make the row at each place forget its columns from its start on; the others stay as they are.

        Raises:
            UserError: a model whose attention is not full in every layer.
        """
        self.need_full_attention()
        for place, start in zip(places, starts, strict=True):
            self._mask[place, start:] = 0
        self._dense_up_to = 0.0

    def pack(self) -> Tensor:
        """Drop the columns that no row sees, each row's own to the right; returns old column -> new column [B, T + 1].

        The last entry maps T, the place of the next column.
        """
        count = self._mask.shape[1]
        lengths = self._mask.sum(-1)
        longest = int(lengths.max())
        order = self._order()[:, count - longest :]
        for number, layer in enumerate(self._cache.layers):
            layer.select_columns(order.repeat(len(self._voices), 1) if self._is_forked(number) else order)
        seen_before = torch.nn.functional.pad(self._mask.cumsum(-1), (1, 0))
        self._mask = (torch.arange(longest, device=self.device) >= longest - lengths[:, None]).long()
        return longest - lengths[:, None] + seen_before

    def _order(self) -> Tensor:
        """[B, T] each row's columns, those that it does not see first, the others in their order."""
        return self._mask.argsort(dim=-1, stable=True)

    def join(self, other: Lane, room: int) -> None:
        """Append the rows of `other`, a lane of the same model and voices, into which `room` more tokens fit.

        Raises:
            UserError: a model whose attention is not full in every layer.
        """
        self.need_full_attention()
        if self.has_holes:
            self.pack()
        width = max(self._mask.shape[1], other._mask.shape[1])
        for number, (layer, theirs) in enumerate(zip(self._cache.layers, other._cache.layers, strict=True)):
            layer.join(theirs, len(self._voices) if self._is_forked(number) else 1, room)
        masks = [torch.nn.functional.pad(lane._mask, (width - lane._mask.shape[1], 0)) for lane in (self, other)]
        self._mask = torch.cat(masks)

    def need_full_attention(self) -> None:
        """UserError for a model whose attention is not full in every layer."""
        if not self.sees_everything:
            raise UserError(
                f"{type(self._spec.model).__name__} has layers that see a window or a state, not all of the text, or "
                "counts distances in columns (ALiBi); this method needs full attention in every layer"
            )
        if self._network is None and self._config._attn_implementation not in ("eager", "sdpa"):
            raise UserError(
                f"{type(self._spec.model).__name__} has {self._config._attn_implementation} attention, which takes no "
                "mask of who sees whom; this method needs it: load the model with sdpa attention"
            )

    def _is_forked(self, number: int) -> bool:
        """Whether a layer is run, and cached, for each voice by itself."""
        return self._shared is not None and number >= self._shared

    def _spread(self, index: Tensor, rows: int) -> Tensor:
        """Places among `rows` -> the places of all voices."""
        return torch.cat([index + voice * rows for voice in range(len(self._voices))])

    def _outputs(self, hidden: Tensor) -> Tensor:
        # Contiguous [B, D] first: a strided slice would make torch multiply row by row with copies of the whole head.
        return self.outputs(hidden[:, -1].contiguous())

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = self._mask if mask is None else mask
        if self._network is not None:
            return self._network(
                ids, mask, positions, self._cache, self._voices, self._shared, tapped=self._spec.tapped
            )
        given = {"inputs_embeds" if ids.is_floating_point() else "input_ids": ids}
        with tapped(self._decoder, self._spec.tapped) as below:
            hidden: Tensor = self._decoder(
                **given, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True
            ).last_hidden_state
        return torch.cat([hidden, *(states.to(hidden.device) for states in below)], dim=-1) if below else hidden


def _common_beginning(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with; each is left one of its own, which the first token is drawn after."""
    least, most = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((place for place in range(limit) if least[place] != most[place]), limit)
