"""How many core-hours does the whole arena take?

    python -m benchmarks.arena_hours [--folder benchmarks/results] [--output benchmarks/results/hours.json]

Decoding: the seconds of the quickest cell (one seed of one task) in `raw/`, times the cells that `llmdoctor bench`'s
`table`, `pareto` and `ablation` decode by their defaults; of the table for each setting by itself, of the others for
each method or variant. The quickest, because cells that are there were decoded by different versions, on different
processors, and beside other work. Training: for every kind of model the mean of what is written beside those in
`models/`, which is in no clone, times seeds and tasks; kinds of which nothing is known are named. What only reads
(dynamics, human labels, the tables themselves) is not counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.record import record
from llmdoctor.bench.ablation import ANSWERS_OF, BETAS, OF_PAIRS, OF_ROUNDS, VARIANTS, taken_from
from llmdoctor.bench.kit import LABELS, PAIRS
from llmdoctor.bench.methods import BEST_OF_N, CONTENDERS, PATIENT, SAMPLES, Contender
from llmdoctor.bench.options import CONTROLLED_TASKS, BenchOptions
from llmdoctor.bench.pareto import FIRST_SHARES, STRENGTHS

OPTIONS = BenchOptions()
KINDS = ("tfpo", LABELS, "dpo", "genarm", "reward_model")
"""Trained for every seed of every task; the merged doctor is of the first two."""


def quickest(files: Sequence[Path]) -> float:
    """Seconds of the quickest of these cells."""
    found = []
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found.append(float(json.loads(next(lines))["seconds"]))
    return min(found)


def decoded(raw: Path) -> Iterator[tuple[str, str, int, float | None]]:
    """Of each method: the part of the arena, its name, its cells, and their seconds together if they are known."""
    tasks = len(CONTROLLED_TASKS)
    patient = _seconds(raw, CONTENDERS[PATIENT])
    for contender in CONTENDERS.values():
        if contender.aside:
            continue
        if contender.name == BEST_OF_N:
            # The patient's answers are judged once for every n; its cell counts their decoding, too.
            most = _seconds(raw, replace(contender, settings=({"n": float(SAMPLES)},)))
            seconds = None if most is None or patient is None else most - patient
        else:
            seconds = _seconds(raw, contender)
        times = OPTIONS.seeds * (1 if contender.any_task else tasks)
        yield "table", contender.name, len(contender.settings) * times, _times(seconds, times)
    for method, strengths in STRENGTHS.items():
        settings = len(strengths) * len(FIRST_SHARES)
        files = list((raw / "+".join(task.name for task in CONTROLLED_TASKS) / method).glob("*.gz"))
        each = quickest(files) if files else None
        yield "pareto", method, settings * OPTIONS.seeds, _times(each, settings * OPTIONS.seeds)
    task = CONTROLLED_TASKS[0].name
    for variant in VARIANTS:
        # What is trained in rounds takes part by name only; two variants are the doctor of the labels.
        if taken_from(variant, OPTIONS) in ("", OF_ROUNDS) or variant == LABELS:
            continue
        # The doctor of the pairs at all settings: others are set against it at their own KL.
        name = ANSWERS_OF.get(variant, variant)
        settings = len(CONTENDERS[name].settings) if variant == OF_PAIRS else len(BETAS)
        files = list((raw / task / name).glob("*.gz"))
        each = quickest(files) if files else None
        yield "ablation", variant, settings * OPTIONS.seeds, _times(each, settings * OPTIONS.seeds)


def trained(models: Path) -> Iterator[tuple[str, int, float | None]]:
    """Of each kind of model: its name, how many are trained, and the seconds of all of them if they are known."""
    parts = [PAIRS, *(name for name in VARIANTS if taken_from(name, OPTIONS) == OF_PAIRS and name != LABELS)]
    counts = {**dict.fromkeys(KINDS, len(CONTROLLED_TASKS) * OPTIONS.seeds), **dict.fromkeys(parts, OPTIONS.seeds)}
    for kind, count in counts.items():
        known = [json.loads(path.read_text(encoding="utf-8")) for path in models.glob(f"*/seed*/{kind}.json")]
        seconds = [each["seconds"] * each["threads"] for each in known]
        yield kind, count, _times(sum(seconds) / len(seconds) if seconds else None, count)


def _seconds(raw: Path, contender: Contender) -> float | None:
    """Of one cell at each of its settings, together."""
    total = 0.0
    for setting in contender.settings:
        knobs = ",".join(f"{name}={value:g}" for name, value in setting.items()) or "only"
        places = ["any"] if contender.any_task else [task.name for task in CONTROLLED_TASKS]
        files = [path for place in places for path in (raw / place / contender.name).glob(f"{knobs}-seed*.gz")]
        if not files:
            return None
        total += quickest(files)
    return total


def _times(seconds: float | None, count: int) -> float | None:
    return None if seconds is None else seconds * count


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    rows = [*decoded(options.folder / "raw"), *(("training", *row) for row in trained(options.folder / "models"))]
    print(f"{'part':<10}{'what':<22}{'count':>6}{'minutes':>9}")
    for part, name, count, seconds in rows:
        print(f"{part:<10}{name:<22}{count:>6}{'unknown' if seconds is None else f'{seconds / 60:.1f}':>9}")
    hours = {
        part: sum(seconds or 0.0 for place, *_, seconds in rows if place == part) / 3600
        for part in dict.fromkeys(row[0] for row in rows)
    }
    for part, value in hours.items():
        print(f"{part}: {value:.2f} core-hours")
    record(
        {
            "core_hours": sum(hours.values()),
            "by_part": hours,
            "unknown": [name for _, name, _, seconds in rows if seconds is None],
            "rows": [
                {"part": part, "what": name, "count": count, "seconds": seconds} for part, name, count, seconds in rows
            ],
        },
        options.output,
    )


if __name__ == "__main__":
    main()
