"""The patient's own answers with its states on them, in files that a killed run keeps.

Shapes: T tokens of a prompt and its answer, M = Σ (T − 1) positions of a file, D hidden size, S tapped layers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmdoctor.data.prompts import Prompt
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.errors import UserError
from llmdoctor.files import atomic_path
from llmdoctor.models.layers import tapped
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.logps import LogitsHead, position_ids
from llmdoctor.shrink.losses import log_normalisers

FORMAT = "2"
"""Of the files; one of another format is drawn again."""

BLOCK = 64
"""Answers in a file. Not an option: it decides nothing but how much a kill costs."""

_WIDTHS = 16
"""Batches are as wide as a multiple of this: oneDNN keeps one compiled product (some 2 MB on a CPU with AMX) for every
shape that it has met, and hundreds of widths took gigabytes."""


@dataclass(frozen=True)
class Answer:
    """Token ids of a prompt and of the patient's answer to it, and where its states lie.

    States are those that every token but the first was drawn from: the file's T − 1 rows from `start` on. Behind the
    last hidden state stand the outputs of the layers that the sampler tapped.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    file: Path
    start: int

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prompt_ids) + len(self.completion_ids)

    def states(self) -> Tensor:
        """[T − 1, D (1 + S)] the patient's states on all tokens but the last, read from the file now."""
        return self._rows("states")

    def log_normalisers(self) -> Tensor:
        """[T − 1] float32: log Σ_v exp of the patient's logits from these states; 0 where a prompt token comes next."""
        return self._rows("log_normalisers")

    def _rows(self, name: str) -> Tensor:
        with safe_open(self.file, framework="pt") as stored:
            return stored.get_slice(name)[self.start : self.start + self.length - 1]


class Sampler:
    """Draws the patient's answers at temperature 1, block by block, and keeps them with the states they came from.

    Args:
        patient: answers.
        folder: holds one safetensors file a block; a block that is there is not drawn again.
        max_new_tokens: longest answer.
        seed: of all draws.
        tapped: S layers whose outputs are kept, too.
    """

    def __init__(
        self, patient: LoadedModel, folder: Path, max_new_tokens: int, seed: int, tapped: Sequence[int] = ()
    ) -> None:
        self.patient = patient
        self.folder = folder
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.tapped = tapped
        self.decoder = GuidedDecoder(patient, max_batch_size=BLOCK)
        self.head = LogitsHead.for_model(patient.model)

    def draw(
        self, name: str, prompts: Sequence[Prompt], tokens: int | None, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """Answers to the prompts in turn, again and again, until they have `tokens` tokens.

        Args:
            name: of the files.
            prompts: what to answer.
            tokens: how many are wanted; the last block is whole. None is one answer to each.
            progress: called with the number of tokens of each block, of the last one's with those still wanted.

        Raises:
            UserError: none of the prompts is answered with a single token.
        """
        answers: list[Answer] = []
        total = 0
        for number, (draw, block) in enumerate(_blocks(prompts)):
            if draw > 0 and (tokens is None or total == 0):
                break
            path = self.folder / f"{name}-{number:05d}.safetensors"
            if _format(path) != FORMAT:
                self._write(path, f"{name}/{draw}", block)
            found = _read(path)
            answers += found
            size = sum(len(answer.completion_ids) for answer in found)
            total += size
            if progress:
                progress(size if tokens is None else min(size, tokens - total + size))
            if tokens is not None and total >= tokens:
                break
        if not total:
            raise UserError(
                f"{self.patient.spec} answers none of the {len(prompts)} prompts: are they empty or too long, or does "
                "it compute numbers that are not finite?"
            )
        return answers

    def _write(self, path: Path, stream: str, block: Sequence[Prompt]) -> None:
        requests = []
        for prompt in block:
            # A stream of its own for every draw of every prompt, whatever else is drawn.
            seed = random.Random(f"{self.seed}/{stream}/{prompt.id}").getrandbits(62)
            sampling = SamplingParams(max_new_tokens=self.max_new_tokens, temperature=1.0, seed=seed)
            requests.append(Request(prompt.messages, sampling=sampling))
        completions = [completion.token_ids for completion in self.decoder.generate(requests)]
        pairs = [
            (self.decoder.encoder.prompt_ids(prompt.messages), completion)
            for prompt, completion in zip(block, completions, strict=True)
            if completion
        ]
        states, normalisers = self._states(pairs)
        tensors = {
            "ids": torch.tensor([token for pair in pairs for part in pair for token in part], dtype=torch.int32),
            "lengths": torch.tensor([[len(part) for part in pair] for pair in pairs]).reshape(-1, 2),
            "states": states,
            "log_normalisers": normalisers,
        }
        with atomic_path(path) as temporary:
            save_file(tensors, str(temporary), metadata={"format": FORMAT})

    @torch.inference_mode()
    def _states(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """[M, D (1 + S)] states as `Answer` has them, in the patient's own dtype, and [M] log-normalisers."""
        model = self.patient.model
        device = model.get_input_embeddings().weight.device
        found: dict[int, tuple[Tensor, Tensor]] = {}
        order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
        for first in range(0, len(order), 16):
            places = order[first : first + 16]
            ids, mask = right_padded([pairs[place] for place in places])
            with tapped(model.get_decoder(), self.tapped) as below:
                last = model.get_decoder()(
                    input_ids=ids.to(device), position_ids=position_ids(mask).to(device), use_cache=False
                ).last_hidden_state
            hidden = torch.cat([last, *(states.to(last.device) for states in below)], dim=-1)
            for row, place in enumerate(places):
                prompt, completion = map(len, pairs[place])
                known = slice(0, prompt + completion - 1)
                normalisers = torch.zeros(known.stop)
                normalisers[prompt - 1 :] = log_normalisers(last[row, known][prompt - 1 :], self.head).cpu()
                found[place] = hidden[row, known].cpu().clone(), normalisers
        if not pairs:
            width = model.config.hidden_size * (1 + len(self.tapped))
            return torch.zeros(0, width, dtype=model.dtype), torch.zeros(0)
        in_order = [found[place] for place in range(len(pairs))]
        return torch.cat([states for states, _ in in_order]), torch.cat([normalisers for _, normalisers in in_order])


def right_padded(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Prompts and answers to ids [B, T] with padding (0) behind, and a mask [B, T] of what is no padding.

    T is rounded up. A causal model sees nothing behind a token, so no attention mask is needed.
    """
    rows = [[*prompt, *completion] for prompt, completion in pairs]
    width = -(-max(map(len, rows)) // _WIDTHS) * _WIDTHS
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def _blocks(prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sequence[Prompt]]]:
    draw = 0
    while True:
        for start in range(0, len(prompts), BLOCK):
            yield draw, prompts[start : start + BLOCK]
        draw += 1


def _format(path: Path) -> str | None:
    """What a file says that it is; None if it says nothing or is not there."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as stored:
        return (stored.metadata() or {}).get("format")


def _read(path: Path) -> list[Answer]:
    with safe_open(path, framework="pt") as stored:
        ids, lengths = stored.get_tensor("ids").tolist(), stored.get_tensor("lengths").tolist()
    answers, place, start = [], 0, 0
    for prompt, completion in lengths:
        end = place + prompt + completion
        answers.append(Answer(ids[place : place + prompt], ids[place + prompt : end], path, start))
        place, start = end, start + prompt + completion - 1
    return answers
