"""A request while it is decoded, and the way of every decoder from requests to completions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from llmdoctor.decoding.memory import give_up, is_out_of_memory, let_go
from llmdoctor.decoding.request import Completion, Request
from llmdoctor.errors import UserError

_SLACK = 8
"""Tokens more than a stop string has bytes: a decoder may treat the first ones otherwise, and a few may be empty."""

_BYTES = 4
"""Of a character, at most."""

RANKS = 8
"""Candidates after one token that may be guessed."""


@dataclass
class Tally:
    """What translating doctors of other vocabularies has left out of what tokens were drawn from.

    Attributes:
        positions: distributions that were translated; where several models are, each counts.
        unmapped: sum over them of the probability of tokens that stand for none of the patient's.
        first_pieces: how often the token drawn was scored by its first piece alone.
    """

    positions: int = 0
    unmapped: float = 0.0
    first_pieces: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def unmapped_mass(self) -> float | None:
        """Mean probability a position; None where there was none."""
        return self.unmapped / self.positions if self.positions else None

    @property
    def first_piece_share(self) -> float | None:
        """Share of the drawn tokens that were scored by their first piece; None where there was none."""
        return self.first_pieces / self.positions if self.positions else None


class Row:
    """A request while it is decoded."""

    def __init__(self, index: int, request: Request, prompts: list[list[int]], encoder: Any, room: int) -> None:
        self.index = index
        self.request = request
        self.prompts = prompts
        self.completion = Completion(id=request.id)
        self.tally = Tally()
        self.done = False
        self.reported = False
        # By the candidate's rank; guesses behind a wrong one say nothing.
        self.guesses_tried = np.zeros(RANKS)
        self.guesses_held = np.zeros(RANKS)
        self._encoder = encoder
        self.room = room
        # Philox keyed by the seed alone: a row's numbers do not depend on its neighbours.
        self._random = np.random.Philox(key=int(request.sampling.seed) % (1 << 64))
        self._keys: list[int] = []
        self._used = 0

    def key(self, place: int) -> int:
        """64 random bits that decide the token at that place of the completion, whenever it is drawn."""
        while len(self._keys) <= place:
            self._keys += self._random.random_raw(64).tolist()
        return self._keys[place]

    def next_key(self) -> int:
        """The row's next 64 random bits, for methods that draw more than once a token."""
        self._used += 1
        return self.key(self._used - 1)

    def uniform(self) -> float:
        """The row's next number in [0, 1)."""
        return (self.next_key() >> 11) * 2.0**-53

    def append(self, token: int, logp: float, patient_logp: float, drawn_logp: float | None = None) -> None:
        """Book a drawn token and see whether it ends the row; `drawn_logp` is `logp` where no warper is at work."""
        done = self.completion
        done.token_ids.append(token)
        done.logps.append(logp)
        done.patient_logps.append(patient_logp)
        done.drawn_logps.append(logp if drawn_logp is None else drawn_logp)
        sampling = self.request.sampling
        if token in self._encoder.stop_ids:
            return self.finish("stop")
        if (end := self._stop_string()) is not None:
            return self.finish("stop", end)
        if len(done.token_ids) >= sampling.max_new_tokens:
            return self.finish("length")
        if len(done.token_ids) >= self.room:
            return self.finish("context")
        return None

    def _stop_string(self) -> str | None:
        """What stands before the first stop string; None where there is none."""
        stops, ids = self.request.sampling.stop, self.completion.token_ids
        if not stops:
            return None
        if not self._in_newest(stops, ids):
            return None
        text: str = self._encoder.decode(ids)
        places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        return text[: min(places)] if places else None

    def _in_newest(self, stops: Sequence[str], ids: list[int]) -> bool:
        # One that is new ends in the last token, and no token is less than a byte. So it is looked for in a few tokens,
        # not in the whole answer after every one.
        most = max(len(stop.encode("utf-8", "surrogatepass")) for stop in stops) + _SLACK
        for more in range(_BYTES):
            newest: str = self._encoder.decode(ids[-most - more :])
            if any(stop in newest for stop in stops):
                return True
            # Begun inside a character: some tokenizers then read a whole run of bytes as broken.
            if not newest.startswith("\ufffd"):
                break
        return False

    def retract(self, length: int) -> None:
        """Unbook all tokens but the first `length`, and open the row again."""
        done = self.completion
        for values in (done.token_ids, done.logps, done.patient_logps, done.drawn_logps):
            del values[length:]
        done.finish_reason = done.text = ""
        self.done = False

    def restart(self) -> None:
        """As if nothing had been drawn: the same tokens will be."""
        self.completion = Completion(id=self.request.id)
        self.tally = Tally()
        self._used = 0
        self.done = self.reported = False

    def finish(self, reason: str, text: str | None = None) -> None:
        """Close the row."""
        self.completion.finish_reason = reason
        self.completion.text = self._encoder.decode(self.completion.token_ids) if text is None else text
        self.done = True

    def visible_text(self) -> str:
        """Text that later tokens can no longer change: whole characters, and no beginning of a stop string."""
        if self.done:
            return self.completion.text
        ids = self.completion.token_ids
        # A run of byte tokens is read as a whole: one that is no character makes all of it broken.
        whole = next((end for end in range(len(ids), 0, -1) if ids[end - 1] not in self._encoder.byte_ids), 0)
        text: str = self._encoder.decode(ids[:whole])
        text = text.rstrip("\ufffd")
        for stop in self.request.sampling.stop:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    text = text[:-length]
                    break
        return text


def open_row(
    index: int,
    request: Request,
    prompts: list[list[int]],
    encoder: Any,
    contexts: Sequence[int],
    falling_silent: Collection[int] = (),
) -> Row:
    """A row for `request`.

    Args:
        index: its place among the requests.
        request: what is asked.
        prompts: its prompt as each model reads it.
        encoder: the patient's.
        contexts: of each model.
        falling_silent: models that have no say any more once their context is full, and so do not end the answer.

    Raises:
        UserError: a prompt leaves no room in its model's context.
    """
    rooms = [context - len(prompt) for context, prompt in zip(contexts, prompts, strict=True)]
    least = min(range(len(rooms)), key=rooms.__getitem__)
    if rooms[least] <= 0:
        whose = "" if least == 0 else " as one of the doctors or judges reads it"
        raise UserError(
            f"prompt {request.id or index + 1} has {len(prompts[least])} tokens{whose}; the context of "
            f"{contexts[least]} leaves no room for an answer"
        )
    room = min(room for number, room in enumerate(rooms) if number not in falling_silent)
    return Row(index, request, prompts, encoder, room)


def complete(
    rows: Sequence[Row],
    max_batch_size: int,
    decode: Callable[[list[Row]], Iterator[list[Row]]],
    on_done: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Decode `rows` in batches of similar prompt lengths; the completions come in the order of `rows`.

    Where memory does not suffice, the rows that were under way begin anew, fewer of them together.

    Args:
        decode: takes a batch to its ends, and yields from time to time the rows that have just finished.
        on_done: called with a row's index and its completion as soon as it is finished.

    Raises:
        UserError: memory does not even hold the only row.
    """
    waiting = deque(sorted(rows, key=lambda row: (len(row.prompts[0]), row.index)))
    size = max_batch_size

    def report(finished: Iterable[Row]) -> None:
        for row in finished:
            row.reported = True
            if on_done:
                on_done(row.index, row.completion)

    while waiting:
        batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
        under_way = decode(batch)
        while True:
            try:
                finished = next(under_way, None)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    give_up(batch[0], error, alone=len(rows) == 1)
                # Those that wait are no shorter, so a single one's failure is no reason to try more together again.
                size = max(1, len(batch) // 2)
            else:
                if finished is None:
                    break
                report(finished)
                continue
            del under_way
            let_go(size)
            if len(batch) == 1:
                report(batch)
            # Also those that have ended and were not told yet: what is booked for them may be half done.
            again = [row for row in batch if not row.reported]
            for row in again:
                row.restart()
            waiting.extendleft(reversed(again))
            break
    return [row.completion for row in rows]
