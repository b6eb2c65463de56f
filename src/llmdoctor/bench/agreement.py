"""How often a judge agrees with people: what its verdicts are worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from llmdoctor.bench.asking import Consent, announce
from llmdoctor.bench.judging import TaskJudge
from llmdoctor.bench.kit import Steps
from llmdoctor.bench.record import pairs_record, surroundings, write_result
from llmdoctor.data.preferences import PreferencePair


class AgreementResult(TypedDict):
    """`judge.json`, see `evaluation.judges.JudgeAgreement`."""

    judge: str
    agreement: float
    low: float
    high: float
    position_consistency: float | None
    ties: int
    unanswered: int
    pairs: int


def make_agreement(
    judge: TaskJudge,
    source: str,
    pairs: Sequence[PreferencePair],
    output: Path,
    steps: Steps,
    *,
    consent: Consent | None = None,
    quick: bool = False,
) -> AgreementResult:
    """Let the judge compare both responses of each pair, write `judge.json`; returns its content.

    Args:
        judge: whose verdicts are measured.
        source: where the pairs are from, for the record.
        pairs: with human labels.
        output: folder of the results.
        steps: told of progress.
        consent: told of the questions before a chat judge is asked them.
        quick: this is a smoke run, which `run.json` says.

    Raises:
        UserError: no pairs, no consent, or a judge that fails.
    """
    prompts = [pair.prompt for pair in pairs]
    announce(consent, judge, prompts, [pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    steps.start(f"{judge.name} judges", len(pairs), "pairs")
    found = judge.agreement(pairs, steps.advance)
    steps.done()
    result: AgreementResult = {
        "judge": judge.name,
        "agreement": found.agreement,
        "low": found.interval.low,
        "high": found.interval.high,
        "position_consistency": found.position_consistency,
        "ties": found.ties,
        "unanswered": found.unanswered,
        "pairs": found.pairs,
    }
    fingerprint = {"judge_fingerprint": judge.fingerprint} if judge.fingerprint else {}
    record = {**surroundings(quick), "judge": judge.name, **fingerprint, "labelled": pairs_record(source, pairs)}
    write_result(output, "judge.json", result, record)
    return result
