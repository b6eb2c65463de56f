"""`llmdoctor shrink`: a patient to a small model of its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.cli.options import DEFAULT_PATIENT, Device, Dtype, Patient, TrustRemoteCode, load, next_command

_TRAINING = ("epochs", "learning_rate", "batch_tokens", "tv_weight", "seed")
_OPTIONS = ("llmdoctor.shrink.make", "ShrinkOptions")

_Output = Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The small model's folder.")]
_Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="SOURCE",
        help="What the patient answers: a .txt (one a line), .jsonl, .json or .parquet file, or builtin:prompts/train. "
        "The nearer to what it will be used for, the better.",
    ),
]


@command
def shrink(
    run: Run,
    *,
    output: _Output,
    patient: Patient = DEFAULT_PATIENT,
    prompts: _Prompts = "builtin:prompts/train",
    options: Annotated[dict[str, Any], FieldsOf(*_OPTIONS, panel="What is kept and drawn", without=_TRAINING)],
    training: Annotated[dict[str, Any], FieldsOf(*_OPTIONS, panel="Training", only=_TRAINING)],
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a small model from a patient: a doctor's base, or a draft model for speculative decoding.

    It keeps some of the patient's layers and learns from the patient's own answers to give its distributions.
    A run that was cut goes on when the same command is given again.

    Example: llmdoctor shrink -o runs/small
    """
    from llmdoctor.data.prompts import load_prompts

    questions = load_prompts(prompts)
    from llmdoctor.cli.training_callback import quiet_training
    from llmdoctor.shrink.make import ShrinkOptions
    from llmdoctor.shrink.make import shrink as make_small

    chosen = ShrinkOptions(**options, **training)
    model = load(run, patient, dtype, device, trust_remote_code)
    run.kept = f"Answers and checkpoints are kept in {output}.parts; the same command goes on from there."
    run.progress.start("drawing answers", chosen.tokens, "tokens")
    with quiet_training(run.verbose):
        record = make_small(
            model,
            questions,
            output,
            options=chosen,
            callbacks=[run.progress.training_callback("distilling")],
            progress=run.progress.advance,
        )
    run.progress.close()
    from llmdoctor.evaluation.formatting import percent

    read, held_out = record["weights_read"], record["held_out"]["after"]
    run.say(
        f"{len(record['layers'])} of {record['of_layers']} layers; a token reads "
        f"{percent(read['small'] / read['patient'])} of the patient's weights"
    )
    run.say(
        f"held-out answers: a draft token is accepted with {percent(held_out['acceptance'], 1)}, "
        f"KL {held_out['kl']:.2f} nats a token"
    )
    run.say(f"the small model is in {output}")
    next_command(run, "train", "--rewards", "runs/rewards", "--base", output, "-o", "runs/doctor")
