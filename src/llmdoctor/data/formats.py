"""What a preference pair is, and how a row of each known data format becomes one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, TypeGuard, cast, get_args

from llmdoctor.errors import UserError

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


class RowError(Exception):
    """A row that gives no pair. `malformed`: it breaks its format; else it is well formed but teaches nothing."""

    def __init__(self, reason: str, detail: str, *, malformed: bool = False) -> None:
        self.reason = reason
        self.detail = detail
        self.malformed = malformed
        super().__init__(detail)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, of which one was preferred."""

    prompt: tuple[Message, ...]
    """The conversation up to and including the last user turn."""
    chosen: str
    rejected: str
    chosen_complete: bool = True
    """False: the text was cut at a length limit, so it has no end of turn."""
    rejected_complete: bool = True
    dimension: str = ""
    """What was judged, such as `helpful`; empty where the data do not say."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, where: str = "row") -> PreferencePair:
        """Read a row of the `standard` format; a UserError names `where`."""
        try:
            return _standard(row)[0]
        except RowError as error:
            raise UserError(f"{where} {error.detail}") from None

    def to_row(self) -> dict[str, Any]:
        """The row that `from_row` reads back: conversational, with the same columns for every pair."""
        return {
            "prompt": [dict(message) for message in self.prompt],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
            "chosen_complete": self.chosen_complete,
            "rejected_complete": self.rejected_complete,
            "dimension": self.dimension,
        }


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How rows of one format are recognised and read."""

    columns: str
    parse: Callable[[Mapping[str, Any]], list[PreferencePair]]
    published: bool
    """A published set, which nobody can clean at its source: its unusable pairs are skipped unless told otherwise."""


def detect_format(row: Mapping[str, Any]) -> str:
    """Name of the format whose columns `row` has; RowError if there is none."""
    if {"response_0", "response_1"} <= row.keys():
        return "pku"
    if not {"prompt", "chosen", "rejected"} & row.keys():
        known = "; ".join(f"{name}: {entry.columns}" for name, entry in FORMATS.items())
        raise RowError("unknown columns", f"is of no known format ({known}), got {_columns(row)}", malformed=True)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if {"score_chosen", "score_rejected"} <= row.keys() and isinstance(chosen, list):
        return "ultrafeedback"
    if "prompt" not in row and all(isinstance(text, str) and _TURN.match(text) for text in (chosen, rejected)):
        return "hh"
    return "standard"


def read_messages(value: Any, what: str) -> tuple[Message, ...]:
    """Check that `value` is a list of messages, and keep their role and content; `what` names it in the RowError."""
    if not isinstance(value, list) or not value:
        raise _wrong(what, value, "text or a list of messages")
    messages = []
    for index, turn in enumerate(value):
        place = f"{what}[{index}]"
        if not isinstance(turn, Mapping):
            raise _wrong(place, turn, "a message with role and content")
        role: Any = turn.get("role")
        if role not in get_args(Role):
            roles = ", ".join(get_args(Role))
            raise RowError("wrong type", f"has the role {role!r} in `{place}`, expected one of {roles}", malformed=True)
        messages.append(_message(role, read_text(turn.get("content"), f"{place}.content")))
    return tuple(messages)


def read_prompt(value: Any, what: str = "prompt") -> tuple[Message, ...]:
    """A prompt given as text or as messages that end with a user turn that says something.

    Text is one user turn, or a dialogue as HH-RLHF writes it, which ends where the assistant is to speak.
    """
    if _is_open_dialogue(value):
        prompt = parse_dialogue(value.rstrip().removesuffix("Assistant:"), what)
    else:
        prompt = (_message("user", value),) if isinstance(value, str) else read_messages(value, what)
    for message in prompt:
        read_text(message["content"], what)
    if prompt[-1]["role"] != "user":
        role = prompt[-1]["role"]
        raise RowError(
            "wrong type", f"has a `{what}` that ends with a turn of the {role}, not the user", malformed=True
        )
    if not prompt[-1]["content"].strip():
        raise RowError("empty prompt", f"has an empty `{what}`")
    return prompt


def with_system(prompt: tuple[Message, ...], system: Any) -> tuple[Message, ...]:
    """The prompt behind what a `system` column says, if anything; RowError where the prompt has another system text."""
    if system is None or not read_text(system, "system").strip():
        return prompt
    if prompt[0]["role"] != "system":
        return (_message("system", system), *prompt)
    if prompt[0]["content"].strip() != system.strip():
        raise RowError(
            "prompts differ", "has a `system` that is not the system message of its `prompt`; keep one of them"
        )
    return prompt


def read_text(value: Any, what: str) -> str:
    """Check that `value` is text that a tokenizer can take; `what` names it in the RowError."""
    if not isinstance(value, str):
        raise _wrong(what, value, "text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("broken Unicode", f"has half of a surrogate pair in `{what}`", malformed=True) from None
    return value


def _standard(row: Mapping[str, Any]) -> list[PreferencePair]:
    """Columns prompt, chosen and rejected, as text or messages; the prompt may also stand in chosen and rejected.

    A column `system` stands in front of the prompt.
    """
    implicit = isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list)
    _require(row, ("chosen", "rejected") if implicit else ("prompt", "chosen", "rejected"))
    chosen_lead, chosen = _response(row["chosen"], "chosen")
    rejected_lead, rejected = _response(row["rejected"], "rejected")
    if chosen_lead and rejected_lead and chosen_lead != rejected_lead:
        raise _prompts_differ()
    prompt = _joined_prompt(row.get("prompt"), chosen_lead or rejected_lead, _columns(row))
    if _is_open_dialogue(row.get("prompt")):
        # The space behind `Assistant:`, which no chat template wants.
        chosen, rejected = chosen.lstrip(), rejected.lstrip()
    pair = _pair(
        with_system(prompt, row.get("system")),
        chosen,
        rejected,
        dimension=read_text(row.get("dimension") or "", "dimension"),
    )
    chosen_complete, rejected_complete = _flag(row, "chosen_complete"), _flag(row, "rejected_complete")
    return [replace(pair, chosen_complete=chosen_complete, rejected_complete=rejected_complete)]


def _joined_prompt(given: Any, lead: tuple[Message, ...], columns: str) -> tuple[Message, ...]:
    """The prompt column, or the turns before the answers, or both where they agree."""
    if given is None:
        if not lead:
            detail = f"has no `prompt` and no turn before the answers; got {columns}"
            raise RowError("missing column", detail, malformed=True)
        return lead
    prompt = read_prompt(given)
    if not lead:
        return prompt
    # Published sets repeat one user turn of a conversation as a plain `prompt`.
    repeats = [message["content"].strip() for message in lead if message["role"] == "user"]
    if prompt != lead and not (isinstance(given, str) and given.strip() in repeats):
        raise RowError("prompts differ", "has a `prompt` that is not the one in its conversations")
    return lead


def _response(value: Any, what: str) -> tuple[tuple[Message, ...], str]:
    """Turns before the answer (none for plain text or a lone answer), and the answer."""
    if isinstance(value, str):
        return (), read_text(value, what)
    messages = read_messages(value, what)
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        detail = f"has a `{what}` that ends with a turn of the {role}, not the assistant"
        raise RowError("wrong type", detail, malformed=True)
    return messages[:-1], messages[-1]["content"]


_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


_OPEN_DIALOGUE = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)


def _is_open_dialogue(value: Any) -> TypeGuard[str]:
    """Whether a prompt is a text dialogue up to where the assistant is to speak."""
    return isinstance(value, str) and _OPEN_DIALOGUE.fullmatch(value) is not None


def parse_dialogue(text: str, what: str = "dialogue") -> tuple[Message, ...]:
    r"""Split HH-RLHF's `\n\nHuman: …\n\nAssistant: …` into turns, without the white space around each.

    Turns of one speaker in a row become one (the real files have them, and chat templates refuse them); `Human:`
    without a blank line before it is text. RowError if the text does not begin with a turn of the human.
    """
    before, *parts = _TURN.split(text)
    if before or not parts or parts[0] != "Human":
        raise RowError("not a dialogue", f"has a `{what}` that does not begin with `Human:`", malformed=True)
    turns: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role: Role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            # One line break: a blank line before a quoted `Human:` would make it a turn.
            turns[-1]["content"] = f"{turns[-1]['content']}\n{content.strip()}".strip()
        else:
            turns.append(_message(role, content.strip()))
    return tuple(turns)


def _hh(row: Mapping[str, Any]) -> list[PreferencePair]:
    """Anthropic's HH-RLHF: two whole dialogues that share all but the last answer."""
    _require(row, ("chosen", "rejected"))
    dialogues = []
    for name in ("chosen", "rejected"):
        dialogue = parse_dialogue(read_text(row[name], name), name)
        if dialogue[-1]["role"] != "assistant":
            raise RowError("no answer", f"has a `{name}` that ends with a turn of the human")
        dialogues.append(dialogue)
    chosen, rejected = dialogues
    if chosen[:-1] != rejected[:-1]:
        raise _prompts_differ()
    return [_pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])]


def _pku(row: Mapping[str, Any]) -> list[PreferencePair]:
    """PKU-SafeRLHF: two responses with a label for helpfulness, one for harmlessness, or one for both together."""
    _require(row, ("prompt", "response_0", "response_1"))
    if "safer_response_id" in row and "better_response_id" in row:
        labels = {"helpful": "better_response_id", "harmless": "safer_response_id"}
    elif "safer_response_id" in row:
        labels = {"harmless": "safer_response_id"}
    else:
        # The single-dimension edition weighs help against harm in one label, so it is neither of the two.
        labels = {"": "better_response_id"}
    _require(row, tuple(labels.values()))
    responses = [read_text(row[name], name) for name in ("response_0", "response_1")]
    prompt = read_prompt(row["prompt"])
    pairs = []
    for dimension, name in labels.items():
        best = row[name]
        if isinstance(best, bool) or best not in (0, 1):
            raise _wrong(name, best, "0 or 1")
        pairs.append(_pair(prompt, responses[int(best)], responses[1 - int(best)], dimension=dimension))
    return pairs


def _ultrafeedback(row: Mapping[str, Any]) -> list[PreferencePair]:
    """UltraFeedback, binarized: conversations with a score each; a pair of equal scores prefers nothing."""
    pairs = _standard(row)
    _require(row, ("score_chosen", "score_rejected"))
    scores = [row[name] for name in ("score_chosen", "score_rejected")]
    for name, score in zip(("score_chosen", "score_rejected"), scores, strict=True):
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise _wrong(name, score, "a number")
    if not scores[0] > scores[1]:
        detail = f"has a chosen response that does not score above the rejected one ({scores[0]} and {scores[1]})"
        raise RowError("no higher score", detail)
    return pairs


FORMATS: dict[str, RowFormat] = {
    "standard": RowFormat("prompt, chosen, rejected", _standard, published=False),
    "hh": RowFormat("chosen, rejected (`Human:` and `Assistant:` dialogues)", _hh, published=True),
    "pku": RowFormat("prompt, response_0, response_1, better_response_id, safer_response_id", _pku, published=True),
    "ultrafeedback": RowFormat(
        "chosen, rejected (messages), score_chosen, score_rejected", _ultrafeedback, published=True
    ),
}


def _pair(prompt: Sequence[Message], chosen: str, rejected: str, *, dimension: str = "") -> PreferencePair:
    """Build a pair that there is something to learn from; RowError otherwise."""
    checked = read_prompt(list(prompt))
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise RowError("empty response", f"has an empty `{name}` response")
    if chosen.strip() == rejected.strip():
        raise RowError("identical responses", "has identical `chosen` and `rejected` responses")
    return PreferencePair(checked, chosen, rejected, dimension=dimension)


def _message(role: str, content: str) -> Message:
    return {"role": cast(Role, role), "content": content}


def _flag(row: Mapping[str, Any], name: str) -> bool:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value is not False


def _require(row: Mapping[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        absent = " and no ".join(f"`{name}`" for name in missing)
        detail = f"has no {absent}; expected {', '.join(names)}, got {_columns(row)}"
        raise RowError("missing column", detail, malformed=True)


def _columns(row: Mapping[str, Any]) -> str:
    return f"columns {', '.join(map(str, row))}" if row else "no columns"


def _wrong(what: str, value: Any, expected: str) -> RowError:
    kinds = {type(None): "null", dict: "an object", list: "a list" if value else "an empty list", str: "text"}
    got = kinds.get(type(value)) or str(value).lower()
    return RowError("wrong type", f"has {got} as `{what}`, expected {expected}", malformed=True)


def _prompts_differ() -> RowError:
    return RowError("prompts differ", "has responses to two different prompts")
