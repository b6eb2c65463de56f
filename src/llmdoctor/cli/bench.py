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
from llmdoctor.cli.options import check_output
from llmdoctor.errors import UserError

if TYPE_CHECKING:
    from llmdoctor.bench.arena import Arena
    from llmdoctor.bench.options import Task

app = typer.Typer(
    help="Compare LLMdoctor with every other method on the same patient, pairs and prompts. All subcommands share one "
    "output folder: what one has trained or decoded, the others find there, and a run that was cut goes on.",
)

_Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="FOLDER", help="Results, the raw answers and the trained models.")
]
_Quick = Annotated[
    bool, typer.Option("--quick", help="A smoke run of at most ten minutes on two cores; its figures mean nothing.")
]
_OPTIONS = ("llmdoctor.bench.options", "BenchOptions")
_Size = Annotated[dict[str, Any], FieldsOf(*_OPTIONS, panel="Size")]
_SizeWithoutTransferQ = Annotated[
    dict[str, Any], FieldsOf(*_OPTIONS, panel="Size", without=("rollout_tokens", "transfer_q_prompts"))
]
_SizeOfLearning = Annotated[
    dict[str, Any],
    FieldsOf(*_OPTIONS, panel="Size", only=("patient", "base", "pairs", "seeds", "epochs", "rounds")),
]
_Methods = Annotated[
    list[str], typer.Option("--method", metavar="NAME", help="Only this method beside LLMdoctor. Repeatable.")
]
_All = Annotated[
    bool,
    typer.Option(
        "--all", help="Also LLMdoctor's other forms and what stands beside them, DPO and the patient with the same "
        "judge: half as long again.",
    ),
]  # fmt: skip
_Variants = Annotated[
    list[str],
    typer.Option(
        "--variant", metavar="NAME", help="Only this variant beside the whole. Repeatable. Those trained in rounds "
        "(no_subtb, no_branch, no_flow, online_dpo) are made only so: they take hours.",
    ),
]  # fmt: skip
_TaskName = Annotated[
    list[str], typer.Option("--task", metavar="NAME", help="Only this of the controlled tasks. Repeatable.")
]
_Pairs = Annotated[
    list[str],
    typer.Option(
        "--pairs-from", metavar="SOURCE", help="Your own preference pairs instead of the controlled tasks, as "
        "`llmdoctor rewards` takes them. Needs --faces, and --judge where there is one. Repeatable: a task each.",
    ),
]  # fmt: skip
_Faces = Annotated[
    list[str],
    typer.Option(
        "--faces", metavar="DIMENSION", help="Faces that read your pairs, such as helpful; once for each task.",
    ),
]  # fmt: skip
_Shard = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="Train and decode the I-th of N shares of seeds and tasks only, and write no "
        "results: for N processes, GPUs or machines on one folder. Then run without it.",
    ),
]  # fmt: skip
_SoFar = Annotated[
    bool,
    typer.Option(
        "--so-far", help="Results of what is there: train and decode nothing. A method takes part with the seeds at "
        "which all its answers are there; its row says how many.",
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
    list[str],
    typer.Option(
        "--judge", metavar="JUDGE", help="Who judges your task: a scorer's name, reward:MODEL (a reward model) or "
        "chat:MODEL@URL (any OpenAI-compatible endpoint). Once for all tasks, or for each.",
    ),
]  # fmt: skip


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@contextmanager
def _arena(
    run: Run,
    output: Path,
    quick: bool,
    size: dict[str, Any],
    tasks: Sequence[Task] = (),
    chat: dict[str, Any] | None = None,
    yes: bool = False,
    shard: str | None = None,
    so_far: bool = False,
) -> Iterator[Arena]:
    """What the options ask for; inside the block the libraries that train are quiet."""
    from llmdoctor.bench.judging import JudgeOptions
    from llmdoctor.bench.options import BenchOptions, Shard

    check_output(output, folder=True)
    part = None if shard is None else Shard.parse(shard)
    options, judge_options = BenchOptions(**size), JudgeOptions(**(chat or {}))
    from llmdoctor.bench.arena import Arena, ShardDone
    from llmdoctor.cli.training_callback import quiet_training
    from llmdoctor.data.preferences import load_preferences
    from llmdoctor.rewards.faces import face_pairs

    # Else what is wrong with the last task is told after hours of the others.
    for task in tasks:
        load_preferences(task.pairs)
        face_pairs(task.faces)
    run.kept = f"Finished answers and models are kept in {output}; the same command goes on from there."
    if quick:
        run.progress.say("This is a smoke run: its figures mean nothing.")
    arena = Arena(
        output, options.quick() if quick else options, run.progress, tasks, quick=quick, judge_options=judge_options,
        consent=AskUser(run, yes), shard=part, so_far=so_far,
    )  # fmt: skip
    try:
        with reported(run, lambda: arena.judges), quiet_training(run.verbose):
            yield arena
    except ShardDone:
        run.say(f"shard {shard} is there; when all are, the same command without --shard makes the results in {output}")
        raise typer.Exit from None


def _tasks(
    names: Sequence[str] = (),
    pairs: Sequence[str] = (),
    faces: Sequence[str] = (),
    judges: Sequence[str] = (),
    *,
    judged: bool = True,
) -> list[Task]:
    """The controlled tasks of these names, all if none is given, or the user's own.

    Args:
        names: of controlled tasks.
        pairs, faces, judges: of the user's own; one judge serves for all.
        judged: a task of one's own needs a judge.
    """
    from llmdoctor.bench.options import CONTROLLED_TASKS, Task

    controlled = {task.name: task for task in CONTROLLED_TASKS}
    if unknown := sorted(set(names) - set(controlled)):
        raise UserError(f"no controlled task is named {', '.join(unknown)}; there is {', '.join(controlled)}")
    own = {"--pairs-from": pairs, "--faces": faces, **({"--judge": judges} if judged else {})}
    missing = [name for name, values in own.items() if not values]
    if len(missing) == len(own):
        return [task for name, task in controlled.items() if not names or name in names]
    if missing:
        raise UserError(f"a task of your own needs {', '.join(own)}; missing: {', '.join(missing)}")
    if names:
        raise UserError("--task names a controlled task, --pairs-from one of your own; give one of them")
    judges = list(judges) * len(pairs) if len(judges) == 1 else judges if judged else [""] * len(pairs)
    if not len(pairs) == len(faces) == len(judges):
        raise UserError(
            f"{len(pairs)} × --pairs-from, {len(faces)} × --faces and {len(judges)} × --judge; expected as many of "
            "each, or one judge"
        )
    # Those of the same faces are told apart by number.
    before = [list(faces[:place]).count(name) for place, name in enumerate(faces)]
    names = [f"{name}-{count + 1}" if count else name for name, count in zip(faces, before, strict=True)]
    return [Task(*fields) for fields in zip(names, pairs, faces, judges, strict=True)]


def _known_methods(names: list[str], everything: bool) -> list[str]:
    from llmdoctor.bench.methods import CONTENDERS

    if names and everything:
        raise UserError("--method names some methods, --all takes all of them; give one of the two")
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
    all: _All = False,
    shard: _Shard = None,
    so_far: _SoFar = False,
    pairs_from: _Pairs = [],  # noqa: B006
    faces: _Faces = [],  # noqa: B006
    judge: _Judge = [],  # noqa: B006
    size: _Size,
    chat: JudgeFlags,
    yes: Yes = False,
) -> None:
    """LLMdoctor against every method: win, tie, loss at each one's best setting and at equal KL.

    Example: llmdoctor bench table --quick
    """
    from llmdoctor.bench.table import make_table

    names, tasks = _known_methods(method, all), _tasks(task, pairs_from, faces, judge)
    with _arena(run, output, quick, size, tasks, chat, yes, shard, so_far) as arena:
        rows = make_table(arena, names, all)
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
    all: _All = False,
    shard: _Shard = None,
    so_far: _SoFar = False,
    pairs_from: _Pairs = [],  # noqa: B006
    faces: _Faces = [],  # noqa: B006
    judge: _Judge = [],  # noqa: B006
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

    names, tasks = _known_methods(method, all), _tasks(task, pairs_from, faces, judge)
    embed = get_embedder(embedder) if embedder else None
    with _arena(run, output, quick, size, tasks, chat, yes, shard, so_far) as arena:
        rows = make_frontier(arena, names, all, embed)
    figures = ("score", "kl", "distinct_4", "self_bleu", "perplexity", "tokens_per_second")
    show_rows(run, rows, ("task", "method", "setting"), figures)
    show_done(run, output, "frontier.json", quick)


@command
def pareto(
    run: Run,
    *,
    output: _Output = Path("runs/bench"),
    quick: _Quick = False,
    shard: _Shard = None,
    pairs_from: _Pairs = [],  # noqa: B006
    faces: _Faces = [],  # noqa: B006
    judge: _Judge = [],  # noqa: B006
    size: _SizeWithoutTransferQ,
    chat: JudgeFlags,
    yes: Yes = False,
) -> None:
    """Two doctors merged or mixed, against Reward Soups and MOD: scores of both tasks, fronts, hypervolume.

    Example: llmdoctor bench pareto --quick
    """
    from llmdoctor.bench.pareto import STRENGTHS, make_pareto

    tasks = _tasks((), pairs_from, faces, judge)
    with _arena(run, output, quick, size, tasks, chat, yes, shard) as arena:
        most = 1 if quick else None
        result = make_pareto(arena, {method: values[:most] for method, values in STRENGTHS.items()})
    rows = [{**point, **dict(zip(result["tasks"], point["scores"], strict=True))} for point in result["points"]]
    show_rows(run, rows, ("method", "setting", "on_front"), (*result["tasks"], "kl", "distinct_4"))
    told = [(f"{one['method']} at strength {one['strength']:g}", one) for one in result["by_strength"]]
    for name, volume in (*result["hypervolume"].items(), *told):
        lead = (
            ""
            if name.startswith("llmdoctor_merged")
            else f"; the merged doctors' is larger by {volume['lead']:.4f} "
            f"({volume['lead_low']:.4f} … {volume['lead_high']:.4f})"
        )
        run.say(
            f"hypervolume of {name}: {volume['value']:.4f} ({volume['low']:.4f} … {volume['high']:.4f}), "
            f"at most {volume['kl']:.1f} nats{lead}"
        )
    show_done(run, output, "pareto.json", quick)


@command
def ablation(
    run: Run,
    *,
    output: _Output = Path("runs/bench"),
    quick: _Quick = False,
    task: _TaskName = [],  # noqa: B006
    variant: _Variants = [],  # noqa: B006
    shard: _Shard = None,
    pairs_from: _Pairs = [],  # noqa: B006
    faces: _Faces = [],  # noqa: B006
    judge: _Judge = [],  # noqa: B006
    size: _SizeWithoutTransferQ,
    chat: JudgeFlags,
    yes: Yes = False,
) -> None:
    """The doctor without one of its halves (rounds, pairs), and each half without one of its own parts.

    What the part was taken from (of) is set against the variant at the KL that the variant spends.

    On sentiment, unless --task or --pairs-from says otherwise.

    Example: llmdoctor bench ablation --quick
    """
    from llmdoctor.bench.ablation import make_ablation

    # Seven trainings a seed: of both tasks they would take longer than all the rest.
    tasks = _tasks(task or ([] if pairs_from else ["sentiment"]), pairs_from, faces, judge)
    with _arena(run, output, quick, size, tasks, chat, yes, shard) as arena:
        rows = make_ablation(arena, variant)
    figures = ("beta", "score", "kl", "distinct_4", "win_plus_half_tie", "ci_low", "ci_high")
    show_rows(run, rows, ("task", "variant", "of"), figures)
    show_done(run, output, "ablation.json", quick)


@command
def dynamics(
    run: Run,
    *,
    output: _Output = Path("runs/bench"),
    quick: _Quick = False,
    task: _TaskName = [],  # noqa: B006
    pairs_from: _Pairs = [],  # noqa: B006
    faces: _Faces = [],  # noqa: B006
    size: _SizeOfLearning,
) -> None:
    """How early in a response LLMdoctor, GenARM and DPO tell chosen from rejected, on held-out pairs.

    Example: llmdoctor bench dynamics --quick
    """
    from llmdoctor.bench.held_out import make_dynamics

    tasks = _tasks(task, pairs_from, faces, judged=False)
    with _arena(run, output, quick, size, tasks) as arena:
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
    method: _Methods = [],  # noqa: B006
    output: _Output = Path("runs/bench"),
    quick: _Quick = False,
    size: _SizeOfLearning,
) -> None:
    """How often LLMdoctor, GenARM and DPO prefer the response that people chose, on held-out human pairs.

    Example: llmdoctor bench human --train Anthropic/hh-rlhf/harmless-base --validation my-held-out.jsonl --quick
    """
    from llmdoctor.bench.held_out import make_human

    with _arena(run, output, quick, size) as arena:
        rows = make_human(arena, train, validation, faces, 16 if quick else None, method)
    show_rows(run, rows, ("method",), ("accuracy", "low", "high", "difference", "difference_low", "difference_high"))
    show_done(run, output, "human.json", quick)


@command
def report(
    run: Run,
    *,
    output: _Output = Path("runs/bench"),
    plots: Annotated[
        Path | None, typer.Option("--plots", metavar="FOLDER", help="Also write its charts, as SVG files, here.")
    ] = None,
) -> None:
    """One HTML page of all results in the folder.

    Example: llmdoctor bench report -o runs/bench
    """
    from llmdoctor.bench.report.page import render_bench_report, write_plots

    run.say(f"the report is {render_bench_report(output)}")
    if plots is not None:
        run.say(f"{len(write_plots(output, plots))} charts are in {plots}")


_COMMANDS: tuple[Callable[..., None], ...] = (table, frontier, pareto, ablation, dynamics, human, judge, report)
for function in _COMMANDS:
    app.command()(function)
