"""What a chat judge is asked, and what its reply says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from enum import StrEnum
from importlib.resources import files
from pathlib import Path

from llmdoctor.data.formats import Message
from llmdoctor.errors import UserError
from llmdoctor.files import digest

PLACEHOLDERS = ("prompt", "first", "second")

REMINDER = (
    'Your last reply held no verdict that could be read. End your reply with one line, {"verdict": "…"}, '
    "with A, B or tie in place of the dots."
)
"""Put behind the question when it is asked again: at temperature 0 the same words would bring the same reply."""

_PLACEHOLDER = re.compile(r"\{(prompt|first|second)\}")
_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_LAST_LINE = re.compile(
    r"(?:\bverdict\b\W*|\[\[)(?:(?:answer|assistant|response|a(?= tie))[ _])?(A|B|C|tie)\W*\Z", re.IGNORECASE
)
_REFUSAL = re.compile(
    r"\A\W*(?:i(?:'| a)m (?:very |so |really )?sorry|sorry|i apologi[sz]e|my apologies)\b"
    r"|\bi(?: must| have to)? (?:decline|refuse)\b"
    r"|\bi(?: can(?:no|')t| can not| won't| will not|(?:'| a)m (?:unable|not able) to)\W+"
    # Not "choose" or "compare": who cannot tell two answers apart has not refused, and is asked once more.
    r"(?:\w+ly )?(?:help|assist|comply|fulfil|provide|engage|take part|participate|continue|discuss"
    r"|do (?:that|this))\b",
    re.IGNORECASE,
)
_VALUES = {"a": "A", "b": "B", "tie": "tie", "c": "tie", "draw": "tie", "equal": "tie"}


class Reading(StrEnum):
    """What a reply says: the answer shown first (A) or second (B) is better, or neither; or why it says nothing."""

    A = "A"
    B = "B"
    TIE = "tie"
    REFUSED = "refused"
    UNPARSED = "unparsed"


class JudgePrompt:
    """The question of a chat judge: a text file with `{prompt}`, `{first}` and `{second}` in it.

    Nothing else in the file is special, and text put in for one placeholder is never searched for another. It must ask
    for a verdict that `read_verdict` reads.

    Args:
        path: the file, UTF-8; the one that ships if None.

    Raises:
        UserError: no readable file, or a placeholder that is not in it.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.text = _shipped() if path is None else _read(Path(path))
        missing = [f"{{{name}}}" for name in PLACEHOLDERS if f"{{{name}}}" not in self.text]
        if missing:
            needed = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise UserError(
                f"judge prompt {path}: {' and '.join(missing)} missing; the conversation and both answers are put in "
                f"for {needed}"
            )
        self.fingerprint = digest(self.text)

    def render(self, prompt: Sequence[Message], first: str, second: str) -> str:
        """The question with `first` shown as A and `second` as B."""
        values = {"prompt": conversation(prompt), "first": first, "second": second}
        return _PLACEHOLDER.sub(lambda found: values[found[1]], self.text)


def conversation(messages: Sequence[Message]) -> str:
    """A prompt as plain text: a single user message as it is, else every turn under the name of who speaks."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def read_verdict(text: str) -> Reading:
    """The verdict in a judge's reply, whatever stands around it.

    Read is the last JSON object with the key `verdict`, in a code fence or not; else a last line that ends in
    `Verdict: A` or `[[A]]`. Values, in any case: A, B, tie (also C, draw, equal). Reasoning in `<think>` tags is not
    searched. A reply without a verdict that declines to judge is a refusal.
    """
    said = _THINKING.sub("", text).strip().replace("’", "'")
    value = _json_verdict(said) or _tagged_verdict(said)
    if value:
        return Reading(value)
    return Reading.REFUSED if _REFUSAL.search(said[:400]) else Reading.UNPARSED


def _json_verdict(text: str) -> str | None:
    decoder = json.JSONDecoder()
    for start in reversed([found.start() for found in re.finditer(r"\{", text)]):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            lower = {key.lower(): entry for key, entry in value.items()}
            if "verdict" in lower:
                return _VALUES.get(_bare(lower["verdict"]))
    return None


def _tagged_verdict(text: str) -> str | None:
    lines = text.strip("`* \n").splitlines()
    found = _LAST_LINE.search(lines[-1]) if lines else None
    return _VALUES[found[1].lower()] if found else None


def _bare(value: object) -> str:
    return (
        re.sub(r"\A(?:answer|assistant|response)[ _]", "", value.strip(" []*.").lower())
        if isinstance(value, str)
        else ""
    )


def _shipped() -> str:
    return files("llmdoctor.evaluation").joinpath("templates", "judge.txt").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"judge prompt {path}: cannot be read ({reason})") from error
