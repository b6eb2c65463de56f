"""`llmdoctor bench`: every method against each other on the same patient, pairs and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llmdoctor.cli.bench_judge import AskUser, JudgeFlags, Yes, judge, reported
from llmdoctor.cli.bench_output import show_done, show_rows, show_table
from llmdoctor.cli.command import Run, command
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.errors import UserError

if TYPE_CHECKING:
    from llmdoctor.bench.arena import Arena

app = typer.Typer(
    help="Compare LLMdoctor with every other method on the same patient, pairs and prompts. All subcommands share one "
    "output folder: what one has trained or decoded, the others find there, and a run that was cut goes on.",
    no_args_is_help=True,
)

_Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="FOLDER", help="Results, the raw answers and the trained models.")
]
_Quick = Annotated[
    bool, typer.Option("--quick", help="A smoke run of at most ten minutes on two cores; its figures mean nothing.")
]
_Size = Annotated[dict[str, Any], FieldsOf("llmdoctor.bench.options", "BenchOptions", panel="Size")]
_Methods = Annotated[
    list[str], typer.Option("--method", metavar="NAME", help="Only this method beside LLMdoctor. Repeatable.")
]
_TaskName = Annotated[
    list[str], typer.Option("--task", metavar="NAME", help="Only this of the controlled tasks. Repeatable.")
]
_Pairs = Annotated[
    str | None,
    typer.Option(
        "--pairs-from", metavar="SOURCE", help="Your own preference pairs instead of the controlled tasks, as "
        "`llmdoctor rewards` takes them. Needs --faces and --judge.",
    ),
]  # fmt: skip
_Faces = Annotated[
    str | None, typer.Option("--faces", metavar="DIMENSION", help="Faces that read your pairs, such as helpful.")
]
_Shard = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="Train and decode the I-th of N shares of seeds and tasks only, and write no "
        "results: for N processes, GPUs or machines on one folder. Then run without it.",
    ),
]  # fmt: skip
_Embedder = Annotated[
    str | None,
    typer.Option(
        "--embedder", metavar="NAME", help="Also say how far apart the answers to one prompt are, one a seed: a "
        "sentence-transformers model, or your own as package.module:function.",
    ),
]  # fmt: skip
_Judge = Annotated[
    str | None,
    typer.Option(
        "--judge", metavar="JUDGE", help="Who judges your task: a scorer's name, reward:MODEL (a reward model) or "
        "chat:MODEL@URL (any OpenAI-compatible endpoint).",
    ),
]  # fmt: skip


@contextmanager
def _arena(
    run: Run,
    output: Path,
    quick: bool,
    size: dict[str, Any],
    tasks: Sequence[str] = (),
    pairs: str | None = None,
    faces: str | None = None,
    judge: str | None = None,
    chat: dict[str, Any] | None = None,
    yes: bool = False,
    shard: str | None = None,
) -> Iterator[Arena]:
    """What the options ask for; inside the block the libraries that train are quiet."""
    from llmdoctor.bench.judging import JudgeOptions
    from llmdoctor.bench.options import CONTROLLED_TASKS, BenchOptions, Shard, Task

    part = None if shard is None else Shard.parse(shard)
    chosen = {task.name: task for task in CONTROLLED_TASKS}
    unknown = sorted(set(tasks) - set(chosen))
    if unknown:
        raise UserError(f"no controlled task is named {', '.join(unknown)}; there is {', '.join(chosen)}")
    own = {"--pairs-from": pairs, "--faces": faces, "--judge": judge}
    missing = [name for name, value in own.items() if value is None]
    if len(missing) not in (0, len(own)):
        raise UserError(f"a task of your own needs {', '.join(own)}; missing: {', '.join(missing)}")
    if tasks and not missing:
        raise UserError("--task names a controlled task, --pairs-from one of your own; give one of them")
    picked = [task for name, task in chosen.items() if not tasks or name in tasks]
    if pairs is not None and faces is not None and judge is not None:
        picked = [Task("own", pairs, faces, judge)]
    options, judge_options = BenchOptions(**size), JudgeOptions(**(chat or {}))
    from llmdoctor.bench.arena import Arena, ShardDone
    from llmdoctor.cli.training_callback import quiet_training

    run.kept = f"Finished answers and models are kept in {output}; the same command goes on from there."
    if quick:
        run.progress.say("This is a smoke run: its figures mean nothing.")
    arena = Arena(
        output, options.quick() if quick else options, run.progress, picked, quick=quick, judge_options=judge_options,
        consent=AskUser(run, yes), shard=part,
    )  # fmt: skip
    try:
        with reported(run, lambda: arena.judges), quiet_training(run.verbose):
            yield arena
    except ShardDone:
        run.say(f"shard {shard} is there; when all are, the same command without --shard makes the results in {output}")
        raise typer.Exit from None


def _known_methods(names: list[str]) -> list[str]:
    from llmdoctor.bench.methods import CONTENDERS

    unknown = sorted(set(names) - set(CONTENDERS))
    if unknown:
        raise UserError(f"no method is named {', '.join(unknown)}; there is {', '.join(CONTENDERS)}")
    return names


@command
def table(
    run: Run,
    *,
    output: _Output = Path("runs/bench"),
    quick: _Quick = False,
    task: _TaskName = [],  # noqa: B006
    method: _Methods = [],  # noqa: B006
    shard: _Shard = None,
    pairs_from: _Pairs = None,
    faces: _Faces = None,
    judge: _Judge = None,
    size: _Size,
    chat: JudgeFlags,
    yes: Yes = False,
) -> None:
    """LLMdoctor against every method: win, tie, loss at each one's best setting and at equal KL.

    Example: llmdoctor bench table --quick
    """
    from llmdoctor.bench.table import make_table

    names = _known_methods(method)
    with _arena(run, output, quick, size, task, pairs_from, faces, judge, chat, yes, shard) as arena:
        rows = make_table(arena, names)
    shown = Table(box=None, pad_edge=False)
    words, figures = ("task", "against", "at"), ("win/tie/loss", "win + ½ tie", "95 %", "score")
    for head in (*words, *figures, "LLMdoctor's", "KL", "its KL"):
        shown.add_column(head, justify="left" if head in words else "right")
    for row in rows:
        shown.add_row(
            row["task"], row["method"], row["at"], f"{row['win']}/{row['tie']}/{row['loss']}",
            f"{row['win_plus_half_tie']:.1f}", f"{row['ci_low']:.1f} … {row['ci_high']:.1f}", f"{row['score']:.3f}",
            f"{row['doctor_score']:.3f}", f"{row['kl']:.1f}", f"{row['doctor_kl']:.1f}{'*' if row['clamped'] else ''}",
        )  # fmt: skip
    show_table(run, shown)
    if any(row["clamped"] for row in rows):
        run.say("* beyond what LLMdoctor was measured at: the nearest setting stands in")
    show_done(run, output, "table.json", quick)


@command
def frontier(
    run: Run,
    *,
    output: _Output = Path("runs/bench"),
    quick: _Quick = False,
    task: _TaskName = [],  # noqa: B006
    method: _Methods = [],  # noqa: B006
    shard: _Shard = None,
    pairs_from: _Pairs = None,
    faces: _Faces = None,
    judge: _Judge = None,
    size: _Size,
    embedder: _Embedder = None,
    chat: JudgeFlags,
    yes: Yes = False,
) -> None:
    """Score, KL, diversity, fluency and cost of every method at every setting of its knob.

    Example: llmdoctor bench frontier --quick
    """
    from llmdoctor.bench.table import make_frontier
    from llmdoctor.evaluation.embedders import get_embedder

    names = _known_methods(method)
    embed = get_embedder(embedder) if embedder else None
    with _arena(run, output, quick, size, task, pairs_from, faces, judge, chat, yes, shard) as arena:
        rows = make_frontier(arena, names, embed)
    figures = ("score", "kl", "distinct_4", "self_bleu", "perplexity", "tokens_per_second")
    show_rows(run, rows, ("task", "method", "setting"), figures)
    show_done(run, output, "frontier.json", quick)


@command
def pareto(
    run: Run, *, output: _Output = Path("runs/bench"), quick: _Quick = False, shard: _Shard = None, size: _Size
) -> None:
    """Two doctors mixed, against Reward Soups and MOD: scores of both tasks, fronts, hypervolume.

    Example: llmdoctor bench pareto --quick
    """
    from llmdoctor.bench.pareto import STRENGTHS, make_pareto

    with _arena(run, output, quick, size, shard=shard) as arena:
        most = 1 if quick else None
        result = make_pareto(arena, {method: values[:most] for method, values in STRENGTHS.items()})
    rows = [{**point, **dict(zip(result["tasks"], point["scores"], strict=True))} for point in result["points"]]
    show_rows(run, rows, ("method", "setting", "on_front"), (*result["tasks"], "kl", "distinct_4"))
    for name, volume in result["hypervolume"].items():
        run.say(
            f"hypervolume of {name}: {volume['value']:.4f} ({volume['low']:.4f} … {volume['high']:.4f}), "
            f"at most {volume['kl']:.1f} nats"
        )
    show_done(run, output, "pareto.json", quick)


@command
def ablation(
    run: Run,
    *,
    output: _Output = Path("runs/bench"),
    quick: _Quick = False,
    task: _TaskName = [],  # noqa: B006
    variant: Annotated[
        list[str], typer.Option("--variant", metavar="NAME", help="Only this variant beside the whole. Repeatable.")
    ] = [],  # noqa: B006
    shard: _Shard = None,
    size: _Size,
) -> None:
    """The doctor without one of its parts (balances, flow, rounds), and the doctor of the pairs without one of its own.

    Example: llmdoctor bench ablation --quick
    """
    from llmdoctor.bench.ablation import make_ablation

    with _arena(run, output, quick, size, task, shard=shard) as arena:
        rows = make_ablation(arena, variant)
    show_rows(run, rows, ("task", "variant"), ("beta", "score", "score_low", "score_high", "kl", "distinct_4"))
    show_done(run, output, "ablation.json", quick)


@command
def dynamics(
    run: Run,
    *,
    output: _Output = Path("runs/bench"),
    quick: _Quick = False,
    task: _TaskName = [],  # noqa: B006
    size: _Size,
) -> None:
    """How early in a response LLMdoctor, GenARM and DPO tell chosen from rejected, on held-out pairs.

    Example: llmdoctor bench dynamics --quick
    """
    from llmdoctor.bench.held_out import make_dynamics

    with _arena(run, output, quick, size, task) as arena:
        rows = make_dynamics(arena)
    quarters = [
        {
            **row,
            **{f"{share:.0%}": row["mean"][round(share * (len(row["mean"]) - 1))] for share in (0.25, 0.5, 0.75, 1)},
        }
        for row in rows
    ]
    show_rows(run, quarters, ("task", "method"), ("25%", "50%", "75%", "100%"))
    show_done(run, output, "dynamics.json", quick)


@command
def human(
    run: Run,
    *,
    train: Annotated[str, typer.Option("--train", metavar="SOURCE", help="Human preference pairs to train on.")],
    validation: Annotated[str, typer.Option("--validation", metavar="SOURCE", help="Held-out human pairs.")],
    faces: Annotated[str, typer.Option("--faces", metavar="DIMENSION", help="Faces that read the pairs.")] = "harmless",
    output: _Output = Path("runs/bench"),
    quick: _Quick = False,
    size: _Size,
) -> None:
    """How often LLMdoctor, GenARM and DPO prefer the response that people chose, on held-out human pairs.

    Example: llmdoctor bench human --train Anthropic/hh-rlhf/harmless-base --validation my-held-out.jsonl --quick
    """
    from llmdoctor.bench.held_out import make_human

    with _arena(run, output, quick, size) as arena:
        rows = make_human(arena, train, validation, faces, 16 if quick else None)
    show_rows(run, rows, ("method",), ("accuracy", "low", "high", "difference", "difference_low", "difference_high"))
    show_done(run, output, "human.json", quick)


@command
def report(run: Run, *, output: _Output = Path("runs/bench")) -> None:
    """One HTML page of all results in the folder.

    Example: llmdoctor bench report -o runs/bench
    """
    from llmdoctor.bench.report.page import render_bench_report

    run.say(f"the report is {render_bench_report(output)}")


_COMMANDS: tuple[Callable[..., None], ...] = (table, frontier, pareto, ablation, dynamics, human, judge, report)
for function in _COMMANDS:
    app.command()(function)
