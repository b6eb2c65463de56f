"""Errors that are for the user: what was wrong, what was expected, what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave us; the command line prints it as one line and exits with status 2."""


class FingerprintMismatch(UserError):
    """Something on disk was made from other inputs than the ones at hand."""

    def __init__(self, what: str, stored: dict[str, str], current: dict[str, str], remedy: str) -> None:
        self.stored = stored
        self.current = current
        keys = [key for key in sorted({*stored, *current}) if stored.get(key) != current.get(key)]
        sides = "; ".join(
            f"{key}: stored {stored.get(key, '(absent)')}, now {current.get(key, '(absent)')}" for key in keys
        )
        super().__init__(f"{what} was made from other inputs ({sides}). {remedy}")


class TrainingDiverged(UserError):
    """Loss or gradient stopped being finite; the last good weights have been kept."""


def first_line(error: BaseException) -> str:
    """Of a library's error, the first line that says something; its type's name if none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
