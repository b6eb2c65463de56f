"""A training on `transformers.Trainer`, shown as one step of our own progress."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from llmdoctor.cli.command import Run
    from llmdoctor.cli.progress import Progress


class ProgressCallback(TrainerCallback):
    """Steps, time left, loss and held-out accuracy of a training."""

    def __init__(self, progress: Progress, description: str) -> None:
        self.progress = progress
        self.description = description

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the step; a resumed training starts where it was."""
        if state.global_step:
            self.progress.say(f"{self.description}: going on from step {state.global_step}")
        self.progress.start(self.description, state.max_steps, "steps")
        self.progress.reach(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step further; where something else was shown in between, the training is shown again."""
        if self.progress.description != self.description:
            self.progress.start(self.description, state.max_steps, "steps")
        self.progress.reach(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the latest loss, or the held-out figures."""
        logs = logs or {}
        if "loss" in logs:
            self.progress.note(f"loss {float(logs['loss']):.4g}")
        elif "eval_preference_accuracy" in logs:
            accuracy = 100 * float(logs["eval_preference_accuracy"])
            self.progress.note(f"held-out loss {float(logs['eval_loss']):.4g}, {accuracy:.0f} % preferred right")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Finish the step."""
        self.progress.done()


@contextmanager
def distilling(run: Run, output: Path, tokens: int) -> Iterator[dict[str, Any]]:
    """Show a distillation to `output` from `tokens` drawn tokens; yields the arguments by which it is observed."""
    run.kept = f"Answers and checkpoints are kept in {output}.parts; the same command goes on from there."
    run.progress.start("drawing answers", tokens, "tokens")
    with quiet_training(run.verbose):
        yield {"callbacks": [run.progress.training_callback("distilling")], "progress": run.progress.advance}
    run.progress.close()


@contextmanager
def quiet_training(verbose: bool) -> Iterator[None]:
    """Hold back the bars, warnings and printed dicts of transformers and datasets, unless `verbose`."""
    if verbose:
        yield
        return
    import datasets

    logger = logging.getLogger("transformers")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    had_bars = transformers_logging.is_progress_bar_enabled()
    with ExitStack() as stack:
        # Without its bars the Trainer prints every log line as a dict; standard output is for results.
        stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        logger.setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            logger.setLevel(level)
            if had_bars:
                transformers_logging.enable_progress_bar()
            if not bars:
                datasets.enable_progress_bars()
