"""How numbers are written for people: true minus signs, units, no more digits than mean something."""

from __future__ import annotations

import math


def plain(value: float, digits: int = 2) -> str:
    """Fixed digits with a true minus sign and no negative zero; "–" for NaN."""
    if math.isnan(value):
        return "–"
    text = f"{value:,.{digits}f}"
    if text.startswith("-") and float(text.replace(",", "")) == 0:
        text = text[1:]
    return text.replace("-", "−").replace("inf", "∞")


def signed(value: float, digits: int = 2) -> str:
    """As `plain`, with a plus sign before positive values."""
    text = plain(value, digits)
    return f"+{text}" if text[0] not in "−–" and value > 0 and text.strip("0.,") else text


def percent(share: float, digits: int = 0) -> str:
    """A share 0…1 as a percentage."""
    return "–" if math.isnan(share) else f"{plain(100 * share, digits)} %"


def percent_of(share: float, trials: int, digits: int = 0) -> str:
    """A share 0…1 of `trials` as a percentage with its 95 % interval (Wilson 1927)."""
    from scipy.stats import binomtest

    if not trials or math.isnan(share):
        return percent(share, digits)
    interval = binomtest(round(share * trials), trials).proportion_ci(0.95, method="wilson")
    low, high = (plain(100 * end, digits) for end in (interval.low, interval.high))
    return f"{percent(share, digits)} ({low} … {high})"


def count(value: int) -> str:
    """A count with thin spaces between groups of thousands."""
    return f"{value:,}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4 s, 12 s, 3 min 05 s, 1 h 02 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
