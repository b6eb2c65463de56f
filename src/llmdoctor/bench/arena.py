"""A comparison as a whole: tasks, seeds and prompts, the answers that are there, and where results go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmdoctor.bench.cells import Answer, Cells
from llmdoctor.bench.judging import TaskJudge
from llmdoctor.bench.kit import Kit, Steps
from llmdoctor.bench.methods import CONTENDERS, PATIENT, Contender, Setting
from llmdoctor.bench.options import CONTROLLED_TASKS, BenchOptions, Task
from llmdoctor.bench.points import Point
from llmdoctor.bench.record import provenance
from llmdoctor.data.prompts import load_prompts
from llmdoctor.errors import UserError
from llmdoctor.files import write_json

RAW_FOLDER = "raw"
MODELS_FOLDER = "models"


class Arena:
    """Methods against each other on the same prompts.

    Args:
        output: folder of the results; answers go to `output/raw`, trained models to `output/models`.
        options: how large.
        tasks: what is learned and judged; the controlled ones if none is given.
        steps: told of progress.
        quick: this is a smoke run, which its results say.

    Raises:
        UserError: no prompts, or two tasks of one name.
    """

    def __init__(
        self, output: Path, options: BenchOptions, steps: Steps, tasks: Sequence[Task] = (), *, quick: bool = False
    ) -> None:
        self.output = output
        self.options = options
        self.steps = steps
        self.quick = quick
        self.tasks = tuple(tasks) or CONTROLLED_TASKS
        if len({task.name for task in self.tasks}) != len(self.tasks):
            raise UserError(f"two tasks share a name: {', '.join(task.name for task in self.tasks)}")
        self.prompts = load_prompts(options.prompts, limit=options.prompt_count)
        self.kits = {task.name: Kit(task, options, output / MODELS_FOLDER, steps) for task in self.tasks}
        self.cells = Cells(output / RAW_FOLDER, options, self.prompts, self.kits, steps)
        self._judges: dict[str, TaskJudge] = {}
        self._points: dict[tuple[Any, ...], Point] = {}

    @property
    def seeds(self) -> range:
        """The repetitions."""
        return range(self.options.seeds)

    def judge(self, task: Task) -> TaskJudge:
        """The task's judge."""
        if task.name not in self._judges:
            self._judges[task.name] = TaskJudge(task.judge, self.output)
        return self._judges[task.name]

    def decode(self, contenders: Sequence[Contender], tasks: Sequence[Task] = ()) -> None:
        """Make all answers of these methods that are not there yet, one seed and task after the other.

        In this order a run that is cut leaves whole seeds rather than a part of each.
        """
        for task in tasks or self.tasks:
            # One that cannot be used is told now, not after hours of decoding.
            self.judge(task)
        for seed in self.seeds:
            for task in tasks or self.tasks:
                for contender in contenders:
                    for setting in contender.settings:
                        self.cells.get(task, contender, setting, seed)
                self.kits[task.name].forget()

    def point(self, task: Task, contender: Contender, setting: Setting) -> Point:
        """A method's answers at one setting with their scores."""
        key = (task.name, contender.name, tuple(setting.items()))
        if key not in self._points:
            answers: dict[str, list[Answer]] = {}
            seconds = 0.0
            for seed in self.seeds:
                cell = self.cells.get(task, contender, setting, seed)
                # Of the patient's many answers its own is the first.
                first = cell.sample(0)
                seconds += cell.seconds * len(first) / len(cell.answers)
                for answer in first:
                    answers.setdefault(answer.prompt, []).append(answer)
            scores = self._scores(task, answers)
            self._points[key] = Point(task.name, contender, setting, answers, scores, seconds)
        return self._points[key]

    def points(self, task: Task, contender: Contender) -> list[Point]:
        """The method at all its settings, in the order of its knob."""
        return [self.point(task, contender, setting) for setting in contender.settings]

    def patient(self, task: Task) -> Point:
        """The patient's own answers."""
        return self.point(task, CONTENDERS[PATIENT], {})

    def outcomes(self, task: Task, first: dict[str, list[str]], second: dict[str, list[str]]) -> dict[str, list[float]]:
        """The judge's outcome for every prompt and seed: 1 where the first text wins."""
        order = [(prompt, seed) for prompt in first for seed in range(len(first[prompt]))]
        conversations = {prompt.id: prompt.messages for prompt in self.prompts}
        verdicts = self.judge(task).outcomes(
            [conversations[prompt] for prompt, _ in order],
            [first[prompt][seed] for prompt, seed in order],
            [second[prompt][seed] for prompt, seed in order],
        )
        found: dict[str, list[float]] = {prompt: [] for prompt in first}
        for (prompt, _), verdict in zip(order, verdicts, strict=True):
            found[prompt].append(verdict)
        return found

    def write(self, name: str, value: Any) -> Path:
        """Write a result file, and beside it what all of them were made from."""
        path = self.output / name
        write_json(path, value)
        write_json(self.output / "run.json", provenance(self.options, self.tasks, self.prompts, self.quick))
        return path

    def _scores(self, task: Task, answers: dict[str, list[Answer]]) -> dict[str, list[float]]:
        order = [(prompt, place) for prompt, row in answers.items() for place in range(len(row))]
        conversations = {prompt.id: prompt.messages for prompt in self.prompts}
        own = self._patient_texts(task)
        values = self.judge(task).scores(
            [conversations[prompt] for prompt, _ in order],
            [answers[prompt][place].text for prompt, place in order],
            [own[prompt][place] for prompt, place in order],
        )
        scores: dict[str, list[float]] = {prompt: [] for prompt in answers}
        for (prompt, _), value in zip(order, values, strict=True):
            scores[prompt].append(value)
        return scores

    def _patient_texts(self, task: Task) -> dict[str, list[str]]:
        texts: dict[str, list[str]] = {}
        for seed in self.seeds:
            for answer in self.cells.get(task, CONTENDERS[PATIENT], {}, seed).sample(0):
                texts.setdefault(answer.prompt, []).append(answer.text)
        return texts
