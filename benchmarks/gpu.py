"""What `benchmarks.decoding` asks, on one GPU and at the shapes of larger patients: timings only.

    python -m benchmarks.gpu [--patients 1.5b,7b,13b] [--minutes 8] [--output benchmarks/results/gpu.json]
    python -m benchmarks.gpu --device cpu --tiny      (a rehearsal without a GPU; its numbers mean nothing)

All weights are random and made on the device in bfloat16, so nothing is downloaded but a small tokenizer, and nothing
is said about quality. A patient's vocabulary is enlarged where the tokenizer has more tokens than it. Ways to decode
the same prompts with the same sampling (temperature 1, a fixed number of tokens), in one process, after a warm-up of
each, in interleaved rounds, as many as the time allows:

- transformers: `generate` of the patient alone;
- patient: our engine, the patient alone;
- guided: our engine with a LoRA doctor (rank 16, upper half of the layers) in the patient's own pass (ratio form);
- doctor: our engine, the bare small doctor alone; it is a quarter as wide and half as deep as the patient;
- guided_small: our engine with the small doctor beside the patient: an adapter on a small base of its own, with that
  base as its reference (ratio form), both in one pass;
- logits_processor: the usual way, a `LogitsProcessor` inside `generate` that runs a doctor of the patient's own size,
  as a merged adapter is, with its cache; logits_processor_small: the same with the bare small doctor;
- speculative_A: as guided, guessing ahead with a draft of the usual shape (one layer, 16,384 tokens);
- speculative_small_A: as guided_small, the small doctor guessing ahead itself.

Random weights never guess right, so how often guesses hold cannot be measured here. It is given instead:
guesses are made as ever, and then the first candidate at a place is made to hold with probability A, and no other
candidate ever. What holds is what guided decoding without guesses has drawn; the tokens drawn are replaced by those,
because rounding in passes of other shapes would lead random weights astray. Everything that decoding costs is paid.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config
from transformers.utils import logging

from benchmarks.decoding import asked, engine, guesses, times_as_fast, transformers
from benchmarks.record import circumstances, keep, record
from benchmarks.throughput import WatchedDecoder
from llmdoctor.decoding.adapter import Adapter, LayerDelta, LowRank
from llmdoctor.decoding.guides import Guide
from llmdoctor.decoding.request import Completion
from llmdoctor.decoding.row import Row
from llmdoctor.decoding.tree import Tree
from llmdoctor.decoding.ward import Ward
from llmdoctor.errors import UserError
from llmdoctor.models import builtin
from llmdoctor.models.draft import DraftModel
from llmdoctor.models.layers import weights_read
from llmdoctor.models.loading import LoadedModel, tokenizer_fingerprint
from llmdoctor.shrink.drafter import DraftOptions
from llmdoctor.tfpo.options import DoctorOptions

ACCEPTANCES = (0.5, 0.7, 0.8)
SIZES = (1, 4, 16)
DTYPE = torch.bfloat16
TOKENIZER = "builtin:smollm2"

_ROOM = 1.3
"""Memory that decoding takes in all, over that of the weights: caches, scores, what the allocator leaves in holes."""


def shapes(tiny: bool) -> dict[str, Any]:
    """Configs by name: of Qwen2.5-1.5B, Qwen2.5-7B and Llama-2-13B, or very small ones of the same kinds."""
    if tiny:
        return {
            "tiny-qwen": _qwen(4, 64, 4, 2, 128, 512, tied=True),
            "tiny-llama": _llama(2, 64, 4, 128, 512),
        }
    return {
        "1.5b": _qwen(28, 1536, 12, 2, 8960, 151936, tied=True),
        "7b": _qwen(28, 3584, 28, 4, 18944, 152064, tied=False),
        "13b": _llama(40, 5120, 40, 13824, 32000),
    }


def _qwen(layers: int, width: int, heads: int, key_heads: int, inner: int, vocabulary: int, *, tied: bool) -> Any:
    return Qwen2Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=key_heads,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def _llama(layers: int, width: int, heads: int, inner: int, vocabulary: int) -> Any:
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=False, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def small_shape(config: Any) -> Any:
    """A quarter as wide, with heads of the same width, and half as deep: some 3 to 7 % of the weights."""
    small = copy.deepcopy(config)
    small.hidden_size //= 4
    small.intermediate_size //= 4
    small.num_attention_heads //= 4
    small.num_key_value_heads = max(1, config.num_key_value_heads // 4)
    small.num_hidden_layers = max(1, config.num_hidden_layers // 2)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    return small


@contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """Inside, new tensors are made on the device and, unless they say otherwise, in `DTYPE`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


class Kit:
    """Makes models of random weights on one device, all with one tokenizer."""

    def __init__(self, device: torch.device, tokenizer: Any) -> None:
        self.device = device
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)

    def model(self, config: Any, name: str) -> LoadedModel:
        with made_on(self.device):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=DTYPE)
        model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        model.eval().requires_grad_(False)
        fingerprint = {"model": name, "tokenizer": self._tokenizer_fingerprint, "template": "", "dtype": "bfloat16"}
        return LoadedModel(model, self.tokenizer, name, fingerprint)

    def draft(self, patient: LoadedModel) -> DraftModel:
        options = DraftOptions()
        width = int(patient.model.get_output_embeddings().weight.shape[0])
        layers = range(patient.model.config.num_hidden_layers - options.layers, patient.model.config.num_hidden_layers)
        with made_on(self.device):
            draft = DraftModel(patient.model, layers, torch.arange(min(options.vocabulary, width)))
        return draft.requires_grad_(False).eval()

    def adapter(self, model: Any) -> Adapter:
        """Of the shape that `llmdoctor train` gives a doctor."""
        options = DoctorOptions()
        layers = list(model.get_decoder().layers)
        first = len(layers) - max(1, round(len(layers) * options.lora_layers))

        def pair(*linears: Any) -> LowRank:
            """Adapters of several linear maps of one input, as one."""
            rank, width = options.lora_rank, linears[0].in_features
            down = torch.randn(rank * len(linears), width, device=self.device, dtype=torch.float32) / width**0.5
            ups = [0.01 * torch.randn(part.out_features, rank, device=self.device, dtype=torch.float32)
                   for part in linears]  # fmt: skip
            return LowRank(down, torch.block_diag(*ups), linears[0].weight)

        found = {}
        for number, layer in enumerate(layers[first:], first):
            attention, mlp = layer.self_attn, layer.mlp
            found[number] = LayerDelta(
                qkv=pair(attention.q_proj, attention.k_proj, attention.v_proj), out=pair(attention.o_proj),
                gate_up=pair(mlp.gate_proj, mlp.up_proj), down=pair(mlp.down_proj),
            )  # fmt: skip
        return Adapter(found)

    def beside(self, patient: LoadedModel) -> Guide:
        """A LoRA doctor in the patient's own pass."""
        return Guide("it", patient, "patient", adapter=self.adapter(patient.model))

    def apart(self, base: LoadedModel) -> Guide:
        """A LoRA doctor on a base of its own, which is its reference too."""
        return Guide("it", base, base, adapter=self.adapter(base.model))


class ScriptedDecoder(WatchedDecoder):
    """Draws as ever, and then says what was written for it; its draft's guesses hold as often as it is told.

    Args:
        script: of each row, the tokens.
        acceptance: how often the first candidate at a place is made to hold.
    """

    def __init__(self, *args: Any, script: Sequence[Sequence[int]], acceptance: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._script = script
        # Place by place, so that it does not matter from where a place is guessed.
        draw = np.random.default_rng(0)
        self._holds = [(draw.random(len(tokens)) < acceptance).tolist() for tokens in script]
        self.rows: list[Row] = []

    def _open(self, *args: Any) -> Row:
        row = super()._open(*args)
        self.rows.append(row)
        return row

    def _draw_block(self, ward: Ward, logits: list[Tensor], places: list[int], guided: bool) -> list[int]:
        super()._draw_block(ward, logits, places, guided)
        said = []
        for place in places:
            row = ward.rows[place]
            ids = row.completion.token_ids
            ids[-1] = self._script[row.index][len(ids) - 1]
            said.append(ids[-1])
        return said

    @contextmanager
    def guessing(self) -> Iterator[None]:
        """Inside, guesses are the script's."""
        own = Ward._guess

        def guess(ward: Ward, tree: Tree, inner: Sequence[int], says: list[Tensor]) -> None:
            first = ward.guesses.shape[1]
            own(ward, tree, inner, says)
            depths = {node: depth for depth, level in enumerate(tree.levels) for node in level}
            nodes = range(first, ward.guesses.shape[1])
            changed = [
                [self._guess(row, depths[node], tree.ranks[node - 1]) for node in nodes] for row in ward.rows
            ]  # fmt: skip
            ward.guesses[:, first:] = torch.tensor(changed, device=ward.guesses.device)

        with mock.patch.object(Ward, "_guess", guess):
            yield

    def _guess(self, row: Row, depth: int, rank: int) -> int:
        script, place = self._script[row.index], len(row.completion.token_ids) + depth - 1
        if place >= len(script):
            return 0
        if rank == 0 and self._holds[row.index][place]:
            return script[place]
        # Any other token will do, and the first ids are in every vocabulary.
        return (script[place] + 1 + rank) % 256

    @property
    def acceptance(self) -> float | None:
        """How often the first candidate held, where it was looked at."""
        looked_at = sum(float(row.guesses_tried[0]) for row in self.rows)
        return sum(float(row.guesses_held[0]) for row in self.rows) / looked_at if looked_at else None


def scripted(
    patient: LoadedModel, guide: Guide, draft: DraftModel | Literal["doctors"], script: list[list[int]],
    acceptance: float, tokens: int, done: list[Completion],
) -> tuple[Callable[[], None], ScriptedDecoder]:  # fmt: skip
    """Work that decodes the script guessing ahead; completions of every run are added to `done`."""
    decoder = ScriptedDecoder(
        patient, [guide], max_batch_size=len(script), draft=draft, script=script, acceptance=acceptance
    )
    requests = asked([guide], len(script), tokens)

    def run() -> None:
        with decoder.guessing():
            completions = decoder.generate(requests)
        assert [made.token_ids for made in completions] == script
        done.extend(completions)

    return run, decoder


@dataclass
class Clock:
    """Shares what is left of the time evenly among what is left to do.

    Attributes:
        ends: seconds of `time.perf_counter`.
        left: parts to do.
    """

    ends: float
    left: int

    def part(self) -> float:
        """When the next part should end."""
        now = time.perf_counter()
        self.left -= 1
        return now + max(0.0, self.ends - now) / (self.left + 1)


@dataclass(frozen=True)
class Plan:
    """How much is done: rows decoded together, new tokens a row, rounds at most."""

    sizes: tuple[int, ...] = SIZES
    tokens: int = 64
    rounds: int = 3


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds that the device takes for it."""
    _synchronise(device)
    start = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _let_go(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak(patient: LoadedModel, make: Callable[[], list[Guide]], plan: Plan) -> int | None:
    """Bytes allocated at most while 4 rows are decoded with these guides and nothing else is on the device."""
    device = patient.model.device
    if device.type != "cuda":
        return None
    guides = make()
    work = engine(patient, guides, 4, plan.tokens)
    # The first run fuses the weights, layer by layer, and sets libraries up.
    work()
    _let_go(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    found = torch.cuda.max_memory_allocated(device)
    del work, guides
    _let_go(device)
    return int(found)


def weight_bytes(config: Any) -> int:
    """Bytes of the weights of a model of this shape, found without making it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=DTYPE)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def free_bytes(device: torch.device) -> float:
    """Free on the device; without bound on a CPU, where only tiny models are made."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


@dataclass(frozen=True)
class Cast:
    """Models of one patient's measurements: it, its doctors and what guesses for it."""

    patient: LoadedModel
    beside: Guide
    small: LoadedModel
    apart: Guide
    draft: DraftModel
    same_size: LoadedModel | None


SPECULATIVE = ("speculative", "speculative_small")
"""Ways that guess: a draft beside the adapter, and the small doctor itself."""

Heard = dict[tuple[str, str], tuple[list[Completion], ScriptedDecoder]]
"""By way and acceptance: what was drawn, and the decoder that counted its guesses."""


def measure(kit: Kit, name: str, config: Any, plan: Plan, clock: Clock) -> dict[str, Any]:
    """Everything about one patient."""
    if len(kit.tokenizer) > config.vocab_size:
        print(f"{name}: {len(kit.tokenizer):,} tokens in its vocabulary, not {config.vocab_size:,}: the tokenizer's")
        config.vocab_size = len(kit.tokenizer)
    small_config = small_shape(config)
    twice = has_room(kit, config, small_config)
    patient = kit.model(config, name)
    peaks = {
        "patient": peak(patient, lambda: [], plan),
        "guided": peak(patient, lambda: [kit.beside(patient)], plan),
        "guided_small": peak(patient, lambda: [kit.apart(kit.model(small_config, "small"))], plan),
    }
    small = kit.model(small_config, f"{name}-small")
    same_size = kit.model(config, f"{name}-merged") if twice else None
    if same_size is None:
        print(f"{name}: no room for a doctor of its own size beside it, so there is no logits_processor")
    cast = Cast(patient, kit.beside(patient), small, kit.apart(small), kit.draft(patient), same_size)
    rows: list[dict[str, Any]] = []
    seconds: dict[tuple[int, str], list[float]] = {}
    acceptances = [f"{acceptance:g}" for acceptance in ACCEPTANCES]
    speculation: dict[str, dict[str, dict[str, Any]]] = {
        way: {acceptance: {} for acceptance in acceptances} for way in SPECULATIVE
    }
    for size in plan.sizes:
        until = clock.part()
        ways, heard = warmed_up(cast, size, plan, acceptances)
        times: dict[str, list[float]] = {way: [] for way in ways}
        while len(times["patient"]) < plan.rounds and (not times["patient"] or time.perf_counter() < until):
            for way, work in ways.items():
                times[way].append(timed(work, kit.device))
        for way, own in times.items():
            seconds[size, way] = own
            rate, ratio = size * plan.tokens / statistics.median(own), times_as_fast(own, times["patient"])
            rows.append({
                "patient": name, "batch": size, "way": way, "tokens_per_second": rate, "to_patient": ratio,
                "seconds": own,
            })  # fmt: skip
            print(f"{name:>10} {size:>5} {way:>22} {rate:>10,.1f} {ratio:>10.2f}", flush=True)
        for (way, key), (completions, decoder) in heard.items():
            speculation[way][key][str(size)] = {"acceptance": decoder.acceptance, **guesses(completions)}
    return {
        **all_ratios(seconds, plan.sizes, acceptances),
        "speculation": speculation["speculative"],
        "speculation_small": speculation["speculative_small"],
        "memory_ratio": over_patient(peaks, "guided"),
        "memory_ratio_small": over_patient(peaks, "guided_small"),
        "peak_bytes": peaks,
        "weights_read": {
            "patient": weights_read(patient.model),
            "doctor": weights_read(small.model),
            "draft": cast.draft.weights_read(),
        },
        "vocabulary": config.vocab_size,
        "rows": rows,
    }


def has_room(kit: Kit, config: Any, small_config: Any) -> bool:
    """Whether there is room for a second model of the patient's shape beside it.

    Raises:
        DoesNotFit: there is none for the patient and its small doctor.
    """
    whole, small = weight_bytes(config), weight_bytes(small_config)
    need, free = _ROOM * (whole + small), free_bytes(kit.device)
    if need > free:
        raise DoesNotFit(f"it needs about {need / 2**30:.0f} GiB, and {free / 2**30:.0f} are free")
    return bool(_ROOM * (2 * whole + small) <= free)


def warmed_up(cast: Cast, size: int, plan: Plan, acceptances: list[str]) -> tuple[dict[str, Callable[[], None]], Heard]:
    """Every way to decode `size` rows, each run before, and what the speculative ones will draw."""
    drawn: list[Completion] = []
    ways = {
        "transformers": transformers(cast.patient, None, size, plan.tokens),
        "patient": engine(cast.patient, [], size, plan.tokens),
        "guided": engine(cast.patient, [cast.beside], size, plan.tokens, done=drawn),
        "doctor": engine(cast.small, [], size, plan.tokens),
        "guided_small": engine(cast.patient, [cast.apart], size, plan.tokens),
        "logits_processor_small": transformers(cast.patient, cast.small.model, size, plan.tokens),
    }
    if cast.same_size is not None:
        ways["logits_processor"] = transformers(cast.patient, cast.same_size.model, size, plan.tokens)
    for work in ways.values():
        work()
    script = [done.token_ids for done in drawn[:size]]
    heard: Heard = {}
    guessing = dict(zip(SPECULATIVE, [(cast.beside, cast.draft), (cast.apart, "doctors")], strict=True))
    for way, key in itertools.product(SPECULATIVE, acceptances):
        completions: list[Completion] = []
        work, decoder = scripted(cast.patient, *guessing[way], script, float(key), plan.tokens, completions)
        # What is guessed follows what guesses have cost, which takes some rounds to be known.
        for _ in range(2):
            work()
        completions.clear()
        decoder.rows.clear()
        ways[f"{way}_{key}"], heard[way, key] = work, (completions, decoder)
    gc.collect()
    return ways, heard


def all_ratios(
    seconds: dict[tuple[int, str], list[float]], sizes: Sequence[int], acceptances: list[str]
) -> dict[str, Any]:
    """How many times as fast one way is as another, by batch size; None where one of them did not run."""

    def ratios(way: str, other: str) -> dict[str, float] | None:
        found = {
            str(size): times_as_fast(seconds[size, way], seconds[size, other])
            for size in sizes
            if (size, way) in seconds and (size, other) in seconds
        }
        return found or None

    return {
        "patient_vs_transformers": ratios("patient", "transformers"),
        "cost_ratio": ratios("patient", "doctor"),
        "guided_vs_patient": ratios("guided", "patient"),
        "guided_small_vs_patient": ratios("guided_small", "patient"),
        "guided_vs_logits_processor": ratios("guided", "logits_processor"),
        "guided_small_vs_logits_processor": ratios("guided_small", "logits_processor_small"),
        "speculative_vs_patient": {key: ratios(f"speculative_{key}", "patient") for key in acceptances},
        "speculative_vs_guided": {key: ratios(f"speculative_{key}", "guided") for key in acceptances},
        "speculative_small_vs_patient": {key: ratios(f"speculative_small_{key}", "patient") for key in acceptances},
        "speculative_small_vs_guided_small": {
            key: ratios(f"speculative_small_{key}", "guided_small") for key in acceptances
        },
    }


def over_patient(peaks: dict[str, int | None], way: str) -> float | None:
    """Peak memory of a way over the patient's, where both are known."""
    alone, own = peaks["patient"], peaks[way]
    return None if alone is None or own is None else own / alone


class DoesNotFit(Exception):
    """A patient that the device has no room for."""


def measure_all(
    kit: Kit, configs: dict[str, Any], plan: Plan, minutes: float, so_far: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All patients, one after the other; `so_far` is called with what there is after each."""
    clock = Clock(time.perf_counter() + 60 * minutes, len(configs) * len(plan.sizes))
    patients: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    print(f"{'patient':>10} {'batch':>5} {'way':>22} {'tokens/s':>10} {'÷ patient':>10}")
    for place, (name, config) in enumerate(configs.items()):
        clock.left = (len(configs) - place) * len(plan.sizes)
        try:
            found = measure(kit, name, config, plan, clock)
        except (DoesNotFit, torch.OutOfMemoryError, UserError) as error:
            reason = str(error).splitlines()[0]
            # The engine says that memory does not suffice in a UserError; others are mistakes to be seen.
            if isinstance(error, UserError) and "out of memory" not in reason:
                raise
            skipped[name] = reason
        else:
            rows += found.pop("rows")
            patients[name] = found
        if name in skipped:
            print(f"{name}: skipped: {skipped[name]}", flush=True)
        # Out here the error, and with it the frames that hold the tensors, is gone.
        _let_go(kit.device)
        so_far({"patients": patients, "skipped": skipped, "rows": rows})
    return {"patients": patients, "skipped": skipped, "rows": rows}


def load_tokenizer(spec: str) -> Any:
    prefix, _, name = spec.partition("builtin:")
    return AutoTokenizer.from_pretrained(str(builtin.fetch(name) if not prefix and name else spec))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", help="names with commas between them; all if left out")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or with --tiny cpu")
    parser.add_argument("--tiny", action="store_true", help="very small shapes: to see whether the script runs")
    parser.add_argument("--tokenizer", default=TOKENIZER, help="builtin:NAME or a folder")
    parser.add_argument("--minutes", type=float, default=8.0, help="when these are over, no more rounds are begun")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    if not arguments.device.startswith("cuda") and not (arguments.device == "cpu" and arguments.tiny):
        sys.exit(f"this measures a CUDA GPU, not {arguments.device}; without one, rehearse it: --device cpu --tiny")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here; without one, rehearse it: --device cpu --tiny")
    started = time.perf_counter()
    configs = shapes(arguments.tiny)
    chosen = arguments.patients.split(",") if arguments.patients else list(configs)
    if unknown := [name for name in chosen if name not in configs]:
        sys.exit(f"no patient is called {', '.join(unknown)}; known: {', '.join(configs)}")
    # It warns that an end-of-turn token of −1 lets answers run to their full length, which is what is wanted.
    logging.set_verbosity_error()
    torch.manual_seed(0)
    plan = replace(Plan(), sizes=(1, 4), tokens=8, rounds=1) if arguments.tiny else Plan()
    weights = f"random, made on the device in {str(DTYPE).removeprefix('torch.')}"
    says = "timings only: all weights are random, and how often guesses hold is given, not measured"
    print(f"{says}; prompts by the tokenizer of {arguments.tokenizer}")
    kit = Kit(torch.device(arguments.device), load_tokenizer(arguments.tokenizer))
    head: dict[str, Any] = {
        "benchmark": "gpu", "says": says, "tiny": arguments.tiny, "device": arguments.device, "weights": weights,
        "tokenizer": arguments.tokenizer, "new_tokens": plan.tokens,
    }  # fmt: skip
    where = circumstances()

    def so_far(result: dict[str, Any]) -> None:
        # Its time may end before all patients are done.
        keep({**head, **result, **where}, arguments.output)

    result = measure_all(kit, {name: configs[name] for name in chosen}, plan, arguments.minutes, so_far)
    for name, found in result["patients"].items():
        memory = found["memory_ratio"]
        print(f"{name}: memory_ratio {'not measured on a CPU' if memory is None else f'{memory:.2f}'}", end="")
        peaks = [f"{way} {size / 2**30:.1f} GiB" for way, size in found["peak_bytes"].items() if size is not None]
        print(f"; peak memory: {', '.join(peaks)}" if peaks else "")
        for key in ("patient_vs_transformers", "cost_ratio", "guided_vs_patient", "guided_small_vs_patient",
                    "guided_vs_logits_processor", "guided_small_vs_logits_processor"):  # fmt: skip
            print(f"{name}: {key} {_rounded(found[key])}")
        for acceptance in found["speculation"]:
            print(f"{name}: at acceptance {acceptance}: speculative_vs_patient "
                  f"{_rounded(found['speculative_vs_patient'][acceptance])}, speculative_vs_guided "
                  f"{_rounded(found['speculative_vs_guided'][acceptance])}; speculative_small_vs_patient "
                  f"{_rounded(found['speculative_small_vs_patient'][acceptance])}")  # fmt: skip
    record({**head, "minutes": (time.perf_counter() - started) / 60, **result}, arguments.output)


def _rounded(values: dict[str, float] | None) -> str:
    return "not measured" if values is None else json.dumps({size: round(value, 2) for size, value in values.items()})


if __name__ == "__main__":
    main()
