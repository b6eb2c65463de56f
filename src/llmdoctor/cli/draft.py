"""`llmdoctor draft`: a patient to a model that guesses its next tokens."""

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

_TRAINING = ("unroll", *DISTIL_TRAINING)
_OPTIONS = ("llmdoctor.shrink.drafter", "DraftOptions")

_Output = Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The draft model's folder.")]


@command
def draft(
    run: Run,
    *,
    output: _Output,
    patient: Patient = DEFAULT_PATIENT,
    prompts: Answered = "builtin:prompts/train",
    options: Annotated[dict[str, Any], FieldsOf(*_OPTIONS, panel="What is made and drawn", without=_TRAINING)],
    training: Annotated[dict[str, Any], FieldsOf(*_OPTIONS, panel="Training", only=_TRAINING)],
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a draft model for a patient: it guesses the next tokens, and the patient checks several at once.

    It has a layer or a few, reads the patient's own states, and learns from the patient's own answers. It changes no
    token of an answer, only how fast they come. A run that was cut goes on when the same command is given again.

    Example: llmdoctor draft -o runs/draft
    """
    check_output(output, folder=True)
    from llmdoctor.data.prompts import load_prompts

    questions = load_prompts(prompts)
    from llmdoctor.cli.training_callback import distilling
    from llmdoctor.models.draft import CONFIG_NAME
    from llmdoctor.shrink.distil import check_place, check_prompts
    from llmdoctor.shrink.drafter import DraftOptions, make_draft

    chosen = DraftOptions(**options, **training)
    check_place(output / CONFIG_NAME, "a draft model")
    check_prompts(len(questions), chosen)
    model = load(run, patient, dtype, device, trust_remote_code)
    with distilling(run, output, chosen.tokens) as observers:
        record = make_draft(model, questions, output, options=chosen, **observers)
    from llmdoctor.evaluation.formatting import percent

    read, held_out = record["weights_read"], record["held_out"]["after"]
    run.say(
        f"layers: {len(record['layers'])}; a guess reads {percent(read['draft'] / read['patient'])} "
        "of the patient's weights"
    )
    run.say(
        f"held-out answers: a guess is accepted with {percent(held_out['acceptance'], 1)}, the one after it with "
        f"{percent(held_out['second_acceptance'], 1)}"
    )
    run.say(f"the draft model is in {output}")
    asked = [] if patient == DEFAULT_PATIENT else ["--patient", patient]
    next_command(run, "generate", "How was your day?", *asked, "--draft", output)
