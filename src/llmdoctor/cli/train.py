"""`llmdoctor train`: token rewards to a doctor (stage 2)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.cli.options import (
    DEFAULT_PATIENT,
    Device,
    Dtype,
    TrustRemoteCode,
    check_output,
    choose_faces,
    load,
    next_command,
)
from llmdoctor.cli.rewards import PAIRS, LimitOption, OnBadOption, SourceFormat, SplitOption, count_pairs, score
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.files import discard

if TYPE_CHECKING:
    from llmdoctor.data.preferences import OnBad, PreferenceSource
    from llmdoctor.models.loading import LoadedModel
    from llmdoctor.rewards.acquire import ScoringOptions
    from llmdoctor.rewards.faces import FacePair
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
_Patient = Annotated[
    str | None,
    typer.Option(
        "--patient",
        metavar="MODEL",
        help="With --pairs, the frozen model that the doctor is for: a hub id, a folder, a .gguf file or, by default, "
        f"{DEFAULT_PATIENT}.",
    ),
]
_Dimension = Annotated[
    str,
    typer.Option(
        "--dimension",
        metavar="NAME",
        help="What the doctor is for; by default the faces' name. Of --pairs with several labels it is also the one "
        "that is learned.",
    ),
]
_Faces = Annotated[
    str | None,
    typer.Option(
        "--faces",
        metavar="DIMENSION",
        help="With --pairs, give tokens rewards by these faces first, as `llmdoctor rewards` does; by default there "
        "are none. With --rewards, refuse those that were made with other faces.",
    ),
]
_Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--restart",
        help="Go on from the last checkpoint, or throw the checkpoints away; tokens of the same --pairs are kept.",
    ),
]
_Scoring = Annotated[
    dict[str, Any],
    FieldsOf(
        "llmdoctor.rewards.acquire",
        "ScoringOptions",
        panel="How --pairs are read",
        only=("max_completion_length", "too_long"),
    ),
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


PAIRS_FOLDER = "pairs"
"""Of a doctor's folder: where the pairs of `--pairs` lie once they are tokens."""


@command
def train(
    run: Run,
    *,
    pairs: Annotated[str | None, PAIRS] = None,
    rewards: Annotated[
        Path | None,
        typer.Option("--rewards", metavar="FOLDER", help="In place of --pairs: written by `llmdoctor rewards`."),
    ] = None,
    output: _Output,
    patient: _Patient = None,
    base: _Base = None,
    dimension: _Dimension = "",
    faces: _Faces = None,
    resume: _Resume = True,
    source_format: SourceFormat = "auto",
    split: SplitOption = "train",
    limit: LimitOption = None,
    on_bad: OnBadOption = "auto",
    scoring_options: _Scoring,
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

    That takes preference pairs, --pairs, and no token rewards. What learns of those, the paper's way (--rounds 0),
    takes --faces, too, or --rewards, the folder that `llmdoctor rewards` made. A run that was cut goes on from its
    last checkpoint when the same command is given again.

    Example: llmdoctor train --pairs my-pairs.jsonl -o runs/doctor
    """
    from llmdoctor.rewards.acquire import ScoringOptions

    _check_source(
        pairs, rewards, patient=patient is not None, format=source_format != "auto", split=split != "train",
        limit=limit is not None, on_bad=on_bad != "auto",
        **{name: value != getattr(ScoringOptions, name) for name, value in scoring_options.items()},
    )  # fmt: skip
    check_output(output, folder=True)
    from llmdoctor.cli.training_callback import quiet_training
    from llmdoctor.data.preferences import load_preferences
    from llmdoctor.models.loading import resolve_device, resolve_dtype
    from llmdoctor.tfpo.options import DoctorOptions
    from llmdoctor.tfpo.rounds import RoundOptions
    from llmdoctor.tfpo.train import check_settings, check_training, learner_of_token_rewards, train_doctor

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
    how = (dtype, device, trust_remote_code)
    loaded = None
    if rewards is not None:
        store = _opened(rewards, faces)
    else:
        assert pairs is not None
        face_pair = _faces_of(faces)
        check = partial(check_settings, config, options, rounds, token_rewards=bool(face_pair.positive))
        check(pairs=None)
        if face_pair.positive and not learner_of_token_rewards(config, rounds):
            raise UserError(
                "--faces makes token rewards, and nothing in this training learns of them: leave it out (--dimension "
                "names the doctor), or learn of them, with --rounds 0 or --pairs-objective subtb"
            )
        source = load_preferences(
            pairs, split=split, format=source_format, dimension=dimension or None, limit=limit,
            on_bad=cast("OnBad", on_bad),
        )  # fmt: skip
        store, loaded = _scored(
            run, source, face_pair, config, check=check, resume=resume, on_bad=on_bad,
            scoring=ScoringOptions(**scoring_options),
            patient=lambda: load(run, patient or DEFAULT_PATIENT, *how),
        )  # fmt: skip
    check_training(store, config, options, rounds)
    patient_model = None
    if rounds.rounds:
        patient_model, loaded = loaded or _patient(run, store, *how), None
    if base is not None:
        # Without rounds nobody asks the patient again.
        loaded = None
        model = load(run, base, *how)
    else:
        model = loaded or _patient(run, store, *how)
    run.kept = f"Checkpoints are kept in {output / 'checkpoints'}; the same command goes on from the last one."
    with quiet_training(run.verbose), _one_of_several():
        train_doctor(
            model,
            store,
            config,
            options=options,
            rounds=rounds,
            patient=patient_model,
            dimension=dimension,
            resume=resume,
            callbacks=[run.progress.training_callback("training")],
            told=run.progress.told,
        )
    run.progress.close()
    _summarise(run, store, output)


def _faces_of(name: str | None) -> FacePair:
    """The shipped faces of that name; those that read nothing without one."""
    from llmdoctor.rewards.faces import NO_FACES

    return NO_FACES if name in (None, NO_FACES.name) else choose_faces(name, None, 1)


def _scored(
    run: Run, source: PreferenceSource, faces: FacePair, config: TFPOConfig, *, check: Callable[..., None],
    resume: bool, on_bad: str, scoring: ScoringOptions, patient: Callable[[], LoadedModel],
) -> tuple[RewardStore, LoadedModel]:  # fmt: skip
    """The pairs as tokens, with rewards where there are faces, kept in the doctor's folder; and the patient.

    `check` looks at the settings once it is known how many `pairs` there are, before the patient is loaded.
    """
    from llmdoctor.rewards.acquire import RewardOptions
    from llmdoctor.rewards.acquire import check_settings as check_made
    from llmdoctor.tfpo.lesson import first_process

    output = Path(config.output_dir)
    folder = output / PAIRS_FOLDER
    with _or_restart():
        if resume:
            check_made(folder, faces, scoring, RewardOptions())
        total = count_pairs(run, source)
        check(pairs=total)
        loaded = patient()
        run.kept = f"What is done is kept in {output}; the same command goes on from there."
        on_bad = "skip" if on_bad == "skip" else "error"
        with first_process(config) as first:
            try:
                store = score(run, loaded, source, folder, faces, total, scoring=scoring, on_bad=on_bad)
            except FingerprintMismatch:
                if resume or not first:
                    raise
                # What was made of the same pairs stays, whatever is trained anew.
                discard(folder)
                store = score(run, loaded, source, folder, faces, total, scoring=scoring, on_bad=on_bad)
    return store, loaded


@contextmanager
def _or_restart() -> Iterator[None]:
    """Of tokens in the doctor's folder that are of other pairs, say what cures them and the checkpoints alike."""
    try:
        yield
    except FingerprintMismatch as error:
        raise UserError(
            str(error).replace(error.remedy, "Give another output folder, or --restart to start anew.")
        ) from error


def _opened(folder: Path, faces: str | None) -> RewardStore:
    """The token rewards there; UserError where they were made with other faces than those that are named."""
    from llmdoctor.rewards.store import RewardStore

    store = RewardStore.open(folder)
    made_with = str(store.manifest["faces"]["name"])
    if faces is not None and faces not in (made_with, made_with.partition("#")[0]):
        raise UserError(f"the rewards in {folder} were made with the faces {made_with!r}, not {faces!r}")
    return store


def _check_source(pairs: str | None, rewards: Path | None, **of_pairs: bool) -> None:
    """UserError unless there is one source, and nothing that only the other would go by."""
    if (pairs is None) == (rewards is None):
        raise UserError(
            "give --pairs or --rewards, not both"
            if pairs is not None
            else "there is nothing to learn from: give --pairs with preference pairs, or --rewards with what "
            "`llmdoctor rewards` made of them"
        )
    given = [name for name, changed in of_pairs.items() if changed]
    if pairs is None and given:
        raise UserError(
            f"--{given[0].replace('_', '-')} says how --pairs are read, and --rewards are read already: leave it out"
        )


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
