"""`llmdoctor merge`: several doctors to one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.doctors import DoctorArgument
from llmdoctor.cli.options import Overwrite, next_command
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

    Example: llmdoctor merge runs/doctor runs/of-pairs -o runs/both
    """
    parts = [DoctorArgument.parse(text) for text in doctors]
    _check_folder(output, overwrite)
    from llmdoctor.models.doctor import DoctorConfig
    from llmdoctor.models.merging import merge_doctors

    run.kept = "Nothing had been written yet."
    merge_doctors([part.path for part in parts], [part.beta for part in parts], output, dimension=dimension or "")
    made = DoctorConfig.load(output)
    named = f" for {made.dimension}" if made.dimension else ""
    run.say(f"{len(parts)} doctors are one{named}, in {output}")
    next_command(run, "generate", "PROMPT", "--patient", made.base, "--doctor", f"{output}=1")


def _check_folder(folder: Path, overwrite: bool) -> None:
    """The folder is replaced as a whole, so nothing else may be in it."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; give a folder for the new doctor")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "doctor.json").is_file():
        raise UserError(f"{folder} holds something else than a doctor; give the new one a folder of its own")
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} holds a doctor's training; give the new one a folder of its own")
    if not overwrite:
        raise UserError(f"{folder} holds a doctor already; give another folder, or --overwrite")
