"""Errors that are for the user: what was wrong, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave us; the command line prints it as one line and exits with status 2."""


Settings = Mapping[str, Mapping[str, Any]]
"""What stands behind fingerprints, by their names."""


class FingerprintMismatch(UserError):
    """Something on disk was made from other inputs than the ones at hand.

    Args:
        what: what is there.
        stored, current: fingerprints of what it was made from, and of what there is now.
        remedy: what the user may do.
        was, now: the settings behind some of them. Where both sides have them they are told instead: a fingerprint
            tells nobody which setting to change.
    """

    def __init__(
        self,
        what: str,
        stored: Mapping[str, str],
        current: Mapping[str, str],
        remedy: str,
        was: Settings | None = None,
        now: Settings | None = None,
    ) -> None:
        self.remedy = remedy
        was, now = was or {}, now or {}
        told = [
            name for name in was.keys() & now.keys() if stored.get(name) != current.get(name) and was[name] != now[name]
        ]
        self.stored = stored = _spelled_out(stored, was, told)
        self.current = current = _spelled_out(current, now, told)
        keys = [key for key in sorted({*stored, *current}) if stored.get(key) != current.get(key)]
        sides = "; ".join(
            f"{key}: stored {stored.get(key, '(absent)')}, now {current.get(key, '(absent)')}" for key in keys
        )
        super().__init__(f"{what} was made from other inputs ({sides}). {remedy}")


def _spelled_out(fingerprints: Mapping[str, str], settings: Settings, names: Sequence[str]) -> dict[str, str]:
    found = {name: value for name, value in fingerprints.items() if name not in names}
    return found | {name: str(value) for group in names for name, value in settings[group].items()}


class TrainingDiverged(UserError):
    """Loss or gradient stopped being finite; the last good weights have been kept."""


def first_line(error: BaseException) -> str:
    """Of a library's error, the first line that says something; its type's name if none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
