"""Conversations to token ids. The only place that turns text into tokens.

Shapes: none here; everything is a plain list of token ids.

Text from the data never becomes a control token: a user who types the end-of-turn marker must not end the turn.
Where a message contains the spelling of a control token, the rendered conversation is cut inside that spelling and
the pieces are tokenised apart, so no tokenizer can see the marker whole. Conversations without such text are
tokenised exactly as the model's own chat template is meant to be.

Markup that the model itself says within its turns, such as `<think>`, is a token where the assistant says it, and text
where the user or the system does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from llmdoctor.errors import UserError
from llmdoctor.files import digest

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Human: ' + message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] }}{{ eos_token }}{{ '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For base models whose tokenizer has no chat template, after the token that it begins every text with, if any.

A prompt ends without the space that answers begin with, as tokens have their space in front (`ChatEncoder.lead`).
"""

_SENTINELS = "".join(chr(code) for code in range(0xE000, 0xE010))


@dataclass(frozen=True, slots=True)
class Completion:
    """A response as token ids. `terminal` says that the last id is the end-of-turn token: the response is whole."""

    ids: list[int]
    terminal: bool


class ChatEncoder:
    """Prompts and completions of one tokenizer as token ids, joined by id and never re-tokenised as one string.

    Args:
        tokenizer: any transformers tokenizer; `chat_template` is used where it has one, else `PLAIN_TEMPLATE`.
        eos_ids: ids at which the model's own generation stops; the tokenizer's `eos_token_id` if empty.

    Attributes:
        lead: the space that an answer's tokens begin with and its text does not: of `PLAIN_TEMPLATE`, where the
            tokenizer does not add one by itself. An answer whose text begins with white space has no other.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.has_own_template = bool(tokenizer.chat_template)
        self.template: str = tokenizer.get_chat_template() if self.has_own_template else _plain_template(tokenizer)
        self._spaces_texts = _spaces_texts(tokenizer)
        self.lead = "" if self.has_own_template or self._spaces_texts else " "
        stops = [int(i) for i in eos_ids if i is not None]
        if not stops and tokenizer.eos_token_id is not None:
            stops = [int(tokenizer.eos_token_id)]
        if not stops:
            raise UserError("the tokenizer names no end-of-sequence token, so a complete response cannot be marked")
        self.end_of_turn = self._find_end_of_turn(stops)
        self.stop_ids = frozenset({*stops, self.end_of_turn})
        example = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        # Templates also compose markers ('<|' + role + '|>'), so both its source and what it writes are looked at.
        control = _control_spellings(tokenizer, self.template + self._render(example), self.stop_ids)
        always = _control_spellings(tokenizer, self._turn_markers(example), self.stop_ids)
        self._markup = control - always
        self._control, self._answer_control = _starts(control), _starts(control & always)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids that stand for a byte each where the vocabulary has no piece of text; of byte-level tokenizers none."""
        vocabulary = self.tokenizer.get_vocab()
        return frozenset(number for token, number in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", token))

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any) -> ChatEncoder:
        """The encoder whose stop tokens are the model's generation config's."""
        eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        return cls(tokenizer, eos if isinstance(eos, list) else [] if eos is None else [eos])

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]], system: str | None = None) -> list[int]:
        """Ids of the conversation up to where the assistant starts to speak.

        `system` replaces a system message that the conversation begins with. Templates that refuse or drop the
        system role get the text in front of the first user turn.

        Raises:
            UserError: no user turn at the end, or a conversation that the template refuses.
        """
        turns = [dict(message) for message in messages]
        if not turns or turns[-1]["role"] != "user":
            raise UserError("a prompt must end with a user turn")
        if system is not None:
            if turns[0]["role"] == "system":
                turns = turns[1:]
            turns = [{"role": "system", "content": system}, *turns]
        return self._encode(turns)

    def completion(self, text: str, complete: bool, max_length: int | None = None) -> Completion:
        """Ids of a response's text, with the end-of-turn token if it is complete and fits into `max_length`."""
        ids = self.text_ids(text)
        if complete:
            ids = [*ids, self.end_of_turn]
        if max_length is not None and len(ids) > max_length:
            return Completion(ids[:max_length], terminal=False)
        return Completion(ids, terminal=complete)

    def answered(
        self, prompts: Sequence[Sequence[Mapping[str, Any]]], texts: Sequence[str], complete: bool | Sequence[bool]
    ) -> list[tuple[list[int], list[int]]]:
        """Ids of each prompt and of its answer; `complete` says, for all or for each, whether answers end there."""
        ends = [complete] * len(texts) if isinstance(complete, bool) else complete
        return [
            (self.prompt_ids(prompt), self.completion(text, end).ids)
            for prompt, text, end in zip(prompts, texts, ends, strict=True)
        ]

    def text_ids(self, text: str) -> list[int]:
        """Ids of an answer's text, or of its beginning, with the `lead`.

        Of control tokens only the model's own markup (`<think>`) is recognised: the text is the assistant's.
        """
        led = self.lead + text if text and not text[0].isspace() else text
        return self._ids(self._guard(led, mark := _unused_sentinel([text]), self._answer_control), mark)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without `lead` and the stop tokens at its end; other control tokens are shown as they are."""
        end = len(ids)
        while end and ids[end - 1] in self.stop_ids:
            end -= 1
        text = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)[self._lead_in(text) :]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Surface text of each token; joined they are the decoded text. A split character comes with its last token."""
        texts: list[str] = []
        begin = written = 0
        for end in range(1, len(ids) + 1):
            # From the last piece on only, and with it: some tokenizers treat the beginning of a text differently.
            known = self.tokenizer.decode(list(ids[begin:written]), clean_up_tokenization_spaces=False)
            grown = self.tokenizer.decode(list(ids[begin:end]), clean_up_tokenization_spaces=False)
            if grown.endswith("\ufffd") and end < len(ids):
                texts.append("")
                continue
            texts.append(grown[len(known) :])
            begin, written = written, end
        if self._lead_in("".join(texts)):
            first = next(place for place, text in enumerate(texts) if text)
            texts[first] = texts[first].removeprefix(self.lead)
        return texts

    def fingerprint(self) -> str:
        """Fingerprint of the template, the end-of-turn token, the lead and the model's own markup."""
        parts: list[Any] = [self.template, self.end_of_turn, sorted(self.stop_ids)]
        if self.lead:
            parts.append({"lead": self.lead})
        if self._markup:
            parts.append({"markup": sorted(self._markup)})
        return digest(parts)

    def _lead_in(self, text: str) -> int:
        """Length of the lead that `text` begins with: none before other white space, with which no lead is written."""
        return len(self.lead) if self.lead and text.startswith(self.lead) and not text[1:2].isspace() else 0

    def _encode(self, turns: list[dict[str, str]]) -> list[int]:
        mark = _unused_sentinel([turn["content"] for turn in turns])
        return self._ids(self._render([self._guarded(turn, mark) for turn in turns]), mark)

    def _guarded(self, turn: dict[str, str], mark: str) -> dict[str, str]:
        content = turn["content"]
        if turn["role"] != "assistant":
            return {**turn, "content": self._guard(content, mark, self._control)}
        # The template writes the lead.
        return {**turn, "content": self._guard(content[self._lead_in(content) :], mark, self._answer_control)}

    def _ids(self, text: str, mark: str) -> list[int]:
        """Ids of text that is cut at every `mark`."""
        ids: list[int] = []
        for place, piece in enumerate(filter(None, text.split(mark))):
            ids += self._inner_ids(piece) if place and self._spaces_texts else self._piece_ids(piece)
        return ids

    def _piece_ids(self, piece: str) -> list[int]:
        return list(self.tokenizer(piece, add_special_tokens=False)["input_ids"])

    def _inner_ids(self, piece: str) -> list[int]:
        """Ids of a piece of a text as it reads within one, for a tokenizer that puts a space before every text."""
        for before in ("\n", "0", ":"):
            known, both = self._piece_ids(before), self._piece_ids(before + piece)
            if known and both[: len(known)] == known:
                return both[len(known) :]
        raise UserError(f"the tokenizer cannot read {piece!r:.40} by itself, as the text of a control token must be")

    def _render(self, turns: list[dict[str, str]]) -> str:
        system = turns[0]["content"] if turns[0]["role"] == "system" else ""
        refusal: TemplateError | str = "it drops the system message"
        try:
            rendered = str(self._apply(turns))
            if system.strip() in rendered:
                return rendered
        except TemplateError as error:
            refusal = error
        if system and turns[1]["role"] == "user":
            first = {**turns[1], "content": f"{system}\n\n{turns[1]['content']}"}
            try:
                return str(self._apply([first, *turns[2:]]))
            except TemplateError as error:
                refusal = error
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"the chat template refuses a conversation of the roles {roles}: {refusal}")

    def _apply(self, turns: list[dict[str, str]]) -> Any:
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )

    @staticmethod
    def _guard(text: str, mark: str, control: re.Pattern[str] | None) -> str:
        _check_unicode(text)
        if control is None:
            return text
        cuts = sorted({match.start() + 1 for match in control.finditer(text)})
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return mark.join(pieces)

    def _turn_markers(self, example: list[dict[str, str]]) -> str:
        """What the template writes around turns; all that it could write, if it takes no turn of the assistant.

        Not what it writes where the assistant begins to speak: that may be the model's own markup.
        """
        turns = [*example, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Again?"}]
        try:
            asked, answer, rest = self._render(turns).partition("Hello")
        except UserError:
            answer = ""
        if not answer:
            return self.template + self._render(example)
        return asked.rpartition("Hi")[0] + rest.rpartition("Again?")[0]

    def _find_end_of_turn(self, stops: list[int]) -> int:
        """The stop token that the template itself writes after an assistant's turn."""
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        try:
            rendered = str(self.tokenizer.apply_chat_template(turns, chat_template=self.template, tokenize=False))
        except TemplateError:
            return stops[0]
        tail = self.tokenizer(rendered.rsplit("Hello", 1)[-1], add_special_tokens=False)["input_ids"]
        return next((int(i) for i in tail if int(i) in stops), stops[0])


def _plain_template(tokenizer: Any) -> str:
    """`PLAIN_TEMPLATE`; with the beginning-of-sequence token where the tokenizer itself puts it before every text."""
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + PLAIN_TEMPLATE if begins else PLAIN_TEMPLATE


def _spaces_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space before every text, as sentencepiece does."""
    ids = [number for text in (":", "Yes") for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).endswith(" Yes")


def _control_spellings(tokenizer: Any, written: str, stop_ids: frozenset[int]) -> set[str]:
    """Control tokens: the special ones, stop tokens, and the added ones that the template has in `written`."""
    spellings = {str(token) for token in tokenizer.all_special_tokens}
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special or index in stop_ids or token.content in written:
            spellings.add(token.content)
    return {spelling for spelling in spellings if len(spelling) > 1 and not spelling.isspace()}


def _starts(spellings: set[str]) -> re.Pattern[str] | None:
    """Matches where one of the spellings starts (overlaps included)."""
    if not spellings:
        return None
    longest_first = sorted(spellings, key=lambda spelling: (-len(spelling), spelling))
    return re.compile("(?=" + "|".join(re.escape(spelling) for spelling in longest_first) + ")")


def _check_unicode(text: str) -> None:
    """Refuse text that no tokenizer takes: a typed byte that is not UTF-8 arrives as half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{text!r:.60} is not text in UTF-8, which prompts and answers must be") from None


def _unused_sentinel(texts: Sequence[str]) -> str:
    """A private-use character that none of the texts contains."""
    used = set("".join(texts))
    for mark in _SENTINELS:
        if mark not in used:
            return mark
    raise UserError("a text uses every private-use character from U+E000 to U+E00F; remove one of them")
