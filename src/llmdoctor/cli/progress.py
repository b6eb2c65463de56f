"""Progress of long work: a bar with rate and time left on standard error, or plain lines if that is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from llmdoctor.evaluation.formatting import duration

if TYPE_CHECKING:
    from transformers import TrainerCallback

_LINE_EVERY_S = 5.0


class Progress:
    """Shows one step at a time: what is done, how much of how much, how fast, how long still, for how long now.

    Args:
        stream: standard error if None.
        line_every_s: least seconds between two lines of a step that is shown as plain lines.
    """

    def __init__(self, stream: TextIO | None = None, line_every_s: float = _LINE_EVERY_S) -> None:
        self.console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self.line_every_s = line_every_s
        self._bars: bars.Progress | None = None
        self._last_line = 0.0

    @contextmanager
    def step(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
        """A step that is over at the end of the block; an exception leaves it unfinished."""
        self.start(description, total, unit)
        try:
            yield self
            self.done()
        finally:
            self.close()

    def start(self, description: str, total: int | None = None, unit: str = "") -> None:
        """A step of `total` units begins (None: nobody knows how many)."""
        self.close()
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=24),
            _FiguresColumn(),
            console=self.console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not self.console.is_terminal,
        )
        self._bars.add_task(escape(description), total=total, unit=unit, note="")
        self._bars.start()
        self._last_line = time.monotonic()
        if self._bars.disable:
            self.say(description if total is None else f"{description}: {_amount(self._task)}")

    def advance(self, units: int = 1) -> None:
        """So many units more are finished."""
        self._update(advance=units)

    def reach(self, completed: int, total: int | None = None) -> None:
        """So many units are finished in all, of `total` if that has changed."""
        self._update(completed=completed, total=total)

    def note(self, text: str) -> None:
        """A few words behind the figures, such as the present loss."""
        self._update(note=text)

    def told(self, what: str, units: int) -> None:
        """A step of `units` begins where `what` names one; otherwise so many units more are finished."""
        if what:
            self.start(what, units)
        else:
            self.advance(units)

    @property
    def description(self) -> str:
        """Of the step that is shown, "" if none is."""
        return "" if self._bars is None else str(Text.from_markup(self._task.description))

    def done(self) -> None:
        """The step is over."""
        if self._bars is None:
            return
        task = self._task
        self.close()
        self.say(f"{Text.from_markup(task.description)}: {_finished(task)}")

    def close(self) -> None:
        """Take the bar away, whether or not its step is finished."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def say(self, text: str) -> None:
        """A line of text; above the bar, if there is one."""
        self.console.print(text, markup=False)

    def training_callback(self, description: str) -> TrainerCallback:
        """A `TrainerCallback` that shows a training as one step."""
        from llmdoctor.cli.training_callback import ProgressCallback

        return ProgressCallback(self, description)

    @property
    def _task(self) -> bars.Task:
        if self._bars is None:
            raise RuntimeError("no step has been started")
        return self._bars.tasks[0]

    def _update(self, **changes: object) -> None:
        if self._bars is None:
            return
        self._bars.update(self._task.id, **changes)  # type: ignore[arg-type]
        now = time.monotonic()
        if self._bars.disable and now - self._last_line >= self.line_every_s:
            self._last_line = now
            self.say(f"{Text.from_markup(self._task.description)}: {_figures(self._task)}")


class _FiguresColumn(bars.ProgressColumn):
    """The same figures as the plain lines."""

    def render(self, task: bars.Task) -> Text:
        """The figures of a task."""
        return Text(_figures(task), style="cyan")


def _figures(task: bars.Task) -> str:
    parts = [_amount(task)]
    # Rich measures speed over the last half minute, so a resumed run's finished part does not flatter it for long.
    if task.speed:
        parts.append(f"{task.speed:.3g}/s")
    if task.time_remaining is not None and task.completed:
        parts.append(f"{duration(task.time_remaining)} left")
    if task.elapsed is not None:
        parts.append(f"{duration(task.elapsed)} so far")
    return ", ".join([*parts, *filter(None, [task.fields["note"]])])


def _amount(task: bars.Task) -> str:
    done = f"{task.completed:,.0f}" if task.total is None else f"{task.completed:,.0f} of {task.total:,.0f}"
    return f"{done} {task.fields['unit']}".rstrip()


def _finished(task: bars.Task) -> str:
    amount = f"{task.completed:,.0f} {task.fields['unit']}".rstrip()
    return ", ".join(filter(None, [f"{amount} in {duration(task.elapsed or 0.0)}", task.fields["note"]]))
