"""`llmdoctor shrink`: a patient to a small model of its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.cli.options import (
    DEFAULT_PATIENT,
    DISTIL_TRAINING,
    Answered,
    Device,
    Dtype,
    Patient,
    TrustRemoteCode,
    check_output,
    load,
    next_command,
)

_OPTIONS = ("llmdoctor.shrink.make", "ShrinkOptions")

_Output = Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The small model's folder.")]


@command
def shrink(
    run: Run,
    *,
    output: _Output,
    patient: Patient = DEFAULT_PATIENT,
    prompts: Answered = "builtin:prompts/train",
    options: Annotated[dict[str, Any], FieldsOf(*_OPTIONS, panel="What is kept and drawn", without=DISTIL_TRAINING)],
    training: Annotated[dict[str, Any], FieldsOf(*_OPTIONS, panel="Training", only=DISTIL_TRAINING)],
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a small model from a patient: a base for doctors.

    It keeps some of the patient's layers and learns from the patient's own answers to give its distributions.
    A run that was cut goes on when the same command is given again.

    Example: llmdoctor shrink -o runs/small
    """
    check_output(output, folder=True)
    from llmdoctor.data.prompts import load_prompts

    questions = load_prompts(prompts)
    from llmdoctor.cli.training_callback import distilling
    from llmdoctor.shrink.distil import check_place, check_prompts
    from llmdoctor.shrink.make import RECORD_NAME, ShrinkOptions
    from llmdoctor.shrink.make import shrink as make_small

    chosen = ShrinkOptions(**options, **training)
    check_place(output / RECORD_NAME, "a shrunk model")
    check_prompts(len(questions), chosen)
    model = load(run, patient, dtype, device, trust_remote_code)
    with distilling(run, output, chosen.tokens) as observers:
        record = make_small(model, questions, output, options=chosen, **observers)
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
    next_command(run, "train", "--pairs", "PAIRS", "--patient", patient, "--base", output, "-o", "runs/doctor")
