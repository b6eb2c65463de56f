"""The other decoder of benchmarks/arithmetic.py, in a process of its own: `model_arithmetic` from a checkout of it.

    PYTHON benchmarks/arithmetic_worker.py CHECKOUT

Reads one JSON object a line on standard input and answers each with one on standard output. It imports nothing of
llmdoctor, so that an interpreter with an older transformers can run it.

Of the checkout only what decodes is loaded: the package's `__init__`, which also imports evaluation and an OpenAI
client, is passed over, and `trl`, of which it wants a class for another purpose, is an empty module. With transformers
5, which takes and gives caches as objects only, two methods are wrapped that turn them into the lists of keys and
values that `model_arithmetic` works on, and back, without a copy. Nothing else is changed.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


class NoStops(list):  # type: ignore[type-arg]
    """Stop texts to which the tokenizer's end of turn cannot be added, so that every answer has its full length."""

    def append(self, item: str) -> None:
        pass


def bare_prompt(system: str, text: str) -> str:
    return text


def load_package(checkout: Path) -> tuple[Any, Any]:
    """`ModelArithmetic` and `PromptedLLM`."""
    package = types.ModuleType("model_arithmetic")
    package.__path__ = [str(checkout / "src" / "model_arithmetic")]
    sys.modules["model_arithmetic"] = package
    unused = types.ModuleType("trl")
    unused.AutoModelForCausalLMWithValueHead = None  # type: ignore[attr-defined]
    sys.modules["trl"] = unused
    from loguru import logger

    logger.remove()
    from model_arithmetic.model_arithmetic import ModelArithmetic
    from model_arithmetic.runnable_operators import PromptedLLM

    return ModelArithmetic, PromptedLLM


def caches_as_lists(prompted: Any) -> None:
    """Let `PromptedLLM` work with the cache objects of transformers 5."""
    from transformers.cache_utils import Cache, DynamicLayer

    prepare, store = prompted.prepare_inputs, prompted.store_cache

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = prepare(self, *args, **kwargs)
        past = inputs["past_key_values"]
        if isinstance(past, list):
            layers = []
            for keys, values in past:
                layer = DynamicLayer()
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                layers.append(layer)
            inputs["past_key_values"] = Cache(layers=layers)
        return inputs

    def store_cache(self: Any, past: Any, *args: Any, **kwargs: Any) -> None:
        if not self.run_eager:
            past = [(layer.keys, layer.values) for layer in past.layers]
        store(self, past, *args, **kwargs)

    prompted.prepare_inputs, prompted.store_cache = prepare_inputs, store_cache


class Worker:
    """The same two models in the package's two ways of keeping caches."""

    def __init__(self, checkout: Path) -> None:
        self.arithmetic, self.prompted = load_package(checkout)
        self.patched = int(transformers.__version__.split(".")[0]) >= 5
        if self.patched:
            caches_as_lists(self.prompted)
        self.ways: dict[str, Any] = {}

    def about(self) -> dict[str, Any]:
        return {
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers")},
            },
            "threads": torch.get_num_threads(),
            "caches_wrapped": self.patched,
        }

    def load(self, folders: list[str], dtype: str) -> dict[str, Any]:
        self.ways.clear()
        kind = getattr(torch, dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        named = {"dtype" if self.patched else "torch_dtype": kind}
        models = [AutoModelForCausalLM.from_pretrained(folder, **named).to(device) for folder in folders]
        assert all(model.dtype == kind for model in models)
        for way, eager in (("arithmetic", False), ("arithmetic_eager", True)):
            patient, doctor = (
                self.prompted("", model=model, prompt_template=bare_prompt, run_eager=eager) for model in models
            )
            self.ways[way] = self.arithmetic(
                patient + doctor, dtype=kind, calculate_statistics=False,
                tokenizer=AutoTokenizer.from_pretrained(folders[0]),
            )  # fmt: skip
        return {"attention": [model.config._attn_implementation for model in models]}

    def decode(self, way: str, prompts: list[str], tokens: int, seed: int) -> dict[str, Any]:
        """Seconds, by the clock and of the processor, that completing the prompts from patient · doctor takes."""
        model = self.ways[way]
        torch.manual_seed(seed)
        start, used = time.perf_counter(), time.process_time()
        # A formula's weights are divided by their sum, here 2, which half the temperature undoes, as GenARM does it.
        model.generate_text(prompts, max_new_tokens=tokens, stop_texts=NoStops(), temperature=0.5)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, used = time.perf_counter() - start, time.process_time() - used
        assert model.monitor.other_elements["length"].total() == len(prompts) * tokens
        return {"seconds": seconds, "processor_seconds": used}

    def probe(self, way: str, prompts: list[str], tokens: int, seed: int, file: str) -> dict[str, Any]:
        """Decode, and write to `file` what every token was drawn from [tokens, rows, V] and the tokens."""
        model = self.ways[way]
        drawn: list[torch.Tensor] = []
        tokens_drawn: list[torch.Tensor] = []
        sample = model.normal_sample

        def recorded(probabilities: torch.Tensor) -> Any:
            found = sample(probabilities)
            drawn.append(probabilities.cpu())
            tokens_drawn.append(found[:, 0].cpu())
            return found

        inputs = next(iter(model.model_input_tokens.values()))
        inputs.set_inputs(prompts)
        ids = inputs.input_tokens
        model.normal_sample = recorded
        try:
            self.decode(way, prompts, tokens, seed)
        finally:
            del model.normal_sample
        torch.save({"probabilities": torch.stack(drawn), "tokens": torch.stack(tokens_drawn)}, file)
        return {"prompt_ids": ids}


def main() -> None:
    # Whatever else is printed must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    worker = Worker(Path(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        answer = getattr(worker, asked.pop("do"))(**asked)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
