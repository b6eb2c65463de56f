"""`llmdoctor rewards`: preference pairs to token rewards (stage 1)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.cli.options import (
    DEFAULT_PATIENT,
    Device,
    Dtype,
    FacesFile,
    Paraphrase,
    Patient,
    TrustRemoteCode,
    check_output,
    choose_faces,
    load,
    next_command,
)

if TYPE_CHECKING:
    from llmdoctor.data.preferences import OnBad, PreferenceSource
    from llmdoctor.models.loading import LoadedModel
    from llmdoctor.rewards.faces import FacePair
    from llmdoctor.rewards.store import RewardStore

PAIRS = typer.Option(
    "--pairs",
    metavar="SOURCE",
    help="A .jsonl, .json or .parquet file (or a folder of them) with prompt, chosen, rejected; builtin:NAME; "
    "or a data set on the hub as owner/name.",
)
PairsOption = Annotated[str, PAIRS]
_Faces = Annotated[
    str,
    typer.Option(
        "--faces",
        metavar="DIMENSION",
        help="Under which faces the patient reads the answers: helpful, harmless, honest, polite, positive, "
        "concise, readable, or one of --faces-file. With none nothing is read, which is enough for what "
        "`llmdoctor train` does by default.",
    ),
]
SourceFormat = Annotated[
    str,
    typer.Option(
        "--format",
        help="standard, hh, pku, ultrafeedback, or auto to tell by the first row.",
        rich_help_panel="Data",
    ),
]
SplitOption = Annotated[str, typer.Option("--split", help="Part of a hub data set or folder.", rich_help_panel="Data")]
DimensionOption = Annotated[
    str | None,
    typer.Option(
        "--dimension",
        metavar="NAME",
        help="Only pairs with this label, for data with several; pairs without any label are taken for it.",
        rich_help_panel="Data",
    ),
]
LimitOption = Annotated[int | None, typer.Option("--limit", help="At most so many pairs.", rich_help_panel="Data")]
OnBadOption = Annotated[
    str,
    typer.Option(
        "--on-bad",
        metavar="POLICY",
        help="What to do with a row that cannot be used: error stops there; skip leaves it out and counts it, a "
        "conversation that the chat template refuses as well; auto stops, but leaves out pairs of the published sets "
        "that teach nothing.",
        rich_help_panel="Data",
    ),
]
_Rescore = Annotated[
    bool,
    typer.Option(
        "--rescore",
        help="Allow other reward options than the folder was made with: they are computed anew from the stored "
        "log-likelihoods, in seconds.",
        rich_help_panel="Rewards",
    ),
]
_ScoringOptions = Annotated[dict[str, Any], FieldsOf("llmdoctor.rewards.acquire", "ScoringOptions", panel="Scoring")]


@command
def rewards(
    run: Run,
    *,
    pairs: PairsOption,
    faces: _Faces,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder of the token rewards.")],
    patient: Patient = DEFAULT_PATIENT,
    faces_file: FacesFile = None,
    paraphrase: Paraphrase = 1,
    source_format: SourceFormat = "auto",
    split: SplitOption = "train",
    dimension: DimensionOption = None,
    limit: LimitOption = None,
    on_bad: OnBadOption = "auto",
    reward_options: Annotated[dict[str, Any], FieldsOf("llmdoctor.rewards.acquire", "RewardOptions", panel="Rewards")],
    rescore: _Rescore = False,
    scoring_options: _ScoringOptions,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Give every token of the answers a reward (stage 1).

    The frozen patient reads each answer as its well-behaved and as its badly-behaved self; tokens on which the two
    disagree matter. A run that was cut goes on when the same command is given again.

    Example: llmdoctor rewards --pairs my-pairs.jsonl --faces helpful -o runs/rewards
    """
    from llmdoctor.rewards.faces import NO_FACES

    silent = faces == NO_FACES.name and faces_file is None
    pair_of_faces = NO_FACES if silent else choose_faces(faces, faces_file, paraphrase)
    check_output(output, folder=True)
    from llmdoctor.data.preferences import load_preferences

    source = load_preferences(
        pairs, split=split, format=source_format, dimension=dimension, limit=limit, on_bad=cast("OnBad", on_bad)
    )
    from llmdoctor.rewards.acquire import RewardOptions, ScoringOptions, check_settings

    scoring, rewarding = ScoringOptions(**scoring_options), RewardOptions(**reward_options)
    check_settings(output, pair_of_faces, scoring, rewarding, rescore)
    total = count_pairs(run, source)
    model = load(run, patient, dtype, device, trust_remote_code)
    run.kept = f"Scored pairs are kept in {output}; the same command goes on from there."
    score(
        run, model, source, output, pair_of_faces, total, scoring=scoring, rewards=rewarding, rescore=rescore,
        on_bad="skip" if on_bad == "skip" else "error",
    )  # fmt: skip
    if silent:
        run.say(f"the pairs are in {output}, without token rewards: enough for what training does by default")
    else:
        run.say(f"the token rewards are in {output}")
        next_command(run, "inspect", output)
    next_command(run, "train", "--rewards", output, "-o", "runs/doctor")


def score(
    run: Run,
    patient: LoadedModel,
    pairs: PreferenceSource,
    output: Path,
    faces: FacePair,
    total: int | None,
    **how: Any,
) -> RewardStore:
    """`acquire_rewards`, shown while it runs, and what came of it."""
    from llmdoctor.rewards.acquire import acquire_rewards

    resumed = any((output / "logps").glob("*.parquet"))
    start = time.perf_counter()
    with run.progress.step("scoring" if faces.positive else "splitting into tokens", total, "pairs") as step:
        store = acquire_rewards(patient, pairs, output, faces=faces, progress=step.advance, **how)
    _summarise(run, store.manifest, time.perf_counter() - start, resumed)
    return store


def count_pairs(run: Run, source: PreferenceSource) -> int | None:
    """The number of pairs, for the time left; a bad line is found here, before hours of work. None: not known."""
    if not (Path(source.name).expanduser().exists() or source.name.startswith("builtin:")):
        return None
    from llmdoctor.rewards.intake import checked

    with run.progress.step("reading the pairs", unit="pairs") as step:
        total = 0
        for _ in checked(source):
            total += 1
            step.advance()
    return total


def _summarise(run: Run, manifest: dict[str, Any], seconds: float, resumed: bool) -> None:
    from llmdoctor.evaluation.formatting import count, duration, percent

    tokens, kept = manifest["tokens"], manifest["kept_tokens"]
    # Tokens of an earlier run would flatter this one's speed.
    speed = "" if resumed else f" ({tokens / seconds:,.0f} tokens/s)"
    reasons = ", ".join(f"{count(pairs)} {reason}" for reason, pairs in manifest["skipped_for"].items())
    skipped = f" ({count(manifest['skipped'])} skipped: {reasons})" if reasons else ""
    of_them = f", {percent(kept / max(1, tokens), 1)} of them kept" if manifest["faces"]["positive"] else ""
    run.say(f"{count(manifest['pairs'])} pairs{skipped}, {count(tokens)} tokens{of_them}, {duration(seconds)}{speed}")
    if manifest["cut"]:
        most = manifest["scoring_options"]["max_completion_length"]
        run.say(
            f"of {count(2 * manifest['pairs'])} responses {count(manifest['cut'])} were cut at {most} tokens "
            "(--max-completion-length), and nothing is learned of what comes behind"
        )
