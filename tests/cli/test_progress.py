"""Progress: what the user reads, on a terminal and in a file."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich import progress as bars

from llmdoctor.cli.progress import Progress, _figures


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_at_most_every_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten updates one second apart with a line at most every four: at seconds 4 and 8."""
    clock = [100.0]
    monkeypatch.setattr("llmdoctor.cli.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))
    stream = io.StringIO()
    progress = Progress(stream, line_every_s=4)
    with progress.step("scoring [x]", 10, "pairs"):
        for _ in range(10):
            clock[0] += 1
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == "scoring [x]: 0 of 10 pairs"
    assert lines[1].startswith("scoring [x]: 4 of 10 pairs")
    assert lines[2].startswith("scoring [x]: 8 of 10 pairs")
    assert lines[3].startswith("scoring [x]: 10 pairs in ")


def test_figures_hold_amount_rate_time_left_and_elapsed() -> None:
    """A task begun at 0 with 25 units a second apart 5 each: 5/s, 75 left take 15 s."""
    clock = [0.0]
    shown = bars.Progress(get_time=lambda: clock[0], disable=True)
    task = shown.add_task("x", total=100, unit="pairs", note="loss 2")
    for _ in range(5):
        clock[0] += 1
        shown.update(task, advance=5)
    assert _figures(shown.tasks[0]) == "25 of 100 pairs, 5/s, 15 s left, 5.0 s so far, loss 2"


def test_an_unknown_total_has_no_time_left() -> None:
    clock = [0.0]
    shown = bars.Progress(get_time=lambda: clock[0], disable=True)
    task = shown.add_task("x", total=None, unit="", note="")
    for _ in range(2):
        clock[0] += 1
        shown.update(task, advance=3)
    assert _figures(shown.tasks[0]) == "6, 3/s, 2.0 s so far"


def test_a_terminal_gets_a_bar_and_then_one_line() -> None:
    stream = Terminal()
    progress = Progress(stream)
    with progress.step("scoring", 3, "pairs"):
        progress.advance(3)
        progress.say("a warning")
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "━" in text
    assert "a warning" in text
    assert text.rstrip().splitlines()[-1].endswith("scoring: 3 pairs in 0.0 s")


def test_a_failed_step_is_not_called_finished() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    with pytest.raises(ZeroDivisionError), progress.step("scoring", 3):
        raise ZeroDivisionError
    assert stream.getvalue() == "scoring: 0 of 3\n"
    progress.advance()
    progress.done()
    assert stream.getvalue() == "scoring: 0 of 3\n"


def test_a_training_is_shown_as_a_step_that_may_start_in_the_middle() -> None:
    stream = io.StringIO()
    callback = Progress(stream, line_every_s=0).training_callback("training")
    state = SimpleNamespace(max_steps=8, global_step=5)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 1.23456})
    state.global_step = 8
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, logs={"eval_loss": 0.5, "eval_preference_accuracy": 0.75})
    callback.on_train_end(None, state, None)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["training: going on from step 5", "training: 0 of 8 steps"]
    assert lines[2].startswith("training: 5 of 8 steps")
    assert lines[3].endswith("loss 1.235")
    assert lines[-1].startswith("training: 8 steps in ")
    assert lines[-1].endswith("held-out loss 0.5, 75 % preferred right")
