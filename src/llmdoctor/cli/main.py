"""The `llmdoctor` command: what it offers, and how it ends."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from typer.main import get_command

from llmdoctor.cli import (
    bench,
    chat,
    demo,
    draft,
    generate,
    inspect,
    merge,
    models,
    pairs,
    readout,
    rewards,
    shrink,
    train,
)  # fmt: skip
from llmdoctor.cli.command import Run
from llmdoctor.errors import UserError
from llmdoctor.threads import spin_briefly

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="llmdoctor",
    help=(
        "Steer a frozen language model (the patient) with a small trained one (the doctor).\n\n"
        "The way there: pairs, rewards, train, generate. To see all of it in minutes: llmdoctor demo\n\n"
        "What a command does and all its options: llmdoctor COMMAND --help"
    ),
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in (
    demo.demo,
    pairs.pairs,
    rewards.rewards,
    readout.readout,
    inspect.inspect,
    shrink.shrink,
    draft.draft,
    train.train,
    merge.merge,
    generate.generate,
    chat.chat,
):
    app.command()(function)
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")

_CLICK_ERROR = typer.BadParameter.__mro__[2]
_CANNOT_USE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip
_FULL = ("No space left on device", "Disk quota exceeded", "StorageFull", "PytorchStreamWriter failed writing file")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"llmdoctor {version('llmdoctor')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _default(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USER_ERROR)


def main() -> None:
    """Console entry: runs the command line on this process's arguments and exits with its status."""
    spin_briefly()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where a console or pipe has another encoding than UTF-8, what it cannot show is escaped, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status: 0 success, 2 the user's error, 130 Ctrl-C, 1 a bug."""
    session = Run()
    try:
        status = get_command(app).main(list(arguments), prog_name="llmdoctor", standalone_mode=False, obj=session)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough of it.
        _drop_output()
        return BUG
    except Exception as error:
        session.progress.close()
        return _report(error, session)
    finally:
        session.progress.close()
    if status == INTERRUPTED:
        _say(f"stopped. {session.kept or 'Nothing had been written yet.'}")
    return status if isinstance(status, int) else 0


def _report(error: Exception, session: Run) -> int:
    """Tell the user what went wrong; returns the exit status."""
    line = _user_line(error, session)
    if line is None or session.debug:
        traceback.print_exception(error)
    if line is None:
        return BUG
    if _is_disk_full(error):
        _drop_output()
    _say(f"error: {line}")
    return USER_ERROR


def _user_line(error: Exception, session: Run) -> str | None:
    """One line for an error that is not a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, _CLICK_ERROR):
        context = getattr(error, "ctx", None)
        hint = f" (see: {context.command_path} --help)" if context else ""
        return f"{error.format_message().rstrip('.')}{hint}"  # type: ignore[attr-defined]
    if _is_disk_full(error):
        kept = session.kept or "Nothing finished is lost."
        return f"the disk is full. {kept} Free some space and run the same command again"
    if isinstance(error, OSError) and error.errno in _CANNOT_USE and error.filename:
        return f"cannot use {error.filename}: {error.strerror}"
    return None


def _is_disk_full(error: BaseException) -> bool:
    """Whether a full disk is at the root; torch, safetensors and Parquet wrap or reword the system's error."""
    return any(
        getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(cause) for text in _FULL)
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _drop_output() -> None:
    """What standard output still holds cannot be written; Python must not complain when it tries again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    typer.echo(f"llmdoctor: {' '.join(text.split())}", err=True)
