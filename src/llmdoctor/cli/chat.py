"""`llmdoctor chat`: a conversation with a guided patient, adjustable while it runs."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.doctors import DoctorArgument, check_doctors, load_doctors, say_translations, say_unmapped
from llmdoctor.cli.generate import WHY_ERROR, printable, show_stream
from llmdoctor.cli.options import (
    DEFAULT_PATIENT,
    SAMPLING,
    Alpha,
    Device,
    Dimensions,
    Doctors,
    Draft,
    Dtype,
    Form,
    Onset,
    Patient,
    Stop,
    System,
    TrustRemoteCode,
    check_drafter,
    load,
    load_drafter,
)
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.errors import UserError

if TYPE_CHECKING:
    from llmdoctor.decoding.engine import GuidedDecoder

HELP = """\
/alpha X         strength of the patient
/beta NAME X     strength of a doctor (NAME may be left out if there is one)
/onset N         tokens over which the doctors' strengths grow from the start of an answer (0: none)
/temperature X   0 always takes the likeliest word
/compare         the patient alone beside the guided answer, on or off; the guided one goes on
/system TEXT     another system prompt (none if TEXT is left out)
/reset           forget the conversation
/help            this
/quit            leave (so does Ctrl-D)"""


@command
def chat(
    run: Run,
    *,
    patient: Patient = DEFAULT_PATIENT,
    system: System = None,
    doctor: Doctors = [],  # noqa: B006 typer copies it
    dimension: Dimensions = [],  # noqa: B006
    form: Form = "ratio",
    alpha: Alpha = 1.0,
    onset: Onset = 0,
    sampling: Annotated[dict[str, Any], SAMPLING],
    stop: Stop = [],  # noqa: B006
    draft: Draft = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a guided patient, and change α and β while it runs; /help there lists what can be typed.

    Ctrl-C stops an answer; at the prompt it leaves. Without a terminal, each line of standard input is a turn.

    Example: llmdoctor chat --doctor runs/doctor=1.5
    """
    params = SamplingParams(**sampling, stop=tuple(stop))
    arguments = [DoctorArgument.parse(text) for text in doctor]
    check_doctors(arguments, dimension, form)
    check_drafter(draft)
    # Refuses an α that is no number.
    Request((), alpha, onset=onset)
    _open_input()
    model = load(run, patient, dtype, device, trust_remote_code)
    guides, betas = load_doctors(
        run, arguments, model, form=form, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    from llmdoctor.decoding.engine import GuidedDecoder

    decoder = GuidedDecoder(model, guides, draft=load_drafter(run, draft, model))
    say_translations(run, decoder)
    conversation = Conversation(run, decoder, params, alpha, betas, onset, system)
    run.kept = "A conversation is not kept anywhere."
    run.progress.say(f"{conversation.settings()}; /help lists what else can be typed")
    while (line := _read_line()) is not None:
        try:
            if not conversation.take(line.strip()):
                return
        except UserError as error:
            run.progress.say(f"llmdoctor: {error}")


def _open_input() -> None:
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("standard input is closed, and a chat reads its turns from it")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A byte that is not UTF-8 must cost its own turn and not the conversation.
        sys.stdin.reconfigure(errors="surrogateescape")


def _read_line() -> str | None:
    """The next line; None at the end of the input."""
    if sys.stdin.isatty():
        try:
            return input("\nyou> ")
        except EOFError:
            return None
    return sys.stdin.readline() or None


@dataclass
class Conversation:
    """The turns so far and the settings that the user can change."""

    run: Run
    decoder: GuidedDecoder
    sampling: SamplingParams
    alpha: float
    betas: dict[str, float]
    onset: int = 0
    system: str | None = None
    compare: bool = False
    turns: list[dict[str, str]] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """One line of the user's; False to leave. UserError for what cannot be done."""
        if not line:
            return True
        if not line.startswith("/"):
            self._answer(line)
            return True
        name, _, rest = line[1:].partition(" ")
        if name == "quit":
            return False
        action = getattr(self, f"_do_{name}", None) if name.isalpha() else None
        if action is None:
            raise UserError(f"there is no /{name}; /help lists what there is")
        action(rest.strip())
        return True

    def settings(self) -> str:
        """The mixture in one line."""
        doctors = ", ".join(f"β({name}) = {beta:g}" for name, beta in self.betas.items())
        onset = f", onset {self.onset}" if self.onset else ""
        return f"α = {self.alpha:g}, {doctors or 'no doctor'}{onset}, temperature {self.sampling.temperature:g}"

    def _answer(self, text: str) -> None:
        asked = [*self.turns, {"role": "user", "content": text}]
        request = self._request(asked, self.alpha, self.betas)
        try:
            answer = self._both(request, asked) if self.compare else show_stream(self.decoder.stream(request))
        except KeyboardInterrupt:
            self.run.say("")
            raise UserError("stopped; that turn is forgotten") from None
        if answer.finish_reason == "error":
            raise UserError(f"{WHY_ERROR}; that turn is forgotten")
        self.turns = [*asked, {"role": "assistant", "content": answer.text}]
        say_unmapped(self.run, answer.unmapped_mass)

    def _request(self, turns: list[dict[str, str]], alpha: float, betas: dict[str, float]) -> Request:
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        # Another seed a turn, or equal questions would get equal answers.
        sampling = replace(self.sampling, seed=self.sampling.seed + len(turns) - 1)
        return Request((*head, *turns), alpha, dict(betas), sampling, onset=self.onset)

    def _both(self, guided: Request, turns: list[dict[str, str]]) -> Completion:
        from rich.table import Table
        from rich.text import Text

        alone, answer = self.decoder.generate([self._request(turns, 1.0, {}), guided])
        table = Table(expand=True)
        for name in ("patient", f"guided ({self.settings()})"):
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(Text(printable(alone.text)), Text(printable(answer.text)))
        self.run.console.print(table)
        return answer

    def _do_alpha(self, text: str) -> None:
        self.alpha = _number("alpha", text)
        self.run.say(self.settings())

    def _do_beta(self, text: str) -> None:
        name, _, number = text.rpartition(" ")
        name = name.strip() or (next(iter(self.betas)) if len(self.betas) == 1 else "")
        if name not in self.betas:
            known = ", ".join(self.betas) or "none"
            raise UserError(f"say which doctor: /beta NAME X; loaded: {known}")
        self.betas[name] = _number("beta", number)
        self.run.say(self.settings())

    def _do_onset(self, text: str) -> None:
        if not text.isdecimal() or len(text) > 6:
            raise UserError(f"/onset takes a whole number from 0 to 999999, got {text!r:.40}")
        self.onset = int(text)
        self.run.say(self.settings())

    def _do_temperature(self, text: str) -> None:
        self.sampling = replace(self.sampling, temperature=_number("temperature", text))
        self.run.say(self.settings())

    def _do_compare(self, _: str) -> None:
        self.compare = not self.compare
        self.run.say(f"comparing is {'on' if self.compare else 'off'}")

    def _do_system(self, text: str) -> None:
        self.system = text or None
        self.run.say("the system prompt is set" if text else "there is no system prompt")

    def _do_reset(self, _: str) -> None:
        self.turns = []
        self.run.say("the conversation is forgotten")

    def _do_help(self, _: str) -> None:
        self.run.say(HELP)


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or abs(value) == float("inf"):
        raise UserError(f"/{name} takes a number, got {text!r}")
    return value
