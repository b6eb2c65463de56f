"""`llmdoctor inspect`: token rewards to an HTML page and a few figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.options import Device, Dtype, FacesFile, TrustRemoteCode, check_output, load, next_command
from llmdoctor.errors import UserError

if TYPE_CHECKING:
    from llmdoctor.evaluation.report import Agreement
    from llmdoctor.rewards.faces import FacePair
    from llmdoctor.rewards.store import RewardStore


@command
def inspect(
    run: Run,
    *,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Written by `llmdoctor rewards`.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE.html", help="The page; by default inspection.html in the folder."),
    ] = None,
    examples: Annotated[int, typer.Option("--examples", min=0, help="Pairs to show token by token.")] = 12,
    agreement: Annotated[
        bool,
        typer.Option(
            "--agreement/--no-agreement",
            help="Score some pairs again under every paraphrase of the faces, and compare the tokens' ranks. "
            "Needs the patient.",
            rich_help_panel="Agreement of faces",
        ),
    ] = True,
    agreement_pairs: Annotated[
        int, typer.Option("--agreement-pairs", min=1, help="How many pairs.", rich_help_panel="Agreement of faces")
    ] = 32,
    patient: Annotated[
        str | None,
        typer.Option(
            "--patient",
            metavar="MODEL",
            help="By default the one that the rewards were made with.",
            rich_help_panel="Agreement of faces",
        ),
    ] = None,
    faces_file: FacesFile = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Look at token rewards: a heat map of real answers, what is kept, which words are rewarded and punished.

    Example: llmdoctor inspect runs/rewards -o runs/rewards.html
    """
    from llmdoctor.evaluation.report import inspection_summary, render_inspection
    from llmdoctor.rewards.store import RewardStore

    store = RewardStore.open(folder)
    if not store.has_token_rewards:
        raise UserError(f"no faces have read the pairs in {folder}, so they have no token rewards to look at")
    page = output or folder / "inspection.html"
    check_output(page, folder=False)
    measured = None
    if agreement:
        faces = _paraphrases(store, faces_file)
        model = load(run, patient or store.manifest["patient"], dtype, device, trust_remote_code)
        measured = _measure(run, store, model, faces, agreement_pairs)
    reward_options = store.manifest["reward_options"]
    theta = reward_options["theta"] if reward_options["density"] is None else None
    stats = render_inspection(store.rows(), store.manifest, page, examples, theta=theta, agreement=measured)
    run.console.print(inspection_summary(stats))
    if measured:
        _print_agreement(run, measured)
    run.say(f"the page is {page}")
    next_command(run, "train", "--rewards", folder, "-o", "runs/doctor")


def _paraphrases(store: RewardStore, faces_file: Path | None) -> list[FacePair]:
    """The faces in use first, then their other paraphrases."""
    from llmdoctor.rewards.faces import FacePair, face_pairs

    used = FacePair(**store.manifest["faces"])
    try:
        found = face_pairs(used.name.partition("#")[0], faces_file)
    except UserError as error:
        raise UserError(f"{error}; name their file with --faces-file, or leave this out with --no-agreement") from error
    others = [faces for faces in found if faces.fingerprint() != used.fingerprint()]
    if not others:
        raise UserError(f"{used.name} has no other paraphrase to compare with; leave this out with --no-agreement")
    return [used, *others]


def _measure(run: Run, store: RewardStore, model: Any, faces: list[FacePair], pairs: int) -> Agreement:
    from llmdoctor.evaluation.agreement import face_agreement

    rows = list(store.rows(limit=pairs))
    with run.progress.step("comparing faces", len(rows) * len(faces), "readings of a pair") as step:
        return face_agreement(
            model, store, rows, faces, tau=store.manifest["reward_options"]["tau"], progress=step.advance
        )


def _print_agreement(run: Run, agreement: Agreement) -> None:
    from rich.table import Table

    table = Table(title="Rank agreement of faces (Spearman)", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("", *agreement["faces"]):
        table.add_column(name, justify="right" if name else "left")
    for name, row in zip(agreement["faces"], agreement["spearman"], strict=True):
        table.add_row(name, *(f"{value:.2f}" for value in row))
    run.console.print(table)
