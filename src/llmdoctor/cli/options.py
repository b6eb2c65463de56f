"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from llmdoctor.cli.command import Run
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.errors import UserError

if TYPE_CHECKING:
    from llmdoctor.models.draft import DraftModel
    from llmdoctor.models.loading import LoadedModel
    from llmdoctor.rewards.faces import FacePair

DEFAULT_PATIENT = "builtin:smollm2"

Patient = Annotated[
    str,
    typer.Option(
        "--patient", metavar="MODEL", help="The frozen model: a hub id, a folder, a .gguf file or builtin:smollm2."
    ),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel="Model loading")
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, cuda, cuda:N, mps or balanced (over all GPUs).", rich_help_panel="Model loading"
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that comes with a hub model. Read it first.",
        rich_help_panel="Model loading",
    ),
]  # fmt: skip
FacesFile = Annotated[
    Path | None,
    typer.Option("--faces-file", metavar="FILE.yaml", help="Your own faces, in the shape of the shipped faces.yaml."),
]
Paraphrase = Annotated[
    int, typer.Option("--paraphrase", metavar="N", help="Which of the dimension's paraphrased pairs of faces, from 1.")
]
Answered = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="SOURCE",
        help="What the patient answers: a .txt (one a line), .jsonl, .json or .parquet file, or builtin:prompts/train. "
        "The nearer to what it will be used for, the better.",
    ),
]
DISTIL_TRAINING = ("epochs", "learning_rate", "batch_tokens", "tv_weight", "seed")
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")]
Doctors = Annotated[
    list[str],
    typer.Option(
        "--doctor",
        metavar="PATH=BETA",
        help="A doctor's folder or hub id, and its strength β (1 if left out). Repeatable. It goes by the name of its "
        "dimension; NAME:PATH=BETA gives another one, which two doctors of one dimension need.",
        rich_help_panel="Guidance",
    ),
]
Dimensions = Annotated[
    list[str],
    typer.Option(
        "--dimension",
        metavar="NAME",
        help="Refuse a doctor that was trained for anything else than this. Repeatable: any of these will do.",
        rich_help_panel="Guidance",
    ),
]
Form = Annotated[
    str,
    typer.Option(
        "--form",
        help="ratio: patient^α · Π (doctor / its base)^β, so only what the doctor learned counts. "
        "product: patient^α · Π doctor^β, the paper's form.",
        rich_help_panel="Guidance",
    ),
]
Alpha = Annotated[float, typer.Option("--alpha", help="Exponent α of the patient.", rich_help_panel="Guidance")]
Onset = Annotated[
    int,
    typer.Option(
        "--onset",
        metavar="N",
        min=0,
        max=1_000_000,
        help="Let the βs grow to their values over the first N tokens: a strong β then opens fewer answers alike.",
        rich_help_panel="Guidance",
    ),
]
Draft = Annotated[
    Path | None,
    typer.Option(
        "--draft",
        metavar="FOLDER|doctors",
        help="What guesses ahead: a draft model from `llmdoctor draft`, or the word doctors, which lets the doctors "
        "do it where they have a base of their own. Answers come faster where guesses hold, and are the same (in "
        "bfloat16 up to rounding).",
    ),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="A system prompt, in place of a prompt's own.")
]
Stop = Annotated[
    list[str],
    typer.Option(
        "--stop", metavar="TEXT", help="End the answer where this text comes up. Repeatable.",
        rich_help_panel="Sampling",
    ),
]  # fmt: skip
DOCTORS: Final = "doctors"
"""What `--draft` calls the doctors, unless there is a folder of that name."""

SAMPLING = FieldsOf("llmdoctor.decoding.request", "SamplingParams", panel="Sampling", without=("stop",))


def load(run: Run, spec: str, dtype: str, device: str, trust_remote_code: bool) -> LoadedModel:
    """Load a model, telling the user first, since it may take a while."""
    run.progress.say(f"loading {spec}")
    from llmdoctor.models.loading import load_model

    return load_model(spec, dtype=dtype, device=device, trust_remote_code=trust_remote_code, verbose=run.verbose)


def load_drafter(run: Run, folder: Path | None, patient: LoadedModel) -> DraftModel | Literal["doctors"] | None:
    """What `--draft` names, if it is given."""
    if folder is None:
        return None
    if _means_doctors(folder):
        return DOCTORS
    run.progress.say(f"loading the draft model {folder}")
    from llmdoctor.models.draft import load_draft

    return load_draft(folder, patient)


def _means_doctors(draft: Path) -> bool:
    return str(draft) == DOCTORS and not draft.is_dir()


def choose_faces(dimension: str, path: Path | None, paraphrase: int) -> FacePair:
    """One of a dimension's paraphrased pairs of faces; UserError if there is no such number."""
    from llmdoctor.rewards.faces import face_pairs

    found = face_pairs(dimension, path)
    if not 1 <= paraphrase <= len(found):
        raise UserError(f"{dimension} has {len(found)} pairs of faces, so there is no paraphrase {paraphrase}")
    return found[paraphrase - 1]


def check_drafter(folder: Path | None) -> None:
    """UserError where `--draft` names what is no draft model, which can be told before a patient is loaded."""
    if folder is None or _means_doctors(folder):
        return
    from llmdoctor.models.draft import read_record

    read_record(folder)


def check_output(output: Path, *, folder: bool) -> None:
    """UserError where no folder (or no file) can be written, so that it is told before anything that takes long."""
    if output.exists() and output.is_dir() != folder:
        is_one, wanted = ("file", "folder") if folder else ("folder", "file")
        raise UserError(f"{output} is a {is_one}; give a {wanted} for the output")
    place = output.absolute()
    holder = next(path for path in ((place, *place.parents) if folder else place.parents) if path.exists())
    if not holder.is_dir():
        raise UserError(f"cannot use {output}: {holder} is a file; give another output")
    if not os.access(holder, os.W_OK | os.X_OK):
        raise UserError(f"cannot use {output}: nothing can be written to {holder}; give another output")


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raise UserError for an output file that is there already, unless it may be replaced."""
    if output.exists() and not overwrite:
        raise UserError(f"{output} is there already; give another -o, or --overwrite to replace it")


def check_replaceable(folder: Path, what: str, marker: str, overwrite: bool) -> None:
    """UserError unless a command may replace a folder as a whole: absent, empty, or `what` it is, by its `marker`."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; give a folder for the {what}")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / marker).is_file():
        raise UserError(f"{folder} holds something else than a {what}; give the {what} a folder of its own")
    if not overwrite:
        raise UserError(f"{folder} holds a {what} already; give another folder, or --overwrite")


def next_command(run: Run, *words: Any) -> None:
    """Print the command that comes next, ready to be copied."""
    run.say(f"next: {shlex.join(['llmdoctor', *map(str, words)])}")
