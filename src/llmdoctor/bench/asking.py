"""What a chat judge is about to be asked, told to whoever pays for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmdoctor.bench.judging import Messages, TaskJudge
from llmdoctor.evaluation.judge_report import CostEstimate


@dataclass(frozen=True)
class Asking:
    """Questions that are about to be put to a chat judge.

    Attributes:
        judge: its name.
        estimate: how many, of what size and price.
        later: at most so many questions more that depend on the replies.
    """

    judge: str
    estimate: CostEstimate
    later: int = 0


Consent = Callable[[Asking], None]
"""Returns where the questions may be asked, else raises."""


def announce(
    consent: Consent | None,
    judge: TaskJudge,
    prompts: Sequence[Messages],
    first: Sequence[str],
    second: Sequence[str],
    later: int = 0,
) -> None:
    """Tell `consent` of the questions behind these comparisons; of none where the judge costs nothing."""
    if consent is None:
        return
    estimate = judge.estimate(prompts, first, second)
    if estimate is not None:
        consent(Asking(judge.name, estimate, later))
