"""How fast is guided decoding beside the decoder that GenARM uses?

    python -m benchmarks.arithmetic --source CHECKOUT [--python INTERPRETER] [--quick] [--patient builtin:smollm2]
                                    [--doctor FOLDER] [--output benchmarks/results/arithmetic.json]

GenARM (Xu et al. 2024) decodes with `model_arithmetic` (Dekoninck et al. 2024). Both decoders draw from
patient · doctor, two models of one tokenizer, at temperature 1: the same prompts, the same number of new tokens, no
stop token, one dtype, after a warm-up of each, in interleaved rounds. Theirs runs in a process of its own
(`arithmetic_worker.py`), which does nothing while ours runs, and the other way round.

- guided: our engine in the product form, the doctor as it is trained, an adapter on the patient, in the patient's own
  pass; nothing is guessed ahead;
- guided_apart: our engine, the doctor merged into a model apart from the patient, with its own pass and cache, as
  theirs runs it;
- arithmetic: `ModelArithmetic(patient + doctor).generate_text(…, temperature=0.5)`, as GenARM calls it (the formula's
  weights are divided by their sum, which half the temperature undoes), without the statistics that it keeps by default;
- arithmetic_eager: the same with `run_eager=True`, which hands a model's cache back to it as it came.

`guided_vs_arithmetic` and `guided_apart_vs_arithmetic` compare with the faster of the two at that batch size;
`processor_ratio` is the former in processor time, which says more where other work shares the cores (on a CPU, with one
thread). Before anything is timed both decoders are asked what they draw tokens from, theirs along the tokens that it
draws, both of ours along the same ones: `difference` is the total variation distance, at its largest and on average, in
float32 and in the dtype that is timed.

Without --doctor it has the shape that `llmdoctor train` gives it and random numbers for weights.

To get their decoder, and two small packages that it imports:

    git clone https://github.com/eth-sri/language-model-arithmetic
    pip install loguru==0.7.3 fuzzywuzzy==0.18.0
    python -m benchmarks.arithmetic --source language-model-arithmetic

It then runs with the transformers that is installed here, for which two of its methods are wrapped (see
`arithmetic_worker.py`). To run it with an older one, which takes the caches that it makes, make an environment:

    python -m venv arithmetic-env
    arithmetic-env/bin/pip install torch==2.13.0 transformers==4.46.3 accelerate==1.1.1 peft==0.13.2
    arithmetic-env/bin/pip install dill pandas loguru==0.7.3 fuzzywuzzy==0.18.0
    python -m benchmarks.arithmetic --source language-model-arithmetic --python arithmetic-env/bin/python
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
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmdoctor.threads import spin_briefly

spin_briefly()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers.utils import logging  # noqa: E402

import llmdoctor.decoding.engine as engine_module  # noqa: E402
from benchmarks.decoding import BETA, conversations, engine, make_doctor  # noqa: E402
from benchmarks.record import record  # noqa: E402
from llmdoctor.decoding.adapter import Adapter  # noqa: E402
from llmdoctor.decoding.engine import GuidedDecoder  # noqa: E402
from llmdoctor.decoding.guides import Guide  # noqa: E402
from llmdoctor.decoding.request import Request, SamplingParams  # noqa: E402
from llmdoctor.models.doctor import ADAPTER_FOLDER, Doctor, DoctorConfig  # noqa: E402
from llmdoctor.models.loading import LoadedModel, load_model  # noqa: E402

WORKER = Path(__file__).with_name("arithmetic_worker.py")
OURS = ("guided", "guided_apart")
THEIRS = ("arithmetic", "arithmetic_eager")


class Other:
    """The process with their decoder."""

    def __init__(self, python: str, source: Path) -> None:
        self.process = subprocess.Popen(
            [python, str(WORKER), str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without input it ends by itself.
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"their decoder failed at {do!r}, for the reason above")
        found: dict[str, Any] = json.loads(answer)
        return found


def write_model(loaded: LoadedModel, folder: Path) -> None:
    """As a folder that transformers of version 4 reads as version 5 does."""
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Version 4 would take its default base for another one that is only there.
    config.update({"rope_theta": config["rope_parameters"]["rope_theta"]} if "rope_parameters" in config else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    names = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2), encoding="utf-8")


def texts(patient: LoadedModel, rows: int) -> list[str]:
    """Prompts as text, without the token that their decoder puts before each by itself."""
    first = patient.tokenizer.bos_token or ""
    made = [
        patient.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        for messages in conversations(rows)
    ]
    return [text.removeprefix(first) for text in made]


def drawn_from(patient: LoadedModel, doctor: Guide, tokens: Tensor) -> tuple[Tensor, list[list[int]]]:
    """What our engine would draw `tokens` [T, B] from, [T, B, V], and the prompts' ids."""
    length, rows = tokens.shape
    decoder = GuidedDecoder(patient, [doctor], max_batch_size=rows)
    decoder.encoder.stop_ids = frozenset()
    # A row's key is decided by its seed and place.
    keys: dict[int, tuple[int, int]] = {}
    opened = decoder._open

    def open_row(index: int, request: Request) -> Any:
        row = opened(index, request)
        keys.update({row.key(place): (place, index) for place in range(length)})
        return row

    heard: dict[tuple[int, int], Tensor] = {}

    def forced(scores: Tensor, drawn: Sequence[int], greedy: Tensor) -> Tensor:
        for key, row in zip(drawn, scores, strict=True):
            heard[keys[key]] = row.softmax(-1).cpu()
        return torch.stack([tokens[keys[key]] for key in drawn]).to(scores.device)

    decoder._open = open_row  # type: ignore[method-assign]
    sample, engine_module.sample = engine_module.sample, forced
    try:
        decoder.generate([
            Request(messages, betas={doctor.name: BETA}, sampling=SamplingParams(max_new_tokens=length, seed=seed))
            for seed, messages in enumerate(conversations(rows))
        ])  # fmt: skip
    finally:
        engine_module.sample = sample
    made = torch.stack([torch.stack([heard[place, row] for row in range(rows)]) for place in range(length)])
    return made, [decoder.encoder.prompt_ids(messages) for messages in conversations(rows)]


def differences(
    other: Other, patient: LoadedModel, doctors: Mapping[str, Guide], rows: int, tokens: int, folder: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """Total variation distance between what both decoders draw from, for each of our ways and of theirs."""
    found: dict[str, dict[str, dict[str, float]]] = {ours: {} for ours in doctors}
    for way in THEIRS:
        file = folder / "probe.pt"
        answer = other.ask("probe", way=way, prompts=texts(patient, rows), tokens=tokens, seed=0, file=str(file))
        theirs = torch.load(file, weights_only=True)
        file.unlink()
        for name, doctor in doctors.items():
            ours, ids = drawn_from(patient, doctor, theirs["tokens"])
            assert answer["prompt_ids"] == ids, "the decoders read the prompts differently"
            distance = (ours - theirs["probabilities"][..., : ours.shape[-1]]).abs().sum(-1) / 2
            same = (ours.argmax(-1) == theirs["probabilities"].argmax(-1)).float()
            found[name][way] = {
                "largest": float(distance.max()),
                "mean": float(distance.mean()),
                "same_most_likely": float(same.mean()),
            }
    return found


def timed(work: Callable[[], None]) -> dict[str, float]:
    start, used = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used}


def ratio_to(rows: list[dict[str, Any]], size: int, way: str, kind: str = "seconds", ours: str = "guided") -> float:
    """How many times as much time a way takes as one of ours does: the median over rounds."""
    found = {(row["batch"], row["way"]): row[kind] for row in rows}
    return statistics.median(other / own for other, own in zip(found[size, way], found[size, ours], strict=True))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sizes, tokens, rounds = ([1, 4], 16, 1) if arguments.quick else ([1, 4, 16], 64, arguments.rounds)
    probed = (2, 4) if arguments.quick else (4, 16)
    lora = arguments.doctor or folder / "lora"
    if arguments.doctor is None:
        make_doctor(arguments.patient, lora)
    patient = load_model(arguments.patient)
    dtype = arguments.dtype or str(patient.model.dtype).removeprefix("torch.")
    folders = [folder / "patient", folder / "doctor"]
    write_model(patient, folders[0])
    base = load_model(arguments.patient)
    # Else the doctor would be rounded once more than its adapter is, and `difference` would measure that.
    base.model.float()
    write_model(Doctor.from_pretrained(lora, base=base).merged(), folders[1])
    rows: list[dict[str, Any]] = []
    difference: dict[str, Any] = {}
    with Other(arguments.python, arguments.source) as other:
        about = other.ask("about")
        for kind in dict.fromkeys(["float32", dtype]):
            loaded = other.ask("load", folders=[str(path) for path in folders], dtype=kind)
            patient, doctor = (load_model(str(path), dtype=kind) for path in folders)
            adapter = Adapter.load(lora / ADAPTER_FOLDER, patient.model)
            assert adapter is not None, f"{lora} cannot be run beside {arguments.patient} in one pass"
            doctors = {"guided": Guide("it", patient, adapter=adapter), "guided_apart": Guide("it", doctor)}
            difference[kind] = differences(other, patient, doctors, *probed, folder)
            print(kind, json.dumps(difference[kind]), flush=True)
        print(f"{'batch':>5} {'way':>17} {'tokens/s':>9} {'÷ guided':>9}")
        for size in sizes:
            prompts = texts(patient, size)
            ours = {way: engine(patient, [guide], size, tokens) for way, guide in doctors.items()}
            for work in ours.values():
                work()
            for way in THEIRS:
                other.ask("decode", way=way, prompts=prompts, tokens=tokens, seed=0)
            gc.collect()
            taken: dict[str, list[dict[str, Any]]] = {way: [] for way in (*OURS, *THEIRS)}
            for number in range(rounds):
                for way, work in ours.items():
                    taken[way].append(timed(work))
                for way in THEIRS:
                    taken[way].append(other.ask("decode", way=way, prompts=prompts, tokens=tokens, seed=number))
            for way, times in taken.items():
                row = {kind: [one[kind] for one in times] for kind in ("seconds", "processor_seconds")}
                rate = size * tokens / statistics.median(row["seconds"])
                rows.append({"batch": size, "way": way, "tokens_per_second": rate, **row})
                print(f"{size:>5} {way:>17} {rate:>9,.1f} {1 / ratio_to(rows, size, way):>9.2f}", flush=True)

    fastest = {size: min((ratio_to(rows, size, way), way) for way in THEIRS)[1] for size in sizes}
    head = subprocess.run(
        ["git", "-C", str(arguments.source), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    about["versions"]["model_arithmetic"] = tomllib.loads(
        (arguments.source / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]["version"]
    return {
        "guided_vs_arithmetic": {str(size): ratio_to(rows, size, way) for size, way in fastest.items()},
        "guided_apart_vs_arithmetic": {
            str(size): ratio_to(rows, size, way, ours="guided_apart") for size, way in fastest.items()
        },
        "fastest_arithmetic": {str(size): way for size, way in fastest.items()},
        "guided_vs_arithmetic_as_genarm": {str(size): ratio_to(rows, size, "arithmetic") for size in sizes},
        "processor_ratio": {str(size): ratio_to(rows, size, way, "processor_seconds") for size, way in fastest.items()},
        "difference": difference,
        "dtype": dtype,
        "new_tokens": tokens,
        "rounds": rounds,
        "arithmetic": {"commit": head.stdout.strip(), **about, **loaded},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="a checkout of eth-sri/language-model-arithmetic")
    parser.add_argument("--python", default=sys.executable, help="an interpreter to run it with; this one if left out")
    parser.add_argument("--quick", action="store_true", help="one round of 16 tokens; within a minute on two cores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patient", default="builtin:smollm2")
    parser.add_argument("--doctor", type=Path, help="a trained LoRA doctor on the patient; a random one if left out")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="the patient's own here if left out")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    for name in (
        "guided_vs_arithmetic",
        "guided_apart_vs_arithmetic",
        "guided_vs_arithmetic_as_genarm",
        "processor_ratio",
    ):
        print(name, json.dumps({size: round(value, 2) for size, value in result[name].items()}))
    head = {
        "benchmark": "arithmetic",
        "quick": arguments.quick,
        "patient": arguments.patient,
        "doctor": "random LoRA" if arguments.doctor is None else DoctorConfig.load(arguments.doctor).dimension,
    }
    record({**head, **result}, arguments.output)


if __name__ == "__main__":
    main()
