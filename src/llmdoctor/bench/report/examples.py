"""A few answers of a comparison, with the tokens where guidance moved the choice."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdoctor.bench.methods import CONTENDERS, DOCTOR, PATIENT
from llmdoctor.bench.options import folder_of
from llmdoctor.bench.report.looks import Look, look, setting_text
from llmdoctor.bench.report.results import BenchResults
from llmdoctor.data.formats import Message
from llmdoctor.data.prompts import load_prompts
from llmdoctor.errors import UserError
from llmdoctor.evaluation.heatmap import HeatToken, guided_tokens, visible
from llmdoctor.files import digest

METHODS = (PATIENT, DOCTOR, "dpo", "genarm")
_PROMPTS = 6


@dataclass(frozen=True, slots=True)
class Told:
    """One method's answer."""

    look: Look
    setting: str
    kl: float
    tokens: list[HeatToken]
    cut: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, by its messages or else its id, and the answers to it."""

    messages: list[dict[str, str]]
    answers: list[Told]


def read_examples(results: BenchResults) -> tuple[dict[str, list[Example]], str]:
    """Answers of the first seed to the first prompts, by task, and why there is not more.

    Every method answers at a setting that was its best on one half of the prompts.

    Raises:
        UserError: a file of raw answers is broken.
    """
    raw = results.folder / "raw"
    if not raw.is_dir():
        return {}, "The raw answers are not in this folder."
    prompts, note = _prompts(results)
    examples: dict[str, list[Example]] = {}
    for task in results.tasks:
        answers = {
            method: (setting, _read(_path(raw / _folder(results, task, method), method, setting)))
            for method, setting in _settings(results, task).items()
        }
        found = {method: entry for method, entry in answers.items() if entry[1]}
        ids = list(dict.fromkeys(id for _, rows in found.values() for id in rows))[:_PROMPTS]
        if DOCTOR in found:
            examples[task] = [_example(id, prompts, found) for id in ids if id in found[DOCTOR][1]]
    if not examples and not note:
        note = "No answers of LLMdoctor at its best setting are in this folder."
    return examples, note


def _prompts(results: BenchResults) -> tuple[Mapping[str, Sequence[Message]], str]:
    """The conversations by id; where they cannot be had for certain, none, and why."""
    record = results.records.get("table.json", {})
    options = record.get("options")
    if not options:
        return {}, "run.json does not say which prompts table.json is about: only their ids are shown."
    try:
        prompts = load_prompts(options["prompts"], limit=options["prompt_count"])
    except UserError as error:
        return {}, f"The prompts cannot be read ({error}): only their ids are shown."
    if digest([[prompt.id, list(prompt.messages)] for prompt in prompts]) != record.get("prompts_hash"):
        return {}, "The prompts have changed since: only their ids are shown."
    return {prompt.id: prompt.messages for prompt in prompts}, ""


def _settings(results: BenchResults, task: str) -> dict[str, dict[str, float]]:
    settings: dict[str, dict[str, float]] = {}
    for row in results.table:
        if row["task"] == task and row["at"] == "best":
            settings.setdefault(DOCTOR, row["doctor_settings"][0])
            settings.setdefault(row["method"], row["settings"][0])
    return {method: settings[method] for method in METHODS if method in settings}


def _folder(results: BenchResults, task: str, method: str) -> str:
    options = results.records.get("table.json", {}).get("options", {})
    own = folder_of(task, options.get("base", ""), options.get("patient", ""))
    return "any" if CONTENDERS[method].any_task else own


def _path(folder: Path, method: str, setting: Mapping[str, float]) -> Path:
    # As `bench.cells.Cells` names them.
    knobs = ",".join(f"{name}={value:g}" for name, value in setting.items()) or "only"
    return folder / method / f"{knobs}-seed0.jsonl.gz"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The first prompts' first answers, by id; nothing where there is no file."""
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as handle:
            handle.readline()
            for line in handle:
                answer = json.loads(line)
                if answer["sample"] == 0:
                    found[answer["prompt"]] = answer
                if len(found) == _PROMPTS:
                    break
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        raise UserError(f"{path} is broken ({error!r}); delete it and run the bench again") from error
    return found


def _example(
    id: str,
    prompts: Mapping[str, Sequence[Message]],
    found: Mapping[str, tuple[Mapping[str, float], Mapping[str, Mapping[str, Any]]]],
) -> Example:
    messages = [(str(turn["role"]), turn["content"]) for turn in prompts.get(id, [])] or [("prompt", id)]
    return Example(
        [{"role": visible(role), "content": visible(content)} for role, content in messages],
        [_told(method, setting, rows[id]) for method, (setting, rows) in found.items() if id in rows],
    )


def _told(method: str, setting: Mapping[str, float], answer: Mapping[str, Any]) -> Told:
    marks = answer["marks"] or [[answer["text"], 0.0]]
    tokens = guided_tokens([text for text, _ in marks], [shift for _, shift in marks])
    return Told(look(method), setting_text(setting), answer["kl"], tokens, answer["finish"] == "length")
