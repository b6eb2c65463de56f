"""What a chat judge will cost, and what it has done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Prices(NamedTuple):
    """US dollars for a million tokens."""

    input: float
    output: float

    def of(self, input_tokens: int, output_tokens: int) -> float:
        """What so many tokens cost, in dollars."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What a `compare` would ask, if every first reply holds a verdict.

    Attributes:
        requests: questions in all: two for each comparison of answers that differ, equal questions once.
        uncached: those that still have to be asked; the other figures are about them.
        input_tokens: a quarter of the characters.
        output_tokens: at most so many; None where the parameters set no limit.
        price: about so many dollars, if replies are as long as they may be; None where prices or the limit are unknown.
        attempts: times that a question is asked in all while its replies hold no verdict. No figure here counts more
            than the first.
    """

    requests: int
    uncached: int
    input_tokens: int
    output_tokens: int | None
    price: float | None
    attempts: int


@dataclass(frozen=True, slots=True)
class JudgeReport:
    """What a judge has done since it was made.

    Attributes:
        comparisons: verdicts given.
        identical: those of two equal answers, which are ties nobody is asked about.
        inconsistent: those whose two orders were both answered and disagree: counted as ties.
        refused: those in which the model refused in some order: counted as ties.
        unparsed: those in which no verdict could be read in some order, and none refused: counted as ties.
        asked: replies received from the endpoint.
        cached: replies taken from the cache.
        retried: requests sent again after an error.
        reasked: replies, among asked and cached, to a question asked again for want of a verdict.
        unmetered: replies whose tokens the endpoint did not count; a quarter of the characters stands for them.
        input_tokens, output_tokens: of the replies in `asked`.
        cost: their dollars; None where prices are unknown.
    """

    comparisons: int
    identical: int
    inconsistent: int
    refused: int
    unparsed: int
    asked: int
    cached: int
    retried: int
    reasked: int
    unmetered: int
    input_tokens: int
    output_tokens: int
    cost: float | None
