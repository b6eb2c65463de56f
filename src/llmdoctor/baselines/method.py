"""What the methods share: from requests to rows, and batch by batch to completions.

Shapes: B rows, K candidates, V vocabulary.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.decoding.device import sent
from llmdoctor.decoding.guides import lanes_of
from llmdoctor.decoding.request import Completion, Request, SamplingParams, listed
from llmdoctor.decoding.row import Row, complete, open_row
from llmdoctor.decoding.sampling import sample
from llmdoctor.errors import UserError
from llmdoctor.models.context import context_of
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.reward_model import RewardModel

_COMPACT_BELOW = 0.75
"""As in the engine: finished rows are dropped when at most this share is alive."""


class Method(abc.ABC):
    """A decoder of the patient's next tokens, with other models that help to choose.

    Args:
        patient: the frozen model.
        others: the models that help; they share the patient's vocabulary.
        max_batch_size: rows decoded together.

    Raises:
        UserError: a model of another vocabulary.
    """

    name = ""
    sampling_fields: frozenset[str] = frozenset()
    """The sampling parameters it heeds, beside `max_new_tokens`, `seed` and `stop`."""

    def __init__(
        self, patient: LoadedModel, others: Sequence[LoadedModel | RewardModel] = (), *, max_batch_size: int = 32
    ) -> None:
        if max_batch_size < 1:
            raise UserError(f"max_batch_size must be at least 1, got {max_batch_size}")
        for other in others:
            if other.fingerprint.get("tokenizer") != patient.fingerprint.get("tokenizer"):
                raise UserError(
                    f"{self.name} extends answers token by token, so {other.spec} must share the vocabulary of "
                    f"{patient.spec}"
                )
        self.patient = lanes_of(patient, [])[0][0]
        self.encoder = self.patient.encoder
        self.max_batch_size = max_batch_size
        models = [patient.model, *(other.model for other in others)]
        self._contexts = list(map(context_of, models))
        self.width = min(model.get_input_embeddings().weight.shape[0] for model in models)
        self._encoders = [
            self.encoder,
            *(
                other.encoder if isinstance(other, RewardModel) else ChatEncoder.for_model(other.model, other.tokenizer)
                for other in others
            ),
        ]

    def generate(
        self, requests: Iterable[Request], *, on_done: Callable[[int, Completion], None] | None = None
    ) -> list[Completion]:
        """Complete all requests, similar prompt lengths together; results come in the order of the requests.

        Raises:
            UserError: a request with a mixture or a sampling parameter that the method does not have, or a prompt that
                leaves no room in a model's context.
        """
        rows = [self._open(index, request) for index, request in enumerate(listed(requests))]
        return complete(rows, self.max_batch_size, self._decode, on_done)

    def _open(self, index: int, request: Request) -> Row:
        if request.betas or request.alpha != 1.0:
            raise UserError(f"{self.name} takes no doctors: alpha must be 1 and betas left out")
        plain = SamplingParams()
        for field in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            value = getattr(request.sampling, field)
            if field not in self.sampling_fields and value not in (getattr(plain, field), self._implied(field)):
                raise UserError(f"{self.name} has no {field}; leave it at {getattr(plain, field)}, got {value}")
        prompts = [encoder.prompt_ids(request.messages) for encoder in self._encoders]
        return open_row(index, request, prompts, self.encoder, self._contexts)

    @staticmethod
    def _implied(field: str) -> Any:
        """A deterministic method is as good as greedy."""
        return 0.0 if field == "temperature" else None

    @torch.inference_mode()
    def _decode(self, batch: list[Row]) -> Iterator[list[Row]]:
        for row in batch:
            if row.request.sampling.max_new_tokens == 0:
                row.finish("length")
        yield newly_finished(batch)
        rows = [row for row in batch if not row.done]
        if rows:
            yield from self._search(rows)

    @abc.abstractmethod
    def _search(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Decode rows that are open to their ends; yields the rows that have just finished."""


def room_of(rows: Sequence[Row]) -> int:
    """Tokens that the longest of `rows` may still get."""
    return max(min(row.request.sampling.max_new_tokens, row.room) for row in rows)


def newly_finished(rows: Sequence[Row]) -> list[Row]:
    """The finished rows that were not reported yet; they count as reported then."""
    finished = [row for row in rows if row.done and not row.reported]
    for row in finished:
        row.reported = True
    return finished


def survivors(rows: Sequence[Row]) -> list[int] | None:
    """Places of the rows that go on; None where so few have finished that dropping them does not pay."""
    alive = [place for place, row in enumerate(rows) if not row.done]
    return alive if len(alive) <= _COMPACT_BELOW * len(rows) else None


def pick(rows: Sequence[Row], scores: Tensor) -> tuple[Tensor, list[float], list[bool]]:
    """One of each row's candidates by softmax(scores / temperature), or the best where the temperature is 0.

    Args:
        rows: B rows; each gives one of its random keys.
        scores: [B, K].

    Returns:
        choice [B], the log-probability of each choice (0 where greedy: the best is certain), and whether a row's scores
        are broken (NaN), whose choice then means nothing.
    """
    values = [row.request.sampling.temperature for row in rows]
    greedy = torch.tensor([value == 0 for value in values])
    temperature = sent([value or 1.0 for value in values], scores.device)
    broken = (~scores.amax(-1).isfinite()).tolist()
    scores = scores.nan_to_num(nan=0.0) / temperature[:, None]
    choice = sample(scores, [row.next_key() for row in rows], greedy)
    logps = scores.log_softmax(-1).gather(1, choice[:, None])[:, 0].masked_fill(sent(greedy, scores.device), 0.0)
    return choice, logps.tolist(), broken
