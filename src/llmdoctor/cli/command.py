"""What all commands share: common options, the objects they talk to the user with, and options made of fields."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.console import Console

from llmdoctor.cli.config_file import read_defaults
from llmdoctor.cli.fields import FieldsOf
from llmdoctor.cli.progress import Progress
from llmdoctor.errors import UserError


class Run:
    """One run of the command line.

    Attributes:
        progress: bars on standard error.
        console: tables on standard output.
        silent: another process of the same training speaks; only errors are told.
        verbose: show what the libraries below print.
        debug: show tracebacks for the user's errors, too.
        kept: what an interrupted run leaves and how it goes on; a command sets it as it proceeds.
    """

    def __init__(self) -> None:
        # torchrun numbers the processes of one training; the first speaks for all of them.
        self.silent = os.environ.get("RANK", "0") != "0"
        self.progress = Progress()
        self.progress.console.quiet = self.silent
        self.console = Console(highlight=False, quiet=self.silent)
        self.verbose = False
        self.debug = False
        self.kept = ""

    def say(self, text: str) -> None:
        """A line of results on standard output."""
        if not self.silent:
            typer.echo(text)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command for typer.

    Its first parameter gets the `Run`. A parameter annotated with `FieldsOf` becomes the options of those fields and
    gets a dict of their values. The common options are added.
    """
    parameters, groups = _expanded(function)

    def invoke(context: typer.Context, **values: Any) -> None:
        run = context.ensure_object(Run)
        for common in _COMMON_OPTIONS:
            values.pop(common.name)
        for parameter, names in groups.items():
            values[parameter] = {field: values.pop(field) for field in names}
        with warnings.catch_warnings(), _log_through(run):
            if not run.verbose:
                warnings.simplefilter("ignore")
            function(run, **values)

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    signature = [context, *parameters, *_COMMON_OPTIONS]
    invoke.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    invoke.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
    invoke.__doc__, invoke.__name__ = function.__doc__, function.__name__
    return invoke


def _expanded(function: Callable[..., None]) -> tuple[list[inspect.Parameter], dict[str, list[str]]]:
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, list[str]] = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        hint = hints[parameter.name]
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        fields = next((mark for mark in marks if isinstance(mark, FieldsOf)), None)
        if fields is None:
            parameters.append(parameter.replace(annotation=hint))
        else:
            groups[parameter.name] = [setting.name for setting in fields.settings]
            parameters.extend(fields.parameters())
    return parameters, groups


def _read_config(context: typer.Context, value: Path | None) -> Path | None:
    if value is not None:
        context.default_map = read_defaults(value, context.command.params)
    return value


def _set_debug(context: typer.Context, value: bool) -> bool:
    context.ensure_object(Run).debug = value
    return value


def _set_verbose(context: typer.Context, value: bool) -> bool:
    context.ensure_object(Run).verbose = value
    return value


def _set_threads(value: int | None) -> int | None:
    if value is not None:
        if value < 1:
            raise UserError(f"threads must be at least 1, got {value}")
        import torch

        torch.set_num_threads(value)
    return value


def _common_option(name: str, kind: Any, default: Any, **details: Any) -> inspect.Parameter:
    option = typer.Option(f"--{name}", rich_help_panel="Common", **details)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


_COMMON_OPTIONS = [
    _common_option(
        "config",
        Path | None,
        None,
        metavar="FILE.yaml",
        help="Read options from a YAML file: their names without the dashes in front, such as `max-new-tokens: 64`. "
        "What is typed wins.",
        is_eager=True,
        callback=_read_config,
    ),
    _common_option("threads", int | None, None, help="CPU threads; by default torch decides.", callback=_set_threads),
    _common_option(
        "verbose", bool, False, help="Show warnings and messages of the libraries below.", callback=_set_verbose
    ),
    _common_option("debug", bool, False, help="Show the traceback of every error.", is_eager=True, callback=_set_debug),
]


class _ProgressHandler(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.INFO)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.say(f"llmdoctor: {record.getMessage()}")


@contextmanager
def _log_through(run: Run) -> Iterator[None]:
    """Our own warnings reach the user as lines above the bar."""
    logger, handler = logging.getLogger("llmdoctor"), _ProgressHandler(run.progress)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
