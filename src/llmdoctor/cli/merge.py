"""`llmdoctor merge`: several doctors to one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.doctors import DoctorArgument
from llmdoctor.cli.options import Overwrite, check_replaceable, next_command
from llmdoctor.errors import UserError

_Parts = Annotated[
    list[str],
    typer.Argument(
        metavar="DOCTOR[=WEIGHT]", show_default=False,
        help="Folders or hub ids of LoRA doctors on one base, and how much of each (1 if left out).",
    ),
]  # fmt: skip


@command
def merge(
    run: Run,
    *,
    doctors: _Parts,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The new doctor's folder.")],
    overwrite: Overwrite = False,
    dimension: Annotated[
        str | None, typer.Option("--dimension", help="What it is for; as they say it if left out.")
    ] = None,
) -> None:
    """Add up several doctors' adapters to one doctor, which costs what one costs.

    At β it says about what they say side by side at WEIGHT · β each. Loads no model; takes a second.

    Example: llmdoctor merge runs/helpful=1 runs/harmless=0.5 -o runs/mixed
    """
    parts = [_part(text) for text in doctors]
    if (output / "checkpoints").is_dir():
        raise UserError(f"{output} holds a doctor's training; give the new one a folder of its own")
    check_replaceable(output, "doctor", "doctor.json", overwrite)
    from llmdoctor.models.doctor import DoctorConfig
    from llmdoctor.models.merging import merge_doctors

    run.kept = "Nothing had been written yet."
    merge_doctors([part.path for part in parts], [part.beta for part in parts], output, dimension=dimension or "")
    made = DoctorConfig.load(output)
    named = f" for {made.dimension}" if made.dimension else ""
    run.say(f"{len(parts)} doctors are one{named}, in {output}")
    next_command(run, "generate", "PROMPT", "--patient", made.base, "--doctor", f"{output}=1")


def _part(text: str) -> DoctorArgument:
    part = DoctorArgument.parse(text, option="", factor="WEIGHT")
    if part.name is not None:
        raise UserError(f"{text}: what is merged goes by no name; expected DOCTOR=WEIGHT, --dimension names the whole")
    return part
