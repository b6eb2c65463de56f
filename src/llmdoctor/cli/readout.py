"""`llmdoctor readout`: preference pairs to a judge in the patient's own states."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.options import (
    DEFAULT_PATIENT,
    Device,
    Dtype,
    Overwrite,
    Patient,
    TrustRemoteCode,
    check_output,
    check_replaceable,
    load,
    next_command,
)
from llmdoctor.cli.rewards import DimensionOption, LimitOption, PairsOption, SourceFormat, SplitOption, count_pairs


@command
def readout(
    run: Run,
    *,
    pairs: PairsOption,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder of the read-out.")],
    overwrite: Overwrite = False,
    patient: Patient = DEFAULT_PATIENT,
    source_format: SourceFormat = "auto",
    split: SplitOption = "train",
    dimension: DimensionOption = None,
    limit: LimitOption = None,
    folds: Annotated[int, typer.Option("--folds", help="Parts of the pairs, each left out of a fit once.")] = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fit a linear read-out of the patient's states to preference pairs: a judge for `generate --best-of`.

    The frozen patient reads every answer once; how strongly each layer is fitted is what does best on pairs left out.

    Example: llmdoctor readout --pairs my-pairs.jsonl -o runs/readout
    """
    check_output(output, folder=True)
    check_replaceable(output, "read-out", "readout.json", overwrite)
    from llmdoctor.data.preferences import load_preferences

    source = load_preferences(pairs, split=split, format=source_format, dimension=dimension, limit=limit)
    total = count_pairs(run, source)
    from llmdoctor.evaluation.formatting import count, duration, percent_of
    from llmdoctor.rewards.readout import check_folds, fit_readout

    if total is not None:
        check_folds(folds, total)
    model = load(run, patient, dtype, device, trust_remote_code)
    run.kept = "Nothing is kept of a read-out that was cut."
    start = time.perf_counter()
    with run.progress.step("reading", total, "pairs") as step:
        found = fit_readout(model, source, folds=folds, progress=step.advance)
    found.save_pretrained(output)
    took = duration(time.perf_counter() - start)
    run.say(
        f"{count(found.fit.pairs)} pairs, layers {', '.join(map(str, found.fit.layers))}, "
        f"{percent_of(found.fit.accuracy, found.fit.pairs, 1)} of the pairs left out are ranked right, {took}"
    )
    run.say(f"the read-out is in {output}")
    asked = [] if patient == DEFAULT_PATIENT else ["--patient", patient]
    next_command(run, "generate", "PROMPT", *asked, "--best-of", 8, "--readout", output)
