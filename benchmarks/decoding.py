"""What does guidance cost, and how far is the engine from transformers' own decoding?

    python -m benchmarks.decoding [--quick] [--patient builtin:smollm2] [--doctor FOLDER] [--draft FOLDER]
                                  [--small FOLDER] [--output benchmarks/results/decoding.json]

Ways to decode the same prompts with the same sampling (a fixed number of tokens), in one process, after a warm-up of
each, in interleaved rounds of one batch each (a ratio is the median of those of the rounds, told with their quartiles):

- transformers: `generate` of the patient alone;
- patient: our engine, the patient alone;
- guided: our engine with a LoRA doctor on the patient's base, in the patient's own pass (ratio form);
- guided_apart: our engine with the same doctor merged into weights of its own, as one with another base runs;
- logits_processor: the usual way, a `LogitsProcessor` that runs the merged doctor, with its cache, inside `generate`;
- speculative: as guided, with a draft model that guesses ahead; patient_speculative: as patient, with that draft;
- with --small, a LoRA doctor on a smaller base (`llmdoctor shrink`): small_alone, our engine with that base alone;
  small, the patient with that doctor; small_speculative, the same, and the doctor guesses ahead itself.

A full run is made at temperature 1, and what guesses bring also at lower ones, where the next token is easier to guess.

Without --doctor it has the shape that `llmdoctor train` gives it and random numbers for weights: then these are
timings, not quality, and guesses hold as often as they do for such a doctor. The draft is the one in --draft
(`runs/draft` if that is there); without one, a draft is trained for a moment first, too short to be any good.
Peak memory is that of whole processes that decode the patient alone, guided and guided_apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from llmdoctor.threads import spin_briefly

spin_briefly()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import LogitsProcessor, LogitsProcessorList  # noqa: E402
from transformers.utils import logging  # noqa: E402

from benchmarks.memory import peak_where  # noqa: E402
from benchmarks.record import record  # noqa: E402
from llmdoctor.data.prompts import load_prompts  # noqa: E402
from llmdoctor.decoding.adapter import Adapter  # noqa: E402
from llmdoctor.decoding.engine import GuidedDecoder  # noqa: E402
from llmdoctor.decoding.guides import Guide, load_guide  # noqa: E402
from llmdoctor.decoding.request import Completion, Request, SamplingParams  # noqa: E402
from llmdoctor.decoding.tree import Tree  # noqa: E402
from llmdoctor.models.doctor import Doctor, DoctorConfig  # noqa: E402
from llmdoctor.models.draft import DraftModel, load_draft  # noqa: E402
from llmdoctor.models.loading import LoadedModel, load_model  # noqa: E402
from llmdoctor.shrink.drafter import DraftOptions, make_draft  # noqa: E402
from llmdoctor.tfpo.options import DoctorOptions, lora_arguments  # noqa: E402

BETA = 1.0
DRAFT = Path("runs/draft")


@dataclass(frozen=True)
class Plan:
    """How much is decoded.

    Attributes:
        sizes: rows together.
        tokens: of every answer.
        rounds: of which the median is told; in each every way decodes one batch.
        draft_length: longest answer that a draft of a moment learns from.
        memory_tokens: of each of four answers while memory is measured.
        colder: other temperatures at which guessing ahead is measured.
    """

    sizes: tuple[int, ...] = (1, 4, 16)
    tokens: int = 64
    rounds: int = 9
    draft_length: int = 48
    memory_tokens: int = 16
    colder: tuple[float, ...] = (0.6, 0.0)

    @classmethod
    def quick(cls, spec: str) -> Plan:
        """What ends within a minute where bfloat16 is fast, and within three where a processor has no such products."""
        work = engine(load_model(spec), [], 4, SHORT)
        work()
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        if seconds > SLOW:
            return cls((1, 4), 8, 1, 12, SHORT, colder=())
        return cls((1, 16), 16 if seconds < FAST else 8, 1, memory_tokens=SHORT, colder=())


WARM = 12
"""Prompts of a batch of one, each at a turn; and answers after which what a guess costs is thought to be known."""

GUESSING = {
    "speculative_vs_patient": ("speculative", "patient"),
    "speculative_vs_guided": ("speculative", "guided"),
    "patient_speculative_vs_patient": ("patient_speculative", "patient"),
}
COMPARED = {
    "patient_vs_transformers": ("patient", "transformers"),
    "cost_ratio": ("patient", "doctor"),
    "guided_vs_patient": ("guided", "patient"),
    "guided_apart_vs_patient": ("guided_apart", "patient"),
    "guided_vs_logits_processor": ("guided", "logits_processor"),
    "guided_apart_vs_logits_processor": ("guided_apart", "logits_processor"),
}
COMPARED_SMALL = {
    "small_cost_ratio": ("patient", "small_alone"),
    "small_vs_patient": ("small", "patient"),
    "small_speculative_vs_patient": ("small_speculative", "patient"),
    "small_speculative_vs_small": ("small_speculative", "small"),
}

SHORT = 4
"""Tokens of an answer that only warms up."""

FAST, SLOW = 0.18, 0.5
"""Seconds for four such answers above which a quick run does less, and still less."""


class Work(Protocol):
    """Decodes a batch of its prompts, another one at every turn until it begins anew; so many tokens of each answer."""

    def __call__(self, turn: int = 0, length: int = ...) -> None: ...


class DoctorProcessor(LogitsProcessor):
    """Adds β (log π_doctor − log π_patient) to the patient's scores; the doctor keeps a cache of its own."""

    def __init__(self, doctor: Any, mask: torch.Tensor) -> None:
        self.doctor, self.mask, self.cache = doctor, mask, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.cache is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        done = self.doctor(
            input_ids=input_ids if self.cache is None else input_ids[:, -1:],
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0)[:, 0 if self.cache is None else -1 :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = done.past_key_values
        return scores + BETA * (done.logits[:, -1].float() - scores)


def make_doctor(spec: str, folder: Path) -> None:
    """A doctor of the default shape with random numbers in both halves of its adapter."""
    base = load_model(spec)
    doctor = Doctor.from_base(base, lora=lora_arguments(base.model, DoctorOptions()))
    with torch.no_grad():
        for name, parameter in doctor.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    doctor.save_pretrained(folder)


def merged(folder: Path, spec: str) -> LoadedModel:
    return Doctor.from_pretrained(folder, base=load_model(spec)).merged()


def conversations(count: int) -> list[Any]:
    found = [prompt.messages for prompt in load_prompts("builtin:prompts/test")]
    return (found * (1 + count // len(found)))[:count]


def brief_draft(spec: str, folder: Path, length: int) -> None:
    """A draft model of a few seconds' training."""
    make_draft(load_model(spec), load_prompts("builtin:prompts/train"), folder,
               options=DraftOptions(tokens=40 * length, epochs=2, held_out=4, max_new_tokens=length))  # fmt: skip


def asked(guides: list[Guide], rows: int, tokens: int, temperature: float = 1.0) -> list[Request]:
    """A request for each of `rows` prompts, in which all guides are heard."""
    betas = {guide.name: BETA for guide in guides}
    return [
        Request(
            messages, betas=betas, sampling=SamplingParams(max_new_tokens=tokens, temperature=temperature, seed=seed)
        )
        for seed, messages in enumerate(conversations(rows))
    ]


def in_batches(every: list[Any], rows: int) -> list[list[Any]]:
    """So many a batch; a rest is left out, as all batches are to be of one size."""
    return [every[start : start + rows] for start in range(0, len(every) - rows + 1, rows)]


def engine(
    patient: LoadedModel, guides: list[Guide], rows: int, tokens: int,
    draft: DraftModel | Literal["doctors"] | None = None,
    done: list[Completion] | None = None, *, temperature: float = 1.0, prompts: int = 0,
) -> Work:  # fmt: skip
    """Work on at least `prompts` prompts, `rows` at a turn; completions are added to `done`."""
    decoder = GuidedDecoder(patient, guides, max_batch_size=rows, draft=draft)
    # Every way makes the same number of tokens.
    decoder.encoder.stop_ids = frozenset()
    batches = in_batches(asked(guides, max(rows, prompts), tokens, temperature), rows)

    def run(turn: int = 0, length: int = tokens) -> None:
        batch = batches[turn % len(batches)]
        batch = [replace(one, sampling=replace(one.sampling, max_new_tokens=length)) for one in batch]
        completions = decoder.generate(batch)
        assert sum(len(made.token_ids) for made in completions) == rows * length
        if done is not None:
            done.extend(completions)

    return run


def transformers(
    patient: LoadedModel, doctor: Any | None, rows: int, tokens: int, *, temperature: float = 1.0, prompts: int = 0
) -> Work:
    """As `engine`, by `generate`."""
    encoder = GuidedDecoder(patient).encoder
    every = [encoder.prompt_ids(messages) for messages in conversations(max(rows, prompts))]
    batches = in_batches(every, rows)
    pad = patient.tokenizer.pad_token_id
    device = patient.model.device

    @torch.inference_mode()
    def run(turn: int = 0, length: int = tokens) -> None:
        batch = batches[turn % len(batches)]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in batch], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
        extra = {} if doctor is None else {"logits_processor": LogitsProcessorList([DoctorProcessor(doctor, mask)])}
        patient.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=length, eos_token_id=-1, do_sample=True,
            temperature=temperature, top_k=0, pad_token_id=pad, **extra,
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def memory(way: str, spec: str, doctor: Path, rows: int, tokens: int) -> None:
    """Decode in this process alone, and print its peak memory in bytes."""
    patient = load_model(spec)
    guides = []
    if way != "patient":
        guides = [load_guide(doctor, patient, name="it")]
        if way == "guided_apart":
            guides = [replace(guides[0], model=merged(doctor, spec), adapter=None)]
    engine(patient, guides, rows, tokens)()
    print(peak_where(patient.model.device))


def peak(way: str, arguments: argparse.Namespace, doctor: Path, tokens: int) -> int:
    command = [sys.executable, "-m", "benchmarks.decoding", "--memory", way, "--patient", arguments.patient]
    command += ["--doctor", str(doctor), "--memory-tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def guesses(completions: list[Completion]) -> dict[str, float]:
    """How guessing went, over all tokens: those that a pass gave, and the guesses that one made."""
    tokens = sum(len(done.token_ids) for done in completions)
    passes = tokens - sum(done.guesses_held for done in completions)
    return {
        "tokens_per_pass": tokens / passes,
        "guesses_per_pass": sum(done.guessed for done in completions) / passes,
    }


def first_guess(
    draft: DraftModel | Literal["doctors"],
    patient: LoadedModel,
    guides: list[Guide],
    rows: int,
    tokens: int,
    temperature: float,
) -> float:
    """Share of tokens that were guessed right where one guess a token is made, always."""
    decoder = GuidedDecoder(patient, guides, max_batch_size=rows, draft=draft)
    decoder.pace.choose = lambda rows: Tree((0,), (0,))  # type: ignore[method-assign]
    completions = decoder.generate(asked(guides, rows, tokens, temperature))
    return sum(done.guesses_held for done in completions) / sum(done.guessed for done in completions)


def times_as_fast(way: list[float], other: list[float]) -> float:
    """How many times as fast the one is as the other: median over rounds of the ratio of their seconds."""
    return statistics.median(b / a for a, b in zip(way, other, strict=True))


def quartiles(way: list[float], other: list[float]) -> list[float]:
    """Between which the middle half of these ratios lies."""
    found: list[float] = np.quantile([b / a for a, b in zip(way, other, strict=True)], [0.25, 0.75]).tolist()
    return found


@dataclass(frozen=True)
class Loaded:
    """The models of all ways to decode: the patient; its doctor as an adapter beside it, and as a model of its own; the
    small draft that guesses; a doctor on a smaller base, if there is one."""

    patient: LoadedModel
    beside: Guide
    own: LoadedModel
    draft: DraftModel
    small: Guide | None

    def ways(
        self, rows: int, tokens: int, temperature: float, prompts: int
    ) -> tuple[dict[str, Work], dict[str, list[Completion]]]:
        """All ways to decode, by name, and the lists to which those that guess will append what they said.

        Those that are compared most stand next to each other, as the machine's speed may change from one to the next.
        """
        same = {"temperature": temperature, "prompts": prompts}
        patient, beside, own, small = self.patient, self.beside, self.own, self.small
        heard: dict[str, list[Completion]] = {"speculative": [], "patient_speculative": []}
        ways = {
            "transformers": transformers(patient, None, rows, tokens, **same),
            "patient_speculative": engine(patient, [], rows, tokens, self.draft, heard["patient_speculative"], **same),
            "patient": engine(patient, [], rows, tokens, **same),
            "guided": engine(patient, [beside], rows, tokens, **same),
            "speculative": engine(patient, [beside], rows, tokens, self.draft, heard["speculative"], **same),
            "doctor": engine(own, [], rows, tokens, **same),
            "guided_apart": engine(patient, [replace(beside, model=own, adapter=None)], rows, tokens, **same),
            "logits_processor": transformers(patient, own.model, rows, tokens, **same),
        }
        if small is not None:
            said = heard["small_speculative"] = []
            ways["small_alone"] = engine(small.model, [], rows, tokens, **same)
            ways["small"] = engine(patient, [small], rows, tokens, **same)
            ways["small_speculative"] = engine(patient, [small], rows, tokens, "doctors", said, **same)
        return ways, heard


def timed(ways: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round, all ways in every round."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way, work in ways.items():
            start = time.perf_counter()
            work(turn)
            seconds[way].append(time.perf_counter() - start)
    return seconds


def race(
    size: int, ways: Mapping[str, Work], heard: Mapping[str, list[Completion]], plan: Plan
) -> list[dict[str, Any]]:
    """Warm all ways up and time them; a row of results for each."""
    for way, work in ways.items():
        if way not in heard:
            work(length=SHORT)
            continue
        # What is guessed follows what guesses have cost, which takes some passes to be known.
        for turn in range(max(3, WARM // size) if plan.rounds > 1 else 1):
            work(turn)
    for completions in heard.values():
        completions.clear()
    gc.collect()
    seconds = timed(ways, plan.rounds)
    rows = []
    for way, times in seconds.items():
        ratio = times_as_fast(times, seconds["patient"])
        low, high = quartiles(times, seconds["patient"])
        rate = size * plan.tokens / statistics.median(times)
        rows.append({"batch": size, "way": way, "tokens_per_second": rate, "to_patient": ratio, "seconds": times})
        print(f"{size:>5} {way:>19} {rate:>9,.1f} {ratio:>10.2f}  {low:.2f} … {high:.2f}", flush=True)
    return rows


def ratios_of(
    rows: list[dict[str, Any]], way: str, other: str, told: Callable[[list[float], list[float]], Any] = times_as_fast
) -> dict[str, Any]:
    """How many times as fast one way is as another, by batch size: medians over rounds, or `quartiles`."""
    found = {(row["batch"], row["way"]): row["seconds"] for row in rows}
    sizes = dict.fromkeys(row["batch"] for row in rows)
    return {str(size): told(found[size, way], found[size, other]) for size in sizes}


def ratios_and_quartiles(rows: list[dict[str, Any]], ways: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Of these pairs of ways, by name."""
    return {
        **{name: ratios_of(rows, *pair) for name, pair in ways.items()},
        "quartiles": {name: ratios_of(rows, *pair, quartiles) for name, pair in ways.items()},
    }


def guessing(loaded: Loaded, plan: Plan, temperature: float, prompts: int) -> dict[str, Any]:
    """What guesses bring at a temperature."""
    print(f"temperature {temperature}")
    rows: list[dict[str, Any]] = []
    guessed = {}
    for size in plan.sizes:
        ways, heard = loaded.ways(size, plan.tokens, temperature, prompts)
        ways = {way: ways[way] for way in ("patient", "guided", "speculative", "patient_speculative")}
        heard = {way: heard[way] for way in ("speculative", "patient_speculative")}
        rows += race(size, ways, heard, plan)
        guessed[str(size)] = {way: guesses(completions) for way, completions in heard.items()}
    return {
        **ratios_and_quartiles(rows, GUESSING),
        "acceptance": first_guess(
            loaded.draft, loaded.patient, [loaded.beside], plan.sizes[-1], plan.tokens, temperature
        ),
        "guesses": guessed,
        "rows": rows,
    }


def measure(arguments: argparse.Namespace, plan: Plan, doctor: Path, folder: Path) -> dict[str, Any]:
    sizes, tokens, temperature = plan.sizes, plan.tokens, arguments.temperature
    patient = load_model(arguments.patient)
    beside = load_guide(doctor, patient, name="it")
    assert isinstance(beside.adapter, Adapter), f"{arguments.patient} cannot be run with its doctor in one pass"
    small = None if arguments.small is None else load_guide(arguments.small, patient, name="small")
    loaded = Loaded(patient, beside, merged(doctor, arguments.patient), load_draft(folder, patient), small)
    prompts = 1 if arguments.quick else WARM
    rows: list[dict[str, Any]] = []
    guessed: dict[str, Any] = {}
    print(f"{'batch':>5} {'way':>19} {'tokens/s':>9} {'÷ patient':>10}  quartiles")
    for size in sizes:
        ways, heard = loaded.ways(size, tokens, temperature, prompts)
        rows += race(size, ways, heard, plan)
        guessed[str(size)] = {way: guesses(completions) for way, completions in heard.items()}
    beside_small = {}
    if small is not None:
        beside_small["acceptance_small"] = first_guess("doctors", patient, [small], sizes[-1], tokens, temperature)
    measured = ["patient", "guided"] if arguments.quick else ["patient", "guided", "guided_apart"]
    peaks = {way: peak(way, arguments, doctor, plan.memory_tokens) for way in measured}
    return {
        **ratios_and_quartiles(rows, COMPARED | GUESSING | ({} if small is None else COMPARED_SMALL)),
        "acceptance": first_guess(loaded.draft, patient, [beside], sizes[-1], tokens, temperature),
        "acceptance_patient": first_guess(loaded.draft, patient, [], sizes[-1], tokens, temperature),
        **beside_small,
        "guesses": guessed,
        "colder": {str(each): guessing(loaded, plan, each, prompts) for each in plan.colder},
        "memory_ratio": peaks["guided"] / peaks["patient"],
        "memory_ratio_apart": None if arguments.quick else peaks["guided_apart"] / peaks["patient"],
        "peak_bytes": peaks,
        "new_tokens": tokens,
        "temperature": temperature,
        "dtype": str(patient.model.dtype),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two batch sizes, few tokens; a minute on two cores with fast bfloat16"
    )
    parser.add_argument("--patient", default="builtin:smollm2")
    parser.add_argument("--doctor", type=Path, help="a trained LoRA doctor on the patient; a random one if left out")
    parser.add_argument("--draft", type=Path, help="from `llmdoctor draft`")
    parser.add_argument("--small", type=Path, help="a doctor on a smaller base, from `llmdoctor train --base`")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", choices=["patient", "guided", "guided_apart"], help=argparse.SUPPRESS)
    parser.add_argument("--memory-tokens", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments.memory, arguments.patient, arguments.doctor, 4, arguments.memory_tokens)
        return
    # It warns that an end-of-turn token of −1 lets answers run to their full length, which is what is wanted.
    logging.set_verbosity_error()
    brief = arguments.draft is None and not DRAFT.is_dir()
    plan = Plan.quick(arguments.patient) if arguments.quick else Plan()
    with tempfile.TemporaryDirectory() as folder:
        doctor, draft = arguments.doctor, arguments.draft or DRAFT
        if doctor is None:
            doctor = Path(folder) / "doctor"
            make_doctor(arguments.patient, doctor)
        if brief:
            print("no draft model: one is trained for a moment (make a good one with `llmdoctor draft -o runs/draft`)")
            draft = Path(folder) / "draft"
            brief_draft(arguments.patient, draft, plan.draft_length)
        result = measure(arguments, plan, doctor, draft)
    head = {
        "benchmark": "decoding",
        "quick": arguments.quick,
        "patient": arguments.patient,
        "doctor": "random LoRA" if arguments.doctor is None else DoctorConfig.load(doctor).dimension,
        "draft": "trained for a moment" if brief else "trained",
    }
    for name in (
        "patient_vs_transformers", "guided_vs_patient", "guided_vs_logits_processor", "speculative_vs_patient",
        "speculative_vs_guided",
    ):  # fmt: skip
        print(name, json.dumps({size: round(value, 2) for size, value in result[name].items()}))
    print(f"acceptance {result['acceptance']:.2f}  memory_ratio {result['memory_ratio']:.2f}")
    record({**head, **result}, arguments.output)


if __name__ == "__main__":
    main()
