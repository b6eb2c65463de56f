"""One method's answers at one setting, task and seed: decoded once, kept as they are, read back ever after."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmdoctor.baselines.best_of_n import BestOfN, Rewarder, best_of_n_kl
from llmdoctor.bench.judging import finite_rewards
from llmdoctor.bench.kit import READOUT, Kit, Steps, only_one
from llmdoctor.bench.methods import CONTENDERS, PATIENT, SAMPLES, Built, Contender, Setting
from llmdoctor.bench.options import BenchOptions, Task
from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.prompts import Prompt
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.files import atomic_path, digest

SCHEMA_VERSION = 1
MARKED_PROMPTS = 6
"""Prompts whose answers keep, token by token, how far guidance moved the choice."""


@dataclass(frozen=True)
class Answer:
    """What is kept of a completion.

    Attributes:
        prompt: its id.
        sample: number of the answer to that prompt.
        text: without stop token.
        tokens: drawn.
        finish: why it ended.
        kl: estimate of KL to the patient from this answer, nats.
        patient_logp: Σ log π_patient, nats.
        patient_forwards, guide_forwards: as `Completion`'s.
        marks: of a few answers, each token's text and log π_dec − log π_patient.
    """

    prompt: str
    sample: int
    text: str
    tokens: int
    finish: str
    kl: float
    patient_logp: float
    patient_forwards: int
    guide_forwards: int
    marks: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """Answers with the seconds their decoding took."""

    answers: list[Answer]
    seconds: float

    def sample(self, number: int) -> list[Answer]:
        """The answers of that number, one a prompt, in the order of the prompts."""
        return [answer for answer in self.answers if answer.sample == number]


class Cells:
    """All answers of a comparison, below one folder.

    Args:
        folder: of the files, `TASK/METHOD/SETTING-seedN.jsonl.gz`; TASK as `BenchOptions.folder` names it.
        options: how large.
        prompts: what is answered.
        kits: of the tasks, by name.
        steps: told of progress.
    """

    def __init__(
        self, folder: Path, options: BenchOptions, prompts: Sequence[Prompt], kits: Mapping[str, Kit], steps: Steps
    ) -> None:
        self.folder = folder
        self.options = options
        self.prompts = list(prompts)
        self.kits = kits
        self.steps = steps
        self._told: set[Path] = set()
        self._rewarded: dict[tuple[str, str, int], tuple[list[float], float]] = {}

    def get(self, task: Task, contender: Contender, setting: Setting, seed: int, variant: str = "") -> Cell:
        """The cell, decoded now if it is not there yet.

        Raises:
            FingerprintMismatch: the file there holds answers of other prompts, lengths or models.
        """
        path = self._path(task, contender, setting, seed, variant)
        stamp = self._stamp(task, contender, setting, seed)
        if not path.is_file():
            lock = self.folder / f".{'-'.join(path.relative_to(self.folder).parts)}.lock"
            # Another shard may be drawing them: the patient's answers serve several.
            with only_one(lock, path, self.steps):
                if not path.is_file():
                    cell = self._decode(task, contender, setting, seed, variant)
                    # Recorded, not compared: another precision changes answers no more than another processor does.
                    _write(path, stamp, cell, self.kits[task.name].patient.fingerprint.get("dtype", ""))
            lock.unlink(missing_ok=True)
        cell = self._read(path, stamp)
        broken = sum(answer.finish == "error" for answer in cell.answers)
        if broken and path not in self._told:
            self._told.add(path)
            self.steps.say(
                f"{path}: {broken} of {len(cell.answers)} answers end with an error (a model returned NaN, or memory "
                "did not hold the prompt); they count as far as they go"
            )
        return cell

    def has(self, task: Task, contender: Contender, setting: Setting, seed: int, variant: str = "") -> bool:
        """Whether the cell is there."""
        return self._path(task, contender, setting, seed, variant).is_file()

    def prompts_of(self, contender: Contender) -> list[Prompt]:
        """The prompts that the method answers."""
        return self.prompts[: self.options.transfer_q_prompts] if contender.few_prompts else self.prompts

    def _path(self, task: Task, contender: Contender, setting: Setting, seed: int, variant: str) -> Path:
        where = "any" if contender.any_task else self.options.folder(task.name)
        knobs = ",".join(f"{name}={value:g}" for name, value in setting.items()) or "only"
        return self.folder / where / (variant or contender.name) / f"{knobs}-seed{seed}.jsonl.gz"

    def _stamp(self, task: Task, contender: Contender, setting: Setting, seed: int) -> dict[str, str]:
        options = self.options
        # Not the judge: answers that are there can be judged again by another one.
        learned = {"source": task.pairs, "faces": task.faces, "pairs": options.pairs, "epochs": options.epochs}
        kit = self.kits[task.name]
        recipes = {kind: kit.recipe(kind, seed) for kind in contender.trained}
        ahead = {"rollout_tokens": options.rollout_tokens} if contender.few_prompts else {}
        prompts = [[prompt.id, list(prompt.messages)] for prompt in self.prompts_of(contender)]
        return {
            "patient": options.patient,
            # What learns nothing of a task has no base.
            "base": options.patient if contender.any_task else options.base or options.patient,
            "prompts": digest(prompts),
            "weights": digest([kit.weights["patient"], "" if contender.any_task else kit.weights["base"]]),
            "learned": digest({} if contender.any_task else learned),
            "lesson": "" if contender.any_task else kit.lesson,
            "recipes": digest(recipes),
            "length": str(options.max_new_tokens),
            "setting": digest({**setting, **ahead}),
            "seed": str(seed),
        }

    def _decode(self, task: Task, contender: Contender, setting: Setting, seed: int, variant: str) -> Cell:
        if contender.build is None:
            return self._choose(task, contender, int(setting["n"]), seed)
        built = contender.build(self.kits[task.name], seed, setting)
        prompts = self.prompts_of(contender)
        requests = [
            self._request(built, prompt, place, sample, seed)
            for place, prompt in enumerate(prompts)
            for sample in range(built.samples)
        ]
        knobs = ", ".join(f"{name} {value:g}" for name, value in setting.items())
        name = " ".join(filter(None, [variant or contender.name, knobs]))
        where = "" if contender.any_task else f"{task.name}, "
        self.steps.start(f"{where}seed {seed}: {name}", len(requests), "answers")
        start = time.perf_counter()
        done = built.decoder.generate(requests, on_done=lambda index, completion: self.steps.advance())
        seconds = time.perf_counter() - start
        self.steps.done()
        if all(completion.finish_reason == "error" for completion in done):
            raise UserError(
                f"{where}seed {seed}: every answer of {name} ends with an error: a model returned NaN, or memory does "
                "not even hold one prompt"
            )
        answers = [
            _answer(request, completion, place % built.samples, self._marks(built, place, completion))
            for place, (request, completion) in enumerate(zip(requests, done, strict=True))
        ]
        return Cell(answers, seconds)

    def _choose(self, task: Task, contender: Contender, n: int, seed: int) -> Cell:
        """Best-of-n of the patient's own answers, which are decoded once for every n."""
        samples = self.get(task, CONTENDERS[PATIENT], {}, seed)
        rewards, scoring = self._rewards(task, contender.trained[0], seed, samples.answers)
        seconds = (scoring + samples.seconds) * n / SAMPLES
        by_prompt: dict[str, list[tuple[float, Answer]]] = {}
        for reward, answer in zip(rewards, samples.answers, strict=True):
            if answer.sample < n:
                by_prompt.setdefault(answer.prompt, []).append((reward, answer))
        kept = []
        for every in by_prompt.values():
            # As `BestOfN`: one that a model broke off is no answer.
            tries = [entry for entry in every if entry[1].finish != "error"] or every
            best = max(tries, key=lambda entry: entry[0])[1]
            kept.append(
                replace(
                    best,
                    sample=0,
                    kl=best_of_n_kl(n),
                    patient_forwards=sum(answer.patient_forwards for _, answer in every),
                    guide_forwards=sum(answer.tokens for _, answer in every),
                )
            )
        return Cell(kept, seconds)

    def _rewards(self, task: Task, judge: str, seed: int, answers: Sequence[Answer]) -> tuple[list[float], float]:
        """What a judge of the kit's gives the patient's answers, which serve every n, and the seconds that took."""
        if (task.name, judge, seed) not in self._rewarded:
            kit = self.kits[task.name]
            conversations = {prompt.id: prompt.messages for prompt in self.prompts}
            of_states = judge == READOUT
            model: Rewarder = kit.readout() if of_states else kit.reward_model(seed)
            start = time.perf_counter()
            rewards = model.score(
                [conversations[answer.prompt] for answer in answers],
                [answer.text for answer in answers],
                complete=[answer.finish == "stop" for answer in answers],
            )
            name = "read-out" if of_states else "reward model"
            finite_rewards(f"{task.name}: the {name} of seed {seed}", rewards)
            self._rewarded[task.name, judge, seed] = list(rewards), time.perf_counter() - start
        return self._rewarded[task.name, judge, seed]

    @staticmethod
    def _encoder(decoder: Any) -> ChatEncoder:
        """That of the decoder that draws; best-of-n only chooses among its answers."""
        drawing: Any = decoder.inner if isinstance(decoder, BestOfN) else decoder
        encoder: ChatEncoder = drawing.encoder
        return encoder

    def _marks(self, built: Built, place: int, completion: Completion) -> list[list[Any]]:
        if place >= MARKED_PROMPTS or not built.request.get("betas"):
            return []
        texts = self._encoder(built.decoder).token_texts(completion.token_ids)
        shifts = zip(completion.logps, completion.patient_logps, strict=True)
        return [[text, round(ours - theirs, 3)] for text, (ours, theirs) in zip(texts, shifts, strict=True)]

    def _request(self, built: Built, prompt: Prompt, place: int, sample: int, seed: int) -> Request:
        sampling = SamplingParams(
            max_new_tokens=self.options.max_new_tokens,
            seed=(seed << 40) + (place << 16) + sample,
            **built.sampling,
        )
        return Request(prompt.messages, sampling=sampling, id=prompt.id, **built.request)

    def _read(self, path: Path, stamp: Mapping[str, str]) -> Cell:
        try:
            with gzip.open(path, "rt", encoding="utf-8") as handle:
                head = json.loads(handle.readline())
                rows = [json.loads(line) for line in handle]
            if (schema := head["schema_version"]) != SCHEMA_VERSION:
                raise UserError(f"{path} has schema version {schema}; this version reads {SCHEMA_VERSION}")
            stored, cell = head["stamp"], Cell([Answer(**row) for row in rows], float(head["seconds"]))
        except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is broken ({error}); delete it and run again") from error
        # Earlier files say less: nothing of weights and of the pairs themselves.
        stored = {**stamp, **stored}
        if stored != stamp:
            raise FingerprintMismatch(str(path), stored, dict(stamp), "Give another output folder, or delete it.")
        return cell


def _answer(request: Request, done: Completion, sample: int, marks: list[list[Any]]) -> Answer:
    return Answer(
        prompt=request.id,
        sample=sample,
        text=done.text,
        tokens=len(done.token_ids),
        finish=done.finish_reason,
        kl=round(done.kl, 4),
        patient_logp=round(sum(done.patient_logps), 4),
        patient_forwards=done.patient_forwards,
        guide_forwards=done.guide_forwards,
        marks=marks,
    )


def _write(path: Path, stamp: Mapping[str, str], cell: Cell, dtype: str) -> None:
    head = {
        "schema_version": SCHEMA_VERSION,
        "stamp": stamp,
        "seconds": round(cell.seconds, 6),
        "dtype": dtype,
        "versions": {name: version(name) for name in ("llmdoctor", "torch", "transformers", "peft")},
    }
    lines: Iterable[dict[str, Any]] = (head, *map(asdict, cell.answers))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with atomic_path(path) as temporary:
        # A gzip header holds a time unless it is blanked.
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
