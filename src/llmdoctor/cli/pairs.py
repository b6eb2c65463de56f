"""`llmdoctor pairs`: prompts to preference pairs without human labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.cli.options import (
    DEFAULT_PATIENT,
    Device,
    Dtype,
    FacesFile,
    Overwrite,
    Paraphrase,
    Patient,
    TrustRemoteCode,
    check_output,
    choose_faces,
    load,
    next_command,
    refuse_existing,
)
from llmdoctor.errors import UserError

_Output = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The pairs: a .jsonl or .jsonl.gz file.")]
_Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="SOURCE",
        help="A .txt (one a line), .jsonl, .json or .parquet file, or builtin:prompts/train, builtin:prompts/test.",
    ),
]
_Scorer = Annotated[
    str | None,
    typer.Option(
        "--scorer",
        metavar="NAME",
        help="What makes an answer good: vader (sentiment; the default), flesch (readability), brevity, nontoxic, "
        "or your own function as package.module:function (a list of answers to a list of numbers).",
    ),
]
_Faces = Annotated[
    str | None,
    typer.Option(
        "--faces",
        metavar="DIMENSION",
        help="Instead of scoring, let the patient answer each prompt under both faces of this dimension, such as "
        "positive, and prefer the good face's answer.",
    ),
]


@command
def pairs(
    run: Run,
    *,
    output: _Output,
    prompts: _Prompts = "builtin:prompts/train",
    patient: Patient = DEFAULT_PATIENT,
    scorer: _Scorer = None,
    faces: _Faces = None,
    faces_file: FacesFile = None,
    paraphrase: Paraphrase = 1,
    overwrite: Overwrite = False,
    options: Annotated[dict[str, Any], FieldsOf("llmdoctor.pairs.make", "PairOptions", panel="Sampling")],
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make preference pairs from prompts, without human labels.

    The patient answers each prompt several times; the best and the worst answer by a scorer become a pair.
    A run that was cut goes on when the same command is given again.

    Example: llmdoctor pairs --prompts my-prompts.txt --scorer vader -o my-pairs.jsonl.gz
    """
    if scorer and faces:
        raise UserError("give either --scorer or --faces, not both")
    if not faces and (faces_file is not None or paraphrase != 1):
        raise UserError("--faces-file and --paraphrase say which faces are meant by --faces DIMENSION; give that, too")
    refuse_existing(output, overwrite)
    check_output(output, folder=False)
    from llmdoctor.data.prompts import load_prompts

    questions = load_prompts(prompts)
    from llmdoctor.evaluation.scorers import Scorer, get_scorer

    judge = choose_faces(faces, faces_file, paraphrase) if faces else get_scorer(scorer or "vader")
    if isinstance(judge, Scorer):
        # One that cannot score is told now, not when the first answers are there.
        judge(["Hello."])
    from llmdoctor.pairs.make import PairOptions, check_wanted, make_pairs

    chosen = PairOptions(**options)
    check_wanted(output, questions, judge, chosen)
    model = load(run, patient, dtype, device, trust_remote_code)
    run.kept = f"Answered prompts are kept in {output}.parts; the same command goes on from there."
    # Nobody knows how many prompts it takes to make so many pairs.
    total = len(questions) if chosen.limit is None else None
    with run.progress.step("answering", total, "prompts") as step:
        recipe = make_pairs(model, questions, output, judge=judge, options=chosen, progress=step.advance)
    run.say(
        f"{recipe['pairs']} pairs of {recipe['prompts']} prompts are in {output}, how they were made in "
        f"{output}.recipe.json"
    )
    called = ["--dimension", faces] if faces else []
    next_command(run, "train", "--pairs", output, *called, "--patient", patient, "-o", "runs/doctor")
