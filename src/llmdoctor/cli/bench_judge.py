"""`llmdoctor bench judge`, and what the other comparisons say and ask before and after a chat judge is paid for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.cli.options import check_output
from llmdoctor.errors import UserError

if TYPE_CHECKING:
    from llmdoctor.bench.asking import Asking
    from llmdoctor.bench.judging import TaskJudge

UNASKED = 1000
"""Questions to a chat judge that need no --yes where nobody can be asked."""

JudgeFlags = Annotated[dict[str, Any], FieldsOf("llmdoctor.bench.judging", "JudgeOptions", panel="Chat judge")]
Yes = Annotated[
    bool,
    typer.Option(
        "--yes", help=f"Ask a chat judge without asking you first. Where there is no terminal, more than {UNASKED:,} "
        "questions need it.", rich_help_panel="Chat judge",
    ),
]  # fmt: skip


class AskUser:
    """Consent to the questions of a chat judge: tells of them, and asks at a terminal.

    Args:
        run: of the command.
        yes: the user has said yes already.
    """

    def __init__(self, run: Run, yes: bool) -> None:
        self._run = run
        self._yes = yes
        # By judge, the later questions that were agreed to.
        self._granted: dict[str, int] = {}

    def __call__(self, asking: Asking) -> None:
        """Return where the questions may be asked.

        Raises:
            UserError: too many of them, and nobody to ask.
            typer.Abort: the user says no.
        """
        self._run.progress.say(_told(asking))
        new = asking.estimate.uncached
        if not new:
            return
        granted = self._granted.pop(asking.judge, 0)
        if not asking.later and new <= granted:
            # They are the later ones of an earlier consent.
            return
        wanted = new + asking.later
        if not self._yes:
            if sys.stdin is not None and sys.stdin.isatty():
                typer.confirm("Ask them?", abort=True, err=True)
            elif wanted > UNASKED:
                raise UserError(
                    f"{asking.judge} would be asked up to {wanted:,} questions, and there is no terminal to ask you "
                    f"at; more than {UNASKED:,} need --yes"
                )
        self._granted[asking.judge] = asking.later


@contextmanager
def reported(run: Run, judges: Callable[[], Sequence[TaskJudge]]) -> Iterator[None]:
    """At the end of the block, however it ends, say what the chat judges among them did."""
    try:
        yield
    finally:
        run.progress.close()
        for judge in judges():
            said = judge.report()
            if said and said.comparisons + said.asked + said.cached:
                cost = "" if said.cost is None else f"; {_dollars(said.cost)}"
                run.say(
                    f"{judge.name}: {said.asked:,} replies asked for, {said.cached:,} from the cache; of "
                    f"{said.comparisons:,} comparisons {said.refused:,} refused, {said.unparsed:,} unparsed, "
                    f"{said.inconsistent:,} that hang on the order (ties all); {said.input_tokens:,} tokens read, "
                    f"{said.output_tokens:,} written{cost}"
                )


@command
def judge(
    run: Run,
    *,
    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            metavar="JUDGE",
            help="A scorer's name, reward:MODEL (a reward model) or chat:MODEL@URL (any OpenAI-compatible endpoint).",
        ),
    ],
    pairs: Annotated[str, typer.Option("--pairs", metavar="SOURCE", help="Preference pairs with human labels.")],
    limit: Annotated[int | None, typer.Option("--limit", help="At most so many pairs.", min=1)] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="The result, and the replies of a chat judge.")
    ] = Path("runs/bench"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run of at most 16 pairs; its figures mean nothing.")
    ] = False,
    chat: JudgeFlags,
    yes: Yes = False,
) -> None:
    """How often a judge prefers the response that people chose, and whether the order of presentation sways it.

    Example: llmdoctor bench judge --judge chat:gpt-4o-mini --pairs my-labelled-pairs.jsonl --limit 200
    """
    from llmdoctor.bench.agreement import make_agreement
    from llmdoctor.bench.judging import JudgeOptions, TaskJudge
    from llmdoctor.bench.record import read_records
    from llmdoctor.data.preferences import load_preferences

    check_output(output, folder=True)
    if quick:
        run.progress.say("This is a smoke run: its figures mean nothing.")
        limit = min(limit or 16, 16)
    read_records(output)
    labelled = list(load_preferences(pairs, limit=limit))
    asked = TaskJudge(judge, output, JudgeOptions(**chat))
    run.kept = f"Replies of a chat judge are kept in {output}; the same command goes on from there."
    with reported(run, lambda: [asked]):
        found = make_agreement(asked, pairs, labelled, output, run.progress, consent=AskUser(run, yes), quick=quick)
    order = found["position_consistency"]
    run.say(f"agreement with the labels of {found['pairs']:,} pairs: {found['agreement']:.1f} % "
            f"({found['low']:.1f} … {found['high']:.1f}); 50 is chance")  # fmt: skip
    run.say(f"the same in both orders: {'it reads each answer by itself' if order is None else f'{order:.1f} %'}")
    run.say(f"ties: {found['ties']:,}, unanswered among them: {found['unanswered']:,}")
    if quick:
        run.say("A smoke run: these figures mean nothing.")
    run.say(f"the result is in {output / 'judge.json'}")


def _dollars(amount: float) -> str:
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.4f}"


def _told(asking: Asking) -> str:
    estimate = asking.estimate
    if not estimate.uncached:
        return f"{asking.judge}: all of {estimate.requests:,} questions are answered already, nothing is asked"
    written = "no limit" if estimate.output_tokens is None else f"at most {estimate.output_tokens:,}"
    if estimate.price is not None:
        price = f"about {_dollars(estimate.price)}"
    else:
        price = "no price is known (--judge-price-in, --judge-price-out)"
    later = f"; after that at most {asking.later:,} more of that kind" if asking.later else ""
    again = f" if every first reply holds a verdict (where none does, up to {estimate.attempts} are asked for)"
    return (
        f"{asking.judge}: {estimate.uncached:,} questions to ask, {estimate.requests - estimate.uncached:,} answered "
        f"already; about {estimate.input_tokens:,} tokens to read, {written} to write, {price}"
        f"{again}{later}"
    )
