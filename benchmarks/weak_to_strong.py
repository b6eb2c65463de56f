"""Does a doctor much smaller than the patient steer it as well as training the patient itself would?

    python -m benchmarks.weak_to_strong --base FOLDER --work FOLDER [--task sentiment] [--seeds 3]
        [--weak llmdoctor_rounds_onset,llmdoctor_pairs,dpo] [--strong dpo,genarm] [--shard I/N]
        [--output benchmarks/results/weak_to_strong.json] [--quick]

`--base` is a model that `llmdoctor shrink` made from the patient. On the arena's pairs and prompts (see docs/arena.md),
LLMdoctor and DPO are trained on it and guide the patient in ratio form (weak); DPO and GenARM are trained on the
patient itself as well (strong: at β = 1 DPO is its policy). Same pairs, batch, epochs and LoRA settings; the small
model has fewer layers to put LoRA on, and LLMdoctor its rounds. `--work` is a folder of `llmdoctor bench`, which keeps
models and answers by the name of what they are trained from: a run that was cut goes on, one that is given more seeds
keeps the first ones, and answers of the arena that lie there (`raw/` of its results) are not drawn again. `--shard`
makes one of N parts of the seeds, without results. `--quick` is a smoke run; its figures mean nothing.

`rows` hold the arena's figures of every method and setting. `comparisons` put the weak doctor against each strong
setting at the KL that this one spends: `win_plus_half_tie` in percent with its 95 % bootstrap interval over prompts.
`run_dtype` is what this run decodes in; answers that were there before may have been drawn in another precision.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import record
from llmdoctor.bench.arena import Arena, ShardDone
from llmdoctor.bench.chosen import Chosen, mixed_at_kl
from llmdoctor.bench.methods import CONTENDERS, DOCTOR_OF_PAIRS, DOCTOR_OF_ROUNDS, Contender
from llmdoctor.bench.options import CONTROLLED_TASKS, BenchOptions, Shard, Task
from llmdoctor.bench.points import Point
from llmdoctor.cli.progress import Progress
from llmdoctor.errors import UserError
from llmdoctor.shrink.make import RECORD_NAME


def at(name: str, *betas: float) -> Contender:
    """A method of the arena at some of its settings."""
    whole = CONTENDERS[name]
    return replace(whole, settings=tuple(setting for setting in whole.settings if setting["beta"] in betas))


WEAK_DOCTOR = at(DOCTOR_OF_ROUNDS, 1, 2, 3, 4)
ONSET = replace(
    WEAK_DOCTOR, name="llmdoctor_rounds_onset", settings=tuple({"beta": beta, "onset": 4.0} for beta in (2.0, 4.0))
)
WEAK = (ONSET, at(DOCTOR_OF_PAIRS, 1, 2), at("dpo", 0.5, 1))
STRONG = (at("dpo", 0.5, 1), at("genarm", 0.5, 1))


def shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def opened(base: str, task: Task, arguments: argparse.Namespace, progress: Progress) -> Arena:
    options = BenchOptions(patient=arguments.patient, base=base, seeds=arguments.seeds, prompt_count=arguments.prompts)
    return Arena(
        arguments.work, options.quick() if arguments.quick else options, progress, [task], quick=arguments.quick,
        shard=arguments.shard,
    )  # fmt: skip


def named(contenders: Sequence[Contender]) -> Callable[[str], list[Contender]]:
    """A parser of some of their names, between commas."""

    def parse(text: str) -> list[Contender]:
        known = {contender.name: contender for contender in contenders}
        names = [name for name in text.split(",") if name]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no method is called {unknown[0]!r}; there are {', '.join(known)}")
        return [known[name] for name in names]

    return parse


def comparison(arena: Arena, task: Task, points: list[Point], opponent: Point) -> dict[str, Any]:
    doctor = mixed_at_kl(points, Chosen([opponent]))
    contest = doctor.against(arena, task, Chosen([opponent]))
    result = contest.matchup()
    return {
        "opponent": opponent.contender.name,
        "setting": dict(opponent.setting),
        "kl": opponent.kl,
        "score": opponent.score,
        "distinct_4": opponent.distinct_4,
        "doctor_settings": doctor.settings,
        "doctor_score": doctor.score,
        "doctor_distinct_4": doctor.distinct_4,
        "clamped": doctor.clamped,
        "win_plus_half_tie": result.win_plus_half_tie,
        "ci_low": result.ci_low,
        "ci_high": result.ci_high,
        "by_seed": contest.by_seed,
        "prompts": result.prompts,
    }


def shrunk(folder: Path) -> dict[str, Any]:
    try:
        made = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        figures = {name: made[name] for name in ("layers", "of_layers", "weights_read", "options")}
        return {**figures, "held_out": made["held_out"]["after"]}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder / RECORD_NAME} is missing or broken ({error}); make it with: llmdoctor shrink -o {folder}"
        ) from error


def measure(arguments: argparse.Namespace, task: Task, progress: Progress) -> dict[str, Any] | None:
    """The result; None from a shard."""
    made = shrunk(arguments.base)
    strong = opened("", task, arguments, progress)
    weak = opened(str(arguments.base), task, arguments, progress)
    patient = strong.patient(task)
    for arena, methods in ((weak, (WEAK_DOCTOR, *arguments.weak)), (strong, arguments.strong)):
        with contextlib.suppress(ShardDone):
            arena.decode(methods)
    if arguments.shard:
        return None
    opponents = [point for contender in arguments.strong for point in strong.points(task, contender)]
    guided = [point for contender in (WEAK_DOCTOR, *arguments.weak) for point in weak.points(task, contender)]
    ladder = [patient, *weak.points(task, WEAK_DOCTOR)]
    rows = [{"size": "strong", **point.figures()} for point in (patient, *opponents)]
    rows += [{"size": "weak", **point.figures()} for point in guided]
    return {
        "benchmark": "weak_to_strong",
        "quick": arguments.quick,
        "task": task.name,
        "base": made,
        "seeds": strong.options.seeds,
        "run_dtype": strong.kits[task.name].patient.fingerprint["dtype"],
        "comparisons": [comparison(strong, task, ladder, point) for point in opponents],
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{'':7} {'method':16} {'setting':16} {'score':>6} {'KL':>6} {'dist-4':>7} {'perplexity':>10}")
    for row in result["rows"]:
        setting = ", ".join(f"{name} {value:g}" for name, value in row["setting"].items())
        print(
            f"{row['size']:7} {row['method']:16} {setting:16} {row['score']:>6.3f} {row['kl']:>6.1f} "
            f"{row['distinct_4']:>7.3f} {row['perplexity']:>10.1f}"
        )
    for row in result["comparisons"]:
        print(
            f"weak doctor against strong {row['opponent']} {row['setting']} at {row['kl']:.1f} nats: "
            f"{row['win_plus_half_tie']:.1f} % ({row['ci_low']:.1f} … {row['ci_high']:.1f})"
            f"{', beyond what it was measured at' if row['clamped'] else ''}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder that `llmdoctor shrink` has made")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--patient", default="builtin:smollm2")
    parser.add_argument("--task", choices=[task.name for task in CONTROLLED_TASKS], default=CONTROLLED_TASKS[0].name)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=320)
    parser.add_argument("--weak", type=named(WEAK), default=WEAK, help="measured beside LLMdoctor on the small model")
    parser.add_argument("--strong", type=named(STRONG), default=STRONG, help="its opponents, trained on the patient")
    parser.add_argument("--shard", type=shard, help="make only this part of the seeds' answers, such as 1/2")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    task = next(task for task in CONTROLLED_TASKS if task.name == arguments.task)
    progress = Progress()
    try:
        result = measure(arguments, task, progress)
    except UserError as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"interrupted; what is done is in {arguments.work}, and the same command goes on from it\n")
    finally:
        progress.close()
    if result is not None:
        show(result)
        record(result, arguments.output)


if __name__ == "__main__":
    main()
