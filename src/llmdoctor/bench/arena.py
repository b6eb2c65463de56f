"""A comparison as a whole: tasks, seeds and prompts, the answers that are there, and where results go."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmdoctor.bench.asking import Consent, announce
from llmdoctor.bench.cells import Answer, Cells
from llmdoctor.bench.judging import JudgeOptions, TaskJudge, is_chat
from llmdoctor.bench.kit import Kit, Steps
from llmdoctor.bench.methods import CONTENDERS, PATIENT, Contender, Setting
from llmdoctor.bench.options import CONTROLLED_TASKS, BenchOptions, Shard, Task
from llmdoctor.bench.points import Point
from llmdoctor.bench.record import answers_record, read_records, surroundings, write_result
from llmdoctor.data.formats import Message
from llmdoctor.data.prompts import load_prompts
from llmdoctor.errors import UserError
from llmdoctor.evaluation.judges import Progress

RAW_FOLDER = "raw"
MODELS_FOLDER = "models"

Comparisons = tuple[list[Sequence[Message]], list[str], list[str]]
"""Prompts, first and second texts."""

Texts = Mapping[str, Sequence[str]]
"""Prompt id -> one text a seed."""


class ShardDone(Exception):
    """The answers of an arena's shard are there; results are made of all shards' answers, by an arena without one."""


class Arena:
    """Methods against each other on the same prompts.

    Args:
        output: folder of the results; answers go to `output/raw`, trained models to `output/models`.
        options: how large.
        tasks: what is learned and judged; the controlled ones if none is given.
        steps: told of progress.
        quick: this is a smoke run, which its results say.
        judge_options: how a chat judge is asked.
        consent: told of a comparison's questions before a chat judge is asked them.
        shard: train and decode only this part, then raise `ShardDone`; all of it if None.
        so_far: train and decode nothing; a method takes part with the seeds at which all its answers are there.

    Raises:
        UserError: no prompts, two tasks of one name, a `run.json` in `output` that cannot be read, or `so_far` with a
            shard.
    """

    def __init__(
        self,
        output: Path,
        options: BenchOptions,
        steps: Steps,
        tasks: Sequence[Task] = (),
        *,
        quick: bool = False,
        judge_options: JudgeOptions | None = None,
        consent: Consent | None = None,
        shard: Shard | None = None,
        so_far: bool = False,
    ) -> None:
        if so_far and shard:
            raise UserError("--so-far makes results of what is there, --shard makes answers; give one of them")
        read_records(output)
        self.output = output
        self.options = options
        self.steps = steps
        self.quick = quick
        self.judge_options = judge_options or JudgeOptions()
        self.consent = consent
        self.shard = shard
        self.so_far = so_far
        self.tasks = tuple(tasks) or CONTROLLED_TASKS
        if len({task.name for task in self.tasks}) != len(self.tasks):
            raise UserError(f"two tasks share a name: {', '.join(task.name for task in self.tasks)}")
        self.prompts = load_prompts(options.prompts, limit=options.prompt_count)
        if len(self.prompts) < 2:
            raise UserError(f"{options.prompts} holds one prompt; a comparison needs at least two")
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
        if task.judge not in self._judges:
            chats = [each.judge for each in self.tasks if is_chat(each.judge)]
            # They are the chat judge's; without any, giving them is a mistake that is told.
            options = self.judge_options if is_chat(task.judge) or not chats else None
            self._judges[task.judge] = TaskJudge(task.judge, self.output, options)
        return self._judges[task.judge]

    @property
    def judges(self) -> list[TaskJudge]:
        """Those that were needed so far."""
        return list(self._judges.values())

    def decode(self, contenders: Sequence[Contender], tasks: Sequence[Task] = ()) -> None:
        """Make all answers of these methods that are not there yet, one seed and task after the other.

        In this order a run that is cut leaves whole seeds rather than a part of each. Makes none where only what is
        there counts.

        Raises:
            ShardDone: this arena's shard of them is made.
        """
        tasks = tasks or self.tasks
        for task in tasks:
            # One that cannot be used is told now, not after hours of decoding.
            self.judge(task)
        if self.so_far:
            return
        for seed, task in self.units(tasks):
            for contender in contenders:
                if contender.any_task and self.shard and task is not tasks[0]:
                    # They serve all tasks: another shard may be making them at this moment.
                    continue
                for setting in contender.settings:
                    self.cells.get(task, contender, setting, seed)
            self.kits[task.name].forget()
        self.end_shard()

    def seeds_of(self, task: Task, contender: Contender) -> int:
        """Seeds, from the first on, with which the method takes part: all, or those at which its answers are there.

        Never more than the patient, which scores and gates are measured against.
        """
        if not self.so_far:
            return self.options.seeds
        return min(self._seeds_there(task, one) for one in (contender, CONTENDERS[PATIENT]))

    def part_taking(self, task: Task, contenders: Sequence[Contender]) -> list[Contender]:
        """Those with a seed at least; says who is left out."""
        found = [contender for contender in contenders if self.seeds_of(task, contender)]
        missing = [contender.name for contender in contenders if contender not in found]
        # With nobody there the caller's error says it all.
        if found and missing:
            self.steps.say(f"{task.name}: left out, because not all answers of a seed are there: {', '.join(missing)}")
        return found

    def units(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Task]]:
        """Seeds and tasks whose models and answers are for this arena to make: all, or those of its shard."""
        for place, unit in enumerate(itertools.product(self.seeds, tasks)):
            if self.shard is None or self.shard.has(place):
                yield unit

    def end_shard(self) -> None:
        """Raise `ShardDone` if this arena makes a shard only."""
        if self.shard is not None:
            raise ShardDone

    def point(self, task: Task, contender: Contender, setting: Setting) -> Point:
        """A method's answers at one setting with their scores."""
        key = (task.name, contender.name, tuple(setting.items()))
        if key not in self._points:
            answers, seconds = self._answers(task, contender, setting)
            scores = self.scores(task, _texts(answers))
            self._points[key] = Point(task.name, contender, setting, answers, scores, seconds)
        return self._points[key]

    def points(self, task: Task, contender: Contender) -> list[Point]:
        """The method at all its settings, in the order of its knob."""
        return [self.point(task, contender, setting) for setting in contender.settings]

    def patient(self, task: Task) -> Point:
        """The patient's own answers."""
        return self.point(task, CONTENDERS[PATIENT], {})

    def outcomes(self, task: Task, first: Texts, second: Texts) -> dict[str, list[float]]:
        """The judge's outcome for every prompt and seed of `first`: 1 where the first text wins."""
        comparisons = self._comparisons([(first, second)])
        with self._asking(task, comparisons) as progress:
            verdicts = iter(self.judge(task).outcomes(*comparisons, progress))
        return {prompt: [next(verdicts) for _ in row] for prompt, row in first.items()}

    def scores(self, task: Task, texts: Texts) -> dict[str, list[float]]:
        """The judge's score of every text; from one that only compares, its outcome against the patient's own."""
        comparisons = self._comparisons([(texts, self._patient_texts(task))])
        with self._asking(task, comparisons) as progress:
            values = iter(self.judge(task).scores(*comparisons, progress))
        return {prompt: [next(values) for _ in row] for prompt, row in texts.items()}

    def announce_scores(self, task: Task, contenders: Sequence[Contender], later: int = 0) -> None:
        """Ask for consent to the questions that scores of these methods at all settings take, and `later` ones."""
        if self.judge(task).only_compares:
            found = (
                self._answers(task, contender, setting)[0] for contender in contenders for setting in contender.settings
            )
            self.announce_scores_of(task, [_texts(answers) for answers in found], later)

    def announce_scores_of(self, task: Task, texts: Sequence[Texts], later: int = 0) -> None:
        """As `announce_scores`, of answers that are there."""
        if self.judge(task).only_compares:
            own = self._patient_texts(task)
            self.announce(task, [(one, own) for one in texts], later)

    def announce(self, task: Task, matches: Sequence[tuple[Texts, Texts]], later: int = 0) -> None:
        """Ask for consent to the questions that the outcomes of these pairs of texts take, and `later` ones."""
        announce(self.consent, self.judge(task), *self._comparisons(matches), later)

    def write(self, name: str, value: Any, record: Mapping[str, Any] | None = None) -> Path:
        """Write a result file, and into `run.json` what it was made from: `record`, or the tasks' judged answers."""
        if record is None:
            judges = {
                task.name: found
                for task in self.tasks
                if task.judge in self._judges and (found := self._judges[task.judge].fingerprint)
            }
            record = answers_record(self.options, self.tasks, self.prompts)
            record |= {"judge_fingerprints": judges} if judges else {}
        return write_result(self.output, name, value, {**surroundings(self.quick), **record})

    @contextmanager
    def _asking(self, task: Task, comparisons: Comparisons) -> Iterator[Progress | None]:
        """Show a step while a chat judge is asked; whoever is quick, or knows all answers already, shows none."""
        judge = self.judge(task)
        estimate = judge.estimate(*comparisons)
        if estimate is None or not estimate.uncached:
            yield None
            return
        self.steps.start(f"{task.name}: asking {judge.name}", len(comparisons[0]), "comparisons")
        yield self.steps.advance
        self.steps.done()

    def _comparisons(self, matches: Sequence[tuple[Texts, Texts]]) -> Comparisons:
        """Prompts, first and second texts, seed by seed for the prompts of each first."""
        conversations = {prompt.id: prompt.messages for prompt in self.prompts}
        rows = [
            (conversations[prompt], text, second[prompt][seed])
            for first, second in matches
            for prompt, row in first.items()
            for seed, text in enumerate(row)
        ]
        return [prompt for prompt, _, _ in rows], [text for _, text, _ in rows], [text for _, _, text in rows]

    def _answers(self, task: Task, contender: Contender, setting: Setting) -> tuple[dict[str, list[Answer]], float]:
        """By prompt, one a seed, and the seconds that decoding them took."""
        answers: dict[str, list[Answer]] = {}
        seconds = 0.0
        for seed in range(self.seeds_of(task, contender)):
            cell = self.cells.get(task, contender, setting, seed)
            # Of the patient's many answers its own is the first.
            first = cell.sample(0)
            seconds += cell.seconds * len(first) / len(cell.answers)
            for answer in first:
                answers.setdefault(answer.prompt, []).append(answer)
        return answers, seconds

    def _patient_texts(self, task: Task) -> dict[str, list[str]]:
        return _texts(self._answers(task, CONTENDERS[PATIENT], {})[0])

    def _seeds_there(self, task: Task, contender: Contender) -> int:
        """At how many seeds, from the first on, the cells of all settings are files."""
        whole = (
            all(self.cells.has(task, contender, setting, seed) for setting in contender.settings) for seed in self.seeds
        )
        return sum(1 for _ in itertools.takewhile(bool, whole))


def _texts(answers: Mapping[str, Sequence[Answer]]) -> dict[str, list[str]]:
    return {prompt: [answer.text for answer in row] for prompt, row in answers.items()}
