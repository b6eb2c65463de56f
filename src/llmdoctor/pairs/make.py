"""Prompts to preference pairs without human labels.

Two ways: *best-of-K* samples the patient K times per prompt and keeps the best and the worst by a scorer; *faces*
answers each prompt once under each face (RLCD, arXiv 2307.12950) and prefers the positive face's answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmdoctor.data.preferences import PreferencePair, write_pairs
from llmdoctor.data.prompts import Prompt
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.errors import Settings, UserError
from llmdoctor.evaluation.scorers import Scorer
from llmdoctor.files import check_claim, claim, digest, write_json, write_text
from llmdoctor.models.loading import LoadedModel
from llmdoctor.rewards.faces import FacePair

Progress = Callable[[int], None]

_FIX = "Delete that folder, or give another output file."


@dataclass(frozen=True)
class PairOptions:
    """How pairs are made.

    Attributes:
        samples: answers per prompt, K (best-of-K only).
        max_new_tokens: longest answer.
        temperature, top_p: of the patient's sampling.
        min_gap: drop prompts whose best and worst score differ by less, or not at all.
        limit: stop after so many pairs.
        seed: of all draws.
        batch_size: answers decoded together.
    """

    samples: int = 8
    max_new_tokens: int = 48
    temperature: float = 1.0
    top_p: float = 1.0
    min_gap: float = 0.0
    limit: int | None = None
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UserError(f"samples must be at least 2 to have a best and a worst, got {self.samples}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        # Checks the others.
        SamplingParams(temperature=self.temperature, top_p=self.top_p)
        if self.min_gap < 0:
            raise UserError(f"min_gap must not be negative, got {self.min_gap}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit must be at least 1, got {self.limit}")


def make_pairs(
    patient: LoadedModel,
    prompts: Sequence[Prompt],
    output: str | Path,
    *,
    judge: Scorer | FacePair,
    options: PairOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write preference pairs for `prompts` to the file `output`, with the recipe beside it as `NAME.recipe.json`.

    Finished prompts are kept in `NAME.parts/` while it runs, so a killed run goes on where it stopped.

    Args:
        patient: samples the answers.
        prompts: what to answer.
        output: .jsonl or .jsonl.gz.
        judge: a scorer (best-of-K) or a pair of faces (RLCD).
        options: defaults if None.
        progress: called with the number of prompts finished.

    Returns:
        The recipe: settings, versions, fingerprints and counts.

    Raises:
        FingerprintMismatch: the unfinished run in `NAME.parts/` has other settings.
        UserError: no prompts, another kind of file, or no pair was found.
    """
    options = options or PairOptions()
    target = Path(output)
    check_wanted(target, prompts, judge, options)
    recipe = _recipe(prompts, judge, options)
    recipe["patient"] = patient.spec
    recipe["fingerprint"]["patient"] = digest(patient.fingerprint)
    settings = {**_settings(judge, recipe), "patient": {"patient": patient.spec, **patient.fingerprint}}
    parts = _parts_of(target)
    claim(parts, recipe["fingerprint"], _FIX, settings)
    decoder = GuidedDecoder(patient, max_batch_size=options.batch_size)
    pairs: list[PreferencePair] = []
    answered = 0
    for block in _blocks(prompts, options, judge):
        # Named by what it holds: another batch size cuts other blocks.
        part = parts / f"{answered:06d}-{answered + len(block):06d}.json"
        pairs.extend(_block_pairs(part, decoder, block, answered, judge, options))
        answered += len(block)
        if progress:
            progress(len(block))
        if options.limit is not None and len(pairs) >= options.limit:
            break
    pairs = pairs[: options.limit]
    if not pairs:
        raise UserError(f"no prompt gave two usable answers that differ (min_gap {options.min_gap})")
    write_pairs(target, pairs)
    recipe.update(prompts=answered, pairs=len(pairs))
    write_json(target.with_name(f"{target.name}.recipe.json"), recipe)
    for path in sorted(parts.iterdir()):
        path.unlink()
    parts.rmdir()
    return recipe


def check_wanted(target: Path, prompts: Sequence[Prompt], judge: Scorer | FacePair, options: PairOptions) -> None:
    """What `make_pairs` can refuse without a patient, with its errors: told before one is loaded."""
    if not target.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{target}: pairs are written as .jsonl or .jsonl.gz")
    if options.temperature == 0 and not isinstance(judge, FacePair):
        raise UserError("temperature 0 gives every prompt the same answer each time, and no best and worst: raise it")
    if not prompts:
        raise UserError("there are no prompts to answer")
    recipe = _recipe(prompts, judge, options)
    check_claim(_parts_of(target), recipe["fingerprint"], _FIX, _settings(judge, recipe))


def _parts_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.parts")


def _settings(judge: Scorer | FacePair, recipe: dict[str, Any]) -> Settings:
    """What stands behind the recipe's fingerprints; not the faces' whole texts."""
    name = "faces" if isinstance(judge, FacePair) else "scorer"
    return {"judge": {name: judge.name}, "options": recipe["options"]}


def _recipe(prompts: Sequence[Prompt], judge: Scorer | FacePair, options: PairOptions) -> dict[str, Any]:
    """How pairs are made, whoever the patient is."""
    settings = asdict(options)
    del settings["batch_size"]
    made_by = (
        {"method": "faces", "faces": asdict(judge)}
        if isinstance(judge, FacePair)
        else {"method": "best_of_k", "scorer": judge.name}
    )
    return {
        **made_by,
        "options": settings,
        "fingerprint": {
            "prompts": digest([[prompt.id, list(prompt.messages)] for prompt in prompts]),
            "judge": digest(made_by),
            "options": digest(settings),
        },
        "versions": {name: version(name) for name in ("llmdoctor", "torch", "transformers")},
    }


def _blocks(prompts: Sequence[Prompt], options: PairOptions, judge: Scorer | FacePair) -> Iterator[Sequence[Prompt]]:
    answers = 2 if isinstance(judge, FacePair) else options.samples
    size = max(1, options.batch_size // answers)
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _block_pairs(
    path: Path,
    decoder: GuidedDecoder,
    block: Sequence[Prompt],
    first: int,
    judge: Scorer | FacePair,
    options: PairOptions,
) -> list[PreferencePair]:
    if path.is_file():
        return [PreferencePair.from_row(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    pairs = []
    for prompt, answers in zip(block, _answers(decoder, block, first, judge, options), strict=True):
        pair = _choose(prompt, answers, judge, options)
        if pair is not None:
            pairs.append(pair)
    write_text(path, json.dumps([pair.to_row() for pair in pairs], ensure_ascii=False))
    return pairs


def _answers(
    decoder: GuidedDecoder, block: Sequence[Prompt], first: int, judge: Scorer | FacePair, options: PairOptions
) -> list[list[Completion]]:
    if isinstance(judge, FacePair):
        conversations = [[_under(prompt, face) for face in (judge.positive, judge.negative)] for prompt in block]
    else:
        conversations = [[prompt.messages] * options.samples for prompt in block]
    width = len(conversations[0])
    requests = []
    for place, versions in enumerate(conversations):
        for draw, messages in enumerate(versions):
            sampling = SamplingParams(
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                # Every answer of every prompt has a stream of its own, whatever the batch size.
                seed=(options.seed << 40) + ((first + place) << 16) + draw,
            )
            requests.append(Request(tuple(messages), sampling=sampling))
    done = decoder.generate(requests)
    return [done[start : start + width] for start in range(0, len(done), width)]


def _under(prompt: Prompt, face: str) -> tuple[Any, ...]:
    turns = [message for message in prompt.messages if message["role"] != "system"]
    return ({"role": "system", "content": face}, *turns)


def _choose(
    prompt: Prompt, answers: Sequence[Completion], judge: Scorer | FacePair, options: PairOptions
) -> PreferencePair | None:
    whole = [_whole_characters(answer) for answer in answers if answer.finish_reason != "error"]
    usable = [answer for answer in whole if answer.text.strip()]
    if len(usable) < 2:
        return None
    if isinstance(judge, FacePair):
        best, worst = usable
    else:
        scores = judge([answer.text for answer in usable])
        order = sorted(range(len(usable)), key=lambda index: (scores[index], index))
        gap = scores[order[-1]] - scores[order[0]]
        if gap == 0 or gap < options.min_gap:
            return None
        best, worst = usable[order[-1]], usable[order[0]]
    # As whoever reads the pairs compares them.
    if best.text.strip() == worst.text.strip():
        return None
    return PreferencePair(
        prompt=prompt.messages,
        chosen=best.text,
        rejected=worst.text,
        chosen_complete=best.finish_reason == "stop",
        rejected_complete=worst.finish_reason == "stop",
    )


def _whole_characters(answer: Completion) -> Completion:
    """The answer without the part of a character that a length limit may leave at its end."""
    return answer if answer.finish_reason == "stop" else replace(answer, text=answer.text.rstrip("\ufffd"))
