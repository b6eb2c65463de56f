"""What `--doctor` says, and the doctors it names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmdoctor.cli.command import Run
from llmdoctor.errors import UserError

if TYPE_CHECKING:
    from llmdoctor.decoding.engine import GuidedDecoder
    from llmdoctor.decoding.guides import Guide
    from llmdoctor.models.loading import LoadedModel

# A drive's letter is no name.
_NAMED = re.compile(r"(?![A-Za-z]:\\)([A-Za-z_][\w.-]*):(.+)", re.DOTALL)
_SEVERAL = re.compile(r"=[^=,/\\]*,")


@dataclass(frozen=True, slots=True)
class DoctorArgument:
    """One `--doctor`: where it is, its β, and the name it was given, if any."""

    path: str
    beta: float = 1.0
    name: str | None = None

    @classmethod
    def parse(cls, text: str, *, option: str = "--doctor ", factor: str = "BETA") -> DoctorArgument:
        """Read `[NAME:]PATH[=BETA]`; a path that exists as it stands is a path.

        Args:
            text: as it was typed.
            option: what it was typed behind, for the errors.
            factor: what they call the number.

        Raises:
            UserError: a number that is none, several doctors in one, or a name that none can have.
        """
        if text and Path(text).exists():
            return cls(text)
        place, sign, number = text.rpartition("=")
        path = place if sign else text
        if _SEVERAL.search(path) and not Path(path).exists():
            raise UserError(f"{option}{text}: these are several doctors; give each by itself, as {option}PATH={factor}")
        try:
            beta = float(number) if sign else 1.0
        except ValueError:
            raise UserError(f"{option}{text}: {number!r} is no number; expected PATH={factor}") from None
        if not path or not math.isfinite(beta):
            raise UserError(f"{option}{text}: expected PATH={factor}, with a finite number {factor}")
        if Path(path).exists():
            return cls(path, beta)
        if named := _NAMED.fullmatch(path):
            return cls(named[2], beta, named[1])
        name, _, rest = path.partition(":")
        if rest and Path(rest).exists():
            raise UserError(
                f"{option}{text}: a name has letters, digits, '.', '_' and '-' and begins with a letter, got {name!r}"
            )
        return cls(path, beta)


def check_doctors(arguments: Sequence[DoctorArgument], allowed: Sequence[str], form: str) -> dict[str, float]:
    """Find out what is wrong with doctors before anything is loaded.

    Args:
        arguments: the doctors.
        allowed: dimensions that they may be trained for; any if none is given.
        form: how they guide.

    Returns:
        Each one's β by its name.

    Raises:
        UserError: no doctor there, one that is not whole or was trained for something else, two of one name, dimensions
            without a doctor, or an unknown form.
    """
    from llmdoctor.decoding.guides import FORMS
    from llmdoctor.models.doctor import DoctorConfig, check_whole, local_folder

    if form not in FORMS:
        raise UserError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if allowed and not arguments:
        raise UserError("--dimension says what a doctor must be trained for; give --doctor PATH=BETA, too")
    betas: dict[str, float] = {}
    for argument in arguments:
        folder = local_folder(argument.path)
        config = DoctorConfig.load(folder)
        check_whole(folder, config)
        if allowed and config.dimension not in allowed:
            raise UserError(
                f"the doctor {argument.path} was trained for {config.dimension!r}, not for "
                f"{' or '.join(map(repr, allowed))}"
            )
        name = argument.name or config.dimension or Path(argument.path).name
        if name in betas:
            raise UserError(f"two doctors are named {name!r}; name one of them: --doctor NAME:PATH=BETA")
        betas[name] = argument.beta
    return betas


def load_doctors(
    run: Run,
    arguments: Sequence[DoctorArgument],
    patient: LoadedModel,
    *,
    form: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> tuple[list[Guide], dict[str, float]]:
    """The doctors as guides, and each one's β by its name."""
    from llmdoctor.decoding.guides import load_guide

    guides: list[Guide] = []
    betas: dict[str, float] = {}
    for argument in arguments:
        run.progress.say(f"loading the doctor {argument.path}")
        guide = load_guide(
            argument.path,
            patient,
            name=argument.name,
            form=form,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        guides.append(guide)
        betas[guide.name] = argument.beta
    return guides, betas


def say_translations(run: Run, decoder: GuidedDecoder) -> None:
    """Say which vocabularies are not the patient's, and how much of the patient's each can speak of."""
    for made in {id(lane.translation): lane.translation for lane in decoder.lanes}.values():
        if made is not None:
            shares = made.shares
            run.progress.say(
                f"a doctor's vocabulary ({len(made.doctor)} tokens) is not the patient's ({len(made.patient)}): its "
                f"tokens lead to {100 * shares['direct']:.0f} % of the patient's, another "
                f"{100 * shares['first_piece']:.0f} % are scored by their first piece"
            )


def say_unmapped(run: Run, mass: float | None, first_pieces: float | None = None) -> None:
    """Say how much of what the doctors said was lost in translation; nothing where nothing was translated."""
    if mass is None:
        return
    line = (
        f"translated: {100 * mass:.2g} % of the doctors' probability was on tokens that stand for none of the patient's"
    )
    if first_pieces is not None:
        line += f", and {100 * first_pieces:.2g} % of the tokens were scored by their first piece"
    run.progress.say(line)
