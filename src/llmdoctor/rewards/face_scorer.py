"""Log-likelihoods of responses under a face, with everything shared computed once.

Shapes: B pairs, 2B responses (chosen and rejected of each pair side by side), P prompt tokens, L completion tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.models.logps import LogitsHead, per_token_logps, position_ids
from llmdoctor.models.packing import PackedPairs, can_pack, keeps_keys, reads_over_gaps

SPARE = 1.1
"""Padded tokens over real ones, above which a forward pass on a CPU is split."""

ENOUGH_TOKENS = 1024
"""Real tokens that keep a CPU busy; no forward pass is split below them. A GPU wants all that it is given at once."""


class FaceScorer:
    """Scores responses as one patient under one system prompt (or none).

    The tokens that every prompt begins with (the system prompt itself) are run once and their cache kept; the rest of
    a prompt is run once for both of its responses, in one row with them where the model allows it (`can_pack`); logits
    are computed at completion tokens only. A model with a state that cannot be copied (not `keeps_keys`) reads a prompt
    once for each response.
    """

    def __init__(self, model: Any, encoder: ChatEncoder, head: LogitsHead, system: str | None) -> None:
        self.model = model
        self.encoder = encoder
        self.head = head
        self.system = system
        # Shorter prompts are padded between the shared prefix and the rest.
        self._prefix = self._shared_prefix() if reads_over_gaps(model) else []
        self._prefix_cache: Any = None
        if self._prefix:
            with torch.inference_mode():
                ids = torch.tensor([self._prefix], device=model.device)
                self._prefix_cache = model.get_decoder()(input_ids=ids, use_cache=True).past_key_values

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt's ids under this face."""
        return self.encoder.prompt_ids(messages, self.system)

    @torch.inference_mode()
    def score(self, prompts: Sequence[list[int]], completions: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Per-token log-likelihoods of both responses of every prompt.

        Args:
            prompts: B lists of ids from `prompt_ids`.
            completions: B pairs of completion ids, none empty.

        Returns:
            2B float32 tensors of the completions' lengths, on the CPU, pair by pair.
        """
        shared = len(self._prefix)
        if not all(len(prompt) > shared and prompt[:shared] == self._prefix for prompt in prompts):
            shared = 0
        rest = [prompt[shared:] for prompt in prompts]
        states: Callable[..., Tensor] = self._whole_states
        if can_pack(self.model):
            states = self._packed_states
        elif keeps_keys(self.model):
            states = self._two_pass_states
        lengths = [len(prompt) + len(one) + len(other) for prompt, (one, other) in zip(rest, completions, strict=True)]
        scores: list[Tensor] = [torch.empty(0)] * (2 * len(prompts))
        for places in _alike(lengths) if self.model.device.type == "cpu" else [range(len(prompts))]:
            # The chosen responses first, then the rejected ones.
            flat = [completions[place][side] for side in (0, 1) for place in places]
            labels, completion_mask = _pad_right(flat, self.model.device)
            hidden = states([rest[place] for place in places], flat, labels, completion_mask, shared)
            logps = per_token_logps(hidden, self.head, labels, completion_mask).cpu()
            targets = [2 * place + side for side in (0, 1) for place in places]
            for target, row, ids in zip(targets, logps, flat, strict=True):
                scores[target] = row[: len(ids)].clone()
        return scores

    def _packed_states(
        self, prompts: Sequence[list[int]], flat: Sequence[list[int]], _: Tensor, completion_mask: Tensor, shared: int
    ) -> Tensor:
        """[2B, N, D] from one pass over rows of a prompt and both its responses."""
        count = len(prompts)
        rows = [[*p, *one, *other] for p, one, other in zip(prompts, flat[:count], flat[count:], strict=True)]
        ids, mask = _pad_right(rows, self.model.device)
        pairs = PackedPairs(mask, completion_mask)
        out = self.model.get_decoder()(
            input_ids=ids,
            # Every row sees the whole of what all begin with.
            attention_mask=pad(pairs.attention_bias(self.model.dtype), (shared, 0)),
            position_ids=pairs.positions + shared,
            past_key_values=self._prefix_copy(count, shared),
            use_cache=bool(shared),
        )
        return pairs.take(out.last_hidden_state)

    def _two_pass_states(
        self,
        prompts: Sequence[list[int]],
        flat: Sequence[list[int]],
        labels: Tensor,
        completion_mask: Tensor,
        shared: int,
    ) -> Tensor:
        """[2B, L, D] from a pass over the prompts and one over the responses behind two copies of their cache."""
        ids, mask = _pad_left(prompts, self.model.device)
        mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)
        decoder = self.model.get_decoder()
        out = decoder(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask)[:, shared:],
            past_key_values=self._prefix_copy(len(prompts), shared),
            use_cache=True,
        )
        hidden = out.last_hidden_state[:, -1:].repeat(2, 1, 1)
        if labels.shape[1] == 1:
            return hidden
        cache = out.past_key_values
        # On the CPU: each layer's keys lie where that layer is, and all take indices from there.
        cache.batch_select_indices(torch.arange(len(prompts)).repeat(2))
        both = torch.cat([mask.repeat(2, 1), completion_mask[:, :-1].long()], dim=1)
        rows = decoder(
            input_ids=labels[:, :-1],
            attention_mask=both,
            position_ids=position_ids(both)[:, mask.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        return torch.cat([hidden, rows.last_hidden_state], dim=1)

    def _whole_states(self, prompts: Sequence[list[int]], flat: Sequence[list[int]], labels: Tensor, *_: Any) -> Tensor:
        """[2B, L, D] from one pass over rows of a prompt and one response; there is no shared prefix."""
        rows = [[*p, *c] for p, c in zip([*prompts, *prompts], flat, strict=True)]
        # Padding stands behind all that is read, so that no mask is needed, which some such models ignore.
        ids = _pad_right(rows, self.model.device)[0]
        hidden = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden.device).repeat(2)
        steps = torch.arange(labels.shape[1], device=hidden.device)
        columns = (ends[:, None] + steps).clamp(max=hidden.shape[1] - 1)
        return hidden[torch.arange(len(rows), device=hidden.device)[:, None], columns]

    def _prefix_copy(self, rows: int, shared: int) -> Any:
        """The cache of the shared prefix for so many rows, None where nothing is shared."""
        if not shared:
            return None
        cache = copy.deepcopy(self._prefix_cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def _shared_prefix(self) -> list[int]:
        """The ids with which two prompts that differ from the first character on both begin."""
        one, other = (self.prompt_ids([{"role": "user", "content": text}]) for text in ("A", "7"))
        length = 0
        while length < min(len(one), len(other)) and one[length] == other[length]:
            length += 1
        return one[:length]


def _pad_left(rows: Sequence[list[int]], device: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _pad_right(rows: Sequence[list[int]], device: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = True
    return ids.to(device), mask.to(device)


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows to be read together, longest first: little padding, or too few tokens to be split."""
    places: list[int] = []
    real = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        padded = (len(places) + 1) * lengths[places[0]] if places else 0
        if real >= ENOUGH_TOKENS and padded > SPARE * (real + lengths[place]):
            yield places
            places, real = [], 0
        places.append(place)
        real += lengths[place]
    yield places
