"""`llmdoctor train`: token rewards to a doctor (stage 2)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.cli.options import Device, Dtype, TrustRemoteCode, check_output, load, next_command
from llmdoctor.errors import UserError

if TYPE_CHECKING:
    from llmdoctor.models.loading import LoadedModel
    from llmdoctor.rewards.store import RewardStore
    from llmdoctor.tfpo.config import TFPOConfig

_CONFIG = ("llmdoctor.tfpo.config", "TFPOConfig")
_OBJECTIVE = (
    "objective", "eta", "subtb_lambda", "reference_anchor", "terminal_anchor", "length_normalize", "value_coef",
    "value_margin", "value_detach", "value_learning_rate", "leaf_coef", "leaf_beta", "branch_coef",
)  # fmt: skip
# The collator needs all columns.
_NOT_OFFERED = ("remove_unused_columns",)

_Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="FOLDER", help="The doctor's folder; checkpoints lie in it, too.")
]
_Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="What the doctor is trained from: a small model, best one with the patient's tokenizer; to the tokens of "
        "another the rewards are carried over. By default the patient that made the rewards.",
    ),
]
_Dimension = Annotated[
    str, typer.Option("--dimension", metavar="NAME", help="What the doctor is for; by default the faces' name.")
]
_Faces = Annotated[
    str | None,
    typer.Option("--faces", metavar="DIMENSION", help="Refuse rewards that were made with other faces than these."),
]
_Resume = Annotated[
    bool,
    typer.Option("--resume/--restart", help="Go on from the last checkpoint, or throw the checkpoints away."),
]
_DoctorOptions = Annotated[dict[str, Any], FieldsOf("llmdoctor.tfpo.options", "DoctorOptions", panel="What is trained")]
_Rounds = Annotated[
    dict[str, Any],
    FieldsOf(
        "llmdoctor.tfpo.rounds", "RoundOptions", panel="Rounds (none: --rounds 0; without pairs: --pairs-weight 0)"
    ),
]
_GradientAccumulationSteps = Annotated[
    int,
    typer.Option("--gradient-accumulation-steps", help="Batches that one step adds up.", rich_help_panel="Training"),
]
_MaxSteps = Annotated[
    int,
    typer.Option("--max-steps", help="Stop after so many steps; -1 goes by epochs.", rich_help_panel="Training"),
]


@command
def train(
    run: Run,
    *,
    rewards: Annotated[Path, typer.Option("--rewards", metavar="FOLDER", help="Written by `llmdoctor rewards`.")],
    output: _Output,
    base: _Base = None,
    dimension: _Dimension = "",
    faces: _Faces = None,
    resume: _Resume = True,
    doctor_options: _DoctorOptions,
    objective: Annotated[dict[str, Any], FieldsOf(*_CONFIG, panel="Objective", only=_OBJECTIVE)],
    round_options: _Rounds,
    training: Annotated[dict[str, Any], FieldsOf(*_CONFIG, panel="Training", without=(*_OBJECTIVE, *_NOT_OFFERED))],
    gradient_accumulation_steps: _GradientAccumulationSteps = 1,
    max_steps: _MaxSteps = -1,
    seed: Annotated[int, typer.Option("--seed", help="Of all draws.", rich_help_panel="Training")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a doctor (stage 2): one in rounds on answers under its own guidance, one on labels, and of both the mean.

    A run that was cut goes on from its last checkpoint when the same command is given again.

    Example: llmdoctor train --rewards runs/rewards -o runs/doctor
    """
    from llmdoctor.rewards.store import RewardStore

    store = RewardStore.open(rewards)
    made_with = str(store.manifest["faces"]["name"])
    if faces is not None and faces not in (made_with, made_with.partition("#")[0]):
        raise UserError(f"the rewards in {rewards} were made with the faces {made_with!r}, not {faces!r}")
    check_output(output, folder=True)
    from llmdoctor.cli.training_callback import quiet_training
    from llmdoctor.models.loading import resolve_device, resolve_dtype
    from llmdoctor.tfpo.options import DoctorOptions
    from llmdoctor.tfpo.rounds import RoundOptions
    from llmdoctor.tfpo.train import check_training, train_doctor

    options, rounds = DoctorOptions(**doctor_options), RoundOptions(**round_options)
    resolve_dtype(dtype, resolve_device(device))
    config = _config(
        output_dir=str(output),
        disable_tqdm=True,
        use_cpu=resolve_device(device) == "cpu",
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_steps=max_steps,
        seed=seed,
        **objective,
        **training,
    )
    check_training(store, config, options, rounds)
    how = (dtype, device, trust_remote_code)
    model = _patient(run, store, *how) if base is None else load(run, base, *how)
    patient = _patient(run, store, *how) if rounds.rounds else None
    run.kept = f"Checkpoints are kept in {output / 'checkpoints'}; the same command goes on from the last one."
    with quiet_training(run.verbose), _one_of_several():
        train_doctor(
            model,
            store,
            config,
            options=options,
            rounds=rounds,
            patient=patient,
            dimension=dimension,
            resume=resume,
            callbacks=[run.progress.training_callback("training")],
            told=run.progress.told,
        )
    run.progress.close()
    _summarise(run, store, output)


@contextmanager
def _one_of_several() -> Iterator[None]:
    """Where processes train together, they part at the end: threads that still listen to the others abort at exit."""
    try:
        yield
    finally:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _patient(run: Run, store: RewardStore, dtype: str, device: str, trust_remote_code: bool) -> LoadedModel:
    """The patient that made the rewards; an error says whose it is."""
    try:
        return load(run, store.manifest["patient"], dtype, device, trust_remote_code)
    except UserError as error:
        raise UserError(f"the patient that made the rewards in {store.folder}, as it was called: {error}") from error


def _config(**settings: Any) -> TFPOConfig:
    """The training arguments; UserError for a value that transformers does not know."""
    from transformers import SchedulerType
    from transformers.integrations import get_available_reporting_integrations

    from llmdoctor.tfpo.config import TFPOConfig

    report_to, available = settings["report_to"], get_available_reporting_integrations()
    if report_to not in ("none", "all", *available):
        raise UserError(
            f"report_to {report_to!r} is unknown or not installed; available here: {', '.join(['none', *available])}"
        )
    try:
        # Else it is looked at only when training begins.
        SchedulerType(settings["lr_scheduler_type"])
        return TFPOConfig(**settings)
    except ValueError as error:
        raise UserError(str(error).partition("\n")[0]) from error


def _summarise(run: Run, store: RewardStore, output: Path) -> None:
    from rich.table import Table

    from llmdoctor.evaluation.formatting import percent_of

    doctor = json.loads((output / "doctor.json").read_text(encoding="utf-8"))
    table = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
    held_out = int(doctor["metrics"].get("held_out_pairs", 0))
    for name, value in doctor["metrics"].items():
        # Of few pairs a bare share says more than it knows.
        text = percent_of(value, held_out) if name == "preference_accuracy" else f"{value:.4g}"
        table.add_row(name.replace("_", " "), text)
    run.console.print(table)
    trained_for = f" for {doctor['dimension']!r}" if doctor["dimension"] else ""
    run.say(f"the doctor{trained_for} is in {output}")
    patient = ["--patient", str(store.manifest["patient"])]
    next_command(run, "generate", "How was your day?", *patient, "--doctor", f"{output}=1.0")
