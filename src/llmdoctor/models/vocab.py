"""Tokens as byte strings, and what a model of one vocabulary says in the words of another's.

The doctor is read as a distribution over texts. Its part in a patient's token v is the probability that its text goes
on such that the patient's tokenizer, splitting it, has v next. So every token of the doctor's stands for one of the
patient's: the first that the patient's tokenizer makes of it. Between equal tokenizers that is the token itself.

What is approximate:

- A patient's token that spans several tokens of the doctor's, and that no token of the doctor's leads to, gets its
  first piece's probability, shared out equally among all such tokens with that first piece.
- A token of the doctor's is split by itself, not together with the text that will follow it.

Exact sums over all ways to spell a text (arXiv 2410.09303, 2412.03719) cost several forward passes a token. In the
ratio form doctor and reference go through one mapping, and what it gets wrong of both alike cancels.

Shapes: N rows, V the patient's vocabulary (the width of its logits), D the doctor's.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.errors import UserError
from llmdoctor.models.loading import tokenizer_fingerprint

_BATCH = 8192
_KEPT_CONTINUATIONS = 1 << 16
_MOST_CANDIDATES = 4096
# Tokenizers that were trained on plain text often lack some control characters and the first bytes of far planes.
_NEEDED_BYTES = (0x09, 0x0A, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))
_SPACE_MARK = "\u2581"


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every text the same ids."""
    return one is other or tokenizer_fingerprint(one) == tokenizer_fingerprint(other)


class Vocabulary:
    """The tokens of one tokenizer as byte strings.

    Attributes:
        spelled: the bytes of each token by its id; None where it stands for no text (control tokens, gaps).
        names: the tokenizer's own name of each token, "" in gaps.
        stop_ids: ids that end an answer.
        lead: what stands before every text (sentencepiece's space, or `ChatEncoder.lead`); it is no part of the text.
        inside, start: the tokens as they read within a text, and at its beginning, without the lead.
    """

    def __init__(
        self,
        spelled: Sequence[bytes | None],
        names: Sequence[str],
        stop_ids: frozenset[int],
        split_texts: Callable[[list[str]], list[list[int]]],
    ) -> None:
        self.spelled = list(spelled)
        self.names = list(names)
        self.stop_ids = stop_ids
        self._split_texts = split_texts
        self.lead = b" " if self.spell(split_texts(["a"])[0]).startswith(b" ") else b""
        self.inside = Spellings(self.spelled, self.names)
        self.start = self.inside
        if self.lead:
            # A bare token at the beginning reads like the one with the lead, which is the usual one.
            bare = [None if token is None else token.removeprefix(self.lead) or None for token in self.spelled]
            usual = [token is not None and token.startswith(self.lead) for token in self.spelled]
            self.start = Spellings(bare, self.names, usual)

    @classmethod
    def of(cls, encoder: ChatEncoder) -> Vocabulary:
        """The vocabulary of a model's tokenizer.

        Raises:
            UserError: a tokenizer whose tokens are neither byte-level BPE's nor sentencepiece's.
        """
        tokenizer = encoder.tokenizer

        def split_texts(texts: list[str]) -> list[list[int]]:
            led = [encoder.lead + text for text in texts]
            return [list(ids) for ids in tokenizer(led, add_special_tokens=False)["input_ids"]]

        spelled, names = _spellings(tokenizer, encoder)
        return cls(spelled, names, encoder.stop_ids, split_texts)

    def __len__(self) -> int:
        return len(self.spelled)

    def spell(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, the lead included; control tokens and ids beyond the vocabulary have none."""
        return b"".join(self.spelled[index] or b"" for index in ids if index < len(self.spelled))

    def split(self, data: bytes, *, start: bool = False) -> list[int]:
        """Ids of a piece of text, as `split_all`."""
        return next(self.split_all([data], start=start))

    def split_all(self, pieces: Sequence[bytes], *, start: bool = False) -> Iterator[list[int]]:
        """Ids of each piece of text, which stands at the beginning of a text or (`start` false) within one.

        The tokenizer's own where the piece is whole characters and its tokens spell it, else the longest match from
        the left. Bytes that no token has are skipped. No control token is ever among them.
        """
        for begin in range(0, len(pieces), _BATCH):
            block = pieces[begin : begin + _BATCH]
            texts = [_decoded(piece if start else piece.removeprefix(self.lead)) for piece in block]
            known = iter(self._split_texts(asked) if (asked := [text for text in texts if text]) else [])
            for piece, text in zip(block, texts, strict=True):
                ids = next(known) if text else []
                whole = self.lead + piece if start else piece
                yield ids if ids and self.spell(ids) == whole else self._match(piece, start)

    def _match(self, data: bytes, start: bool) -> list[int]:
        ids: list[int] = []
        spellings = self.start if start else self.inside
        while data:
            found = spellings.longest(data)
            if found is None:
                data = data[1:]
                continue
            ids.append(found)
            data = data[len(spellings.bytes[found] or b"") :]
            spellings = self.inside
        return ids


class Spellings:
    """Byte strings by token id, to be looked up by their bytes.

    Args:
        tokens: the bytes of each token; None has none.
        names: of the tokens; of two tokens with the same bytes one that is not named as a byte ("<0x41>") counts.
        usual: of two tokens with the same bytes, one for which this is true counts.
    """

    def __init__(
        self, tokens: Sequence[bytes | None], names: Sequence[str], usual: Sequence[bool] | None = None
    ) -> None:
        self.bytes = list(tokens)
        self.by_bytes: dict[bytes, int] = {}
        ranked = sorted(
            (index for index, token in enumerate(tokens) if token),
            key=lambda index: (not (usual is None or usual[index]), _byte_of(names[index]) is not None, index),
        )
        for index in ranked:
            self.by_bytes.setdefault(tokens[index] or b"", index)
        self._sorted = sorted((tokens[index] or b"", index) for index in ranked)
        self.longest_token = max((len(token) for token, _ in self._sorted), default=0)

    def longest(self, data: bytes) -> int | None:
        """The token with the most bytes that `data` begins with; None if there is none."""
        for length in range(min(self.longest_token, len(data)), 0, -1):
            if (found := self.by_bytes.get(data[:length])) is not None:
                return found
        return None

    def extending(self, prefix: bytes) -> list[int]:
        """Tokens whose bytes begin with `prefix` and go on."""
        found = []
        place = bisect_left(self._sorted, (prefix, -1))
        while place < len(self._sorted) and self._sorted[place][0].startswith(prefix):
            token, index = self._sorted[place]
            if len(token) > len(prefix):
                found.append(index)
            place += 1
        return found


class Table:
    """From the doctor's log-probabilities to the patient's vocabulary, where nothing is pending.

    Attributes:
        leads_to: the patient's token that each of the doctor's stands for, −1 where it stands for none.
        pieces: [V] true on tokens that are scored by their first piece.
        silent: [V] true on tokens of which the doctor says nothing: control tokens but the stop tokens and those that
            the doctor has under the same name. Their log-probability is −log V whatever the doctor says, so that they
            cancel in the ratio form.
    """

    def __init__(self, patient: Vocabulary, doctor: Vocabulary, width: int, *, start: bool) -> None:
        ours, theirs = (patient.start, doctor.start) if start else (patient.inside, doctor.inside)
        self.leads_to = self._first_tokens(patient, doctor, ours, theirs, width, start)
        sources: dict[int, list[int]] = {}
        for token, target in enumerate(self.leads_to):
            if target >= 0:
                sources.setdefault(target, []).append(token)
        self._stops(patient, doctor, sources, width)
        pieces = self._first_pieces(doctor, ours, sources, width, start)
        sharers: dict[int, int] = {}
        for piece in pieces.values():
            sharers[piece] = sharers.get(piece, 0) + 1
        # Columns to gather from: the doctor's tokens, then sums over several, then a constant.
        several = [target for target, tokens in sources.items() if len(tokens) > 1]
        columns = torch.full((width,), len(doctor) + len(several))
        shift = torch.full((width,), -math.log(width))
        for target, tokens in sources.items():
            columns[target], shift[target] = tokens[0], 0.0
        for group, target in enumerate(several):
            columns[target] = len(doctor) + group
        self.pieces = torch.zeros(width, dtype=torch.bool)
        for target, piece in pieces.items():
            columns[target], shift[target] = piece, -math.log(sharers[piece])
            self.pieces[target] = True
        self.silent = columns == len(doctor) + len(several)
        self._columns, self._shift, self._groups = columns, shift, len(several)
        self._members = torch.tensor([token for target in several for token in sources[target]], dtype=torch.long)
        self._group_of = torch.tensor(
            [group for group, target in enumerate(several) for _ in sources[target]], dtype=torch.long
        )
        heard = {token for tokens in sources.values() for token in tokens}
        self._unheard = torch.tensor([token for token in range(len(doctor)) if token not in heard], dtype=torch.long)
        self._doctor_width = len(doctor)

    def apply(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """The doctor's log-probabilities [N, ≥ D] on the patient's vocabulary.

        Returns:
            [N, V] log-probabilities, in nats, and [N] the probability of the doctor's tokens that stand for none of the
            patient's.
        """
        device = logps.device
        parts = [logps[:, : self._doctor_width]]
        if self._groups:
            members = logps[:, self._members.to(device)]
            group_of = self._group_of.to(device).expand(len(logps), -1)
            top = members.new_full((len(logps), self._groups), -torch.inf).scatter_reduce(1, group_of, members, "amax")
            top = top.clamp(min=torch.finfo(top.dtype).min)
            sums = torch.zeros_like(top).scatter_add(1, group_of, (members - top.gather(1, group_of)).exp())
            parts.append(top + sums.log())
        parts.append(logps.new_zeros(len(logps), 1))
        mapped = torch.cat(parts, dim=-1)[:, self._columns.to(device)] + self._shift.to(logps)
        unmapped = logps[:, self._unheard.to(device)].exp().sum(-1)
        if logps.shape[1] > self._doctor_width:
            unmapped = unmapped + logps[:, self._doctor_width :].exp().sum(-1)
        return mapped, unmapped

    @staticmethod
    def _first_tokens(
        patient: Vocabulary, doctor: Vocabulary, ours: Spellings, theirs: Spellings, width: int, start: bool
    ) -> list[int]:
        targets = [-1] * len(doctor)
        named = {name: index for index, name in enumerate(patient.names) if index < width}
        open_tokens: list[int] = []
        for token, data in enumerate(theirs.bytes):
            if token in doctor.stop_ids:
                continue
            # Of tokens with the same bytes, or with none, the one of the same name: so equal vocabularies map token to
            # token.
            twin = named.get(doctor.names[token]) if doctor.names[token] else None
            if twin is not None and ours.bytes[twin] == data and twin not in patient.stop_ids:
                targets[token] = twin
            elif not data:
                continue
            elif (exact := ours.by_bytes.get(data)) is not None:
                targets[token] = exact
            else:
                open_tokens.append(token)
        pieces = [theirs.bytes[token] or b"" for token in open_tokens]
        for token, ids in zip(open_tokens, patient.split_all(pieces, start=start), strict=True):
            targets[token] = ids[0] if ids and ids[0] < width else -1
        return targets

    @staticmethod
    def _stops(patient: Vocabulary, doctor: Vocabulary, sources: dict[int, list[int]], width: int) -> None:
        """A stop token is the doctor's of the same name; one without such a twin takes all of its stop tokens."""
        named = {doctor.names[token]: token for token in doctor.stop_ids if token < len(doctor)}
        for stop in patient.stop_ids:
            if stop < width:
                twin = named.get(patient.names[stop]) if stop < len(patient) else None
                sources[stop] = sorted(named.values()) if twin is None else [twin]

    @staticmethod
    def _first_pieces(
        doctor: Vocabulary, ours: Spellings, sources: dict[int, list[int]], width: int, start: bool
    ) -> dict[int, int]:
        left = [token for token, data in enumerate(ours.bytes[:width]) if data and token not in sources]
        split = doctor.split_all([ours.bytes[token] or b"" for token in left], start=start)
        return {token: ids[0] for token, ids in zip(left, split, strict=True) if ids}


class Translation:
    """How the doctor's tokens read in the patient's vocabulary.

    Args:
        patient, doctor: the vocabularies.
        width: V, of the patient's logits; it may exceed its vocabulary.

    Raises:
        UserError: the doctor's vocabulary lacks bytes, so it cannot read every text.
    """

    def __init__(self, patient: Vocabulary, doctor: Vocabulary, width: int) -> None:
        absent = [value for value in _NEEDED_BYTES if bytes([value]) not in doctor.inside.by_bytes]
        if absent:
            raise UserError(
                f"the doctor's vocabulary has no token for {len(absent)} of the bytes that texts are made of (the "
                f"first is 0x{absent[0]:02x}), so it cannot read every text; choose a doctor whose tokenizer falls "
                "back to bytes"
            )
        self.patient, self.doctor, self.width = patient, doctor, width
        self.inside = Table(patient, doctor, width, start=False)
        led = bool(patient.lead or doctor.lead)
        self.start = Table(patient, doctor, width, start=True) if led else self.inside
        self._continuations: dict[tuple[Any, ...], tuple[list[int], list[int]]] = {}

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the patient's text tokens: "direct" (a token of the doctor's leads to it) and "first_piece"."""
        texts = {index for index, token in enumerate(self.patient.spelled[: self.width]) if token}
        pieces = int(self.inside.pieces.sum()) / max(1, len(texts))
        return {"direct": len(texts.intersection(self.inside.leads_to)) / max(1, len(texts)), "first_piece": pieces}

    def read(self, data: bytes, text_ids: Callable[[str], list[int]]) -> list[int]:
        """The doctor's ids of an answer's bytes so far, which may end in, or contain, a broken character.

        Args:
            data: without the patient's lead.
            text_ids: the doctor's `ChatEncoder.text_ids`.
        """
        ids: list[int] = []
        while data:
            try:
                text, broken, rest = data.decode(), b"", b""
            except UnicodeDecodeError as error:
                text = data[: error.start].decode()
                broken, rest = data[error.start : error.end], data[error.end :]
            if text:
                # The lead belongs to the beginning of an answer, not to what follows a broken character.
                ids += self.doctor.split(text.encode()) if ids else text_ids(text)
            ids += self.doctor.split(broken, start=not ids) if broken else []
            data = rest
        return ids

    def continuations(
        self, emitted: Sequence[int], before: bytes, tail: bytes, *, start: bool, first: bool
    ) -> tuple[list[int], list[int]]:
        """The doctor's tokens that begin with `tail` and go on, and that agree with how the patient has split the text.

        Args:
            emitted: the patient's last tokens; they spell `before` + `tail`.
            before: bytes that they have before the place at which the doctor's token begins.
            tail: bytes from there on.
            start: whether `emitted` are all tokens of the answer.
            first: whether the doctor's token would be its first of the answer.

        Returns:
            The tokens, and for each the patient's token that comes after `emitted` then. None where too many tokens
            begin with `tail`, which happens only where it is a byte or two long and ends inside a patient's token.
        """
        key = (tuple(emitted), before, tail, start, first)
        if key not in self._continuations:
            if len(self._continuations) >= _KEPT_CONTINUATIONS:
                self._continuations.clear()
            spellings = self.doctor.start if first else self.doctor.inside
            tokens = spellings.extending(tail)
            if not before:
                # Else the patient would have split the token otherwise.
                leads_to = (self.start if start else self.inside).leads_to
                tokens = [token for token in tokens if leads_to[token] == emitted[0]]
            if len(tokens) > _MOST_CANDIDATES:
                tokens = []
            texts = [before + (spellings.bytes[token] or b"") for token in tokens]
            found: tuple[list[int], list[int]] = ([], [])
            count = len(emitted)
            for token, ids in zip(tokens, self.patient.split_all(texts, start=start), strict=True):
                if len(ids) > count and ids[:count] == list(emitted) and ids[count] < self.width:
                    found[0].append(token)
                    found[1].append(ids[count])
            self._continuations[key] = found
        return self._continuations[key]


def _spellings(tokenizer: Any, encoder: ChatEncoder) -> tuple[list[bytes | None], list[str]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kinds = _decoder_kinds(json.loads(backend.to_str()).get("decoder")) if backend is not None else set()
    read: Callable[[str], bytes | None]
    added: Callable[[str], bytes]
    if "ByteLevel" in kinds:
        # Whoever adds a token writes it as it reads.
        read, added = _byte_level_reader(), str.encode
    elif kinds & {"ByteFallback", "Metaspace"}:
        # The decoder makes spaces of "▁" wherever a token is from.
        read = added = _sentencepiece_bytes
    else:
        raise UserError(
            f"the tokens of a {type(tokenizer).__name__} cannot be read as bytes: expected byte-level BPE or "
            "sentencepiece, in tokenizer.json; a doctor of another vocabulary needs such tokenizers on both sides"
        )
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1
    spelled: list[bytes | None] = [None] * size
    names = [""] * size
    for name, index in vocabulary.items():
        spelled[index], names[index] = read(name), name
    for index, token in tokenizer.added_tokens_decoder.items():
        written = token.content in encoder.template and len(token.content) > 1 and not token.content.isspace()
        spelled[index] = None if token.special or written else added(token.content)
    for index in {*tokenizer.all_special_ids, *encoder.stop_ids}:
        if index < size:
            spelled[index] = None
    return spelled, names


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {str(decoder["type"])}.union(*map(_decoder_kinds, decoder.get("decoders", [])))


def _byte_level_reader() -> Callable[[str], bytes | None]:
    """Byte-level BPE writes printable bytes as themselves and the others as the characters from U+0100 on (GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(shown))
    letters = {chr(value): value for value in shown} | {chr(256 + n): value for n, value in enumerate(hidden)}

    def read(name: str) -> bytes | None:
        values = [letters.get(letter) for letter in name]
        return None if None in values else bytes(value for value in values if value is not None)

    return read


def _sentencepiece_bytes(name: str) -> bytes:
    value = _byte_of(name)
    return name.replace(_SPACE_MARK, " ").encode() if value is None else bytes([value])


def _byte_of(name: str) -> int | None:
    """The byte that a token named as sentencepiece's "<0x0A>" stands for."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return int(name[3:5], 16)
        except ValueError:
            return None
    return None


def _decoded(data: bytes) -> str:
    """The text of whole characters, "" for anything else."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""
