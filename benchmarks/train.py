"""Does stage 2 train faster, and in less memory, than TRL's DPO on the same pairs?

    python -m benchmarks.train [--quick] [--model builtin:smollm2] [--output benchmarks/results/train.json]

Three contenders, each a process of its own that loads the model, trains and saves, in interleaved repetitions:

- tfpo: `train_doctor`; the reference's log-probs are computed once, before the first step, as always;
- dpo precomputed: TRL's `DPOTrainer`, the reference's log-probs computed once as well, and on a CPU, too, no logits of
  prompts and padding, which TRL leaves out on a GPU only;
- dpo as shipped: TRL's `DPOTrainer` as it is, which reads the reference in every step, and on a CPU has logits of all.

Same pairs and token ids, batches, epochs, schedule and LoRA (every linear layer of the upper half), base in the dtype
it is loaded in, dropout off. On a CPU attention is eager for tfpo; a full run tries DPO with eager and with fused
attention and measures the faster one. What differs: TFPO multiplies its adapters in the base's bfloat16, where TRL
leaves them to peft, which casts an adapted layer's input and output to float32; TFPO puts both responses behind one
prompt. A full run adds DPO with every default of TRL's (recomputed activations, bf16 autocast), outside the headline.

`examples_ratio` is pairs per second of a median step, TFPO's over DPO's, and `memory_ratio` the peak memory of the
whole process (resident, or allocated on a GPU), TFPO's over DPO's: each the worse one of the two ways to run DPO. Both
ways and the whole processes' pairs per second stand beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.memory import peak_where
from benchmarks.record import record
from llmdoctor.baselines.dpo import BETA, dpo_trainer
from llmdoctor.baselines.training import AdapterTraining, BaselineOptions, lora_config, token_rows
from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.preferences import load_preferences
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.rewards.acquire import acquire_rewards
from llmdoctor.rewards.faces import face_pairs
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.config import TFPOConfig
from llmdoctor.tfpo.options import DoctorOptions
from llmdoctor.tfpo.rounds import RoundOptions
from llmdoctor.tfpo.train import train_doctor

TFPO, PRECOMPUTED, SHIPPED, DEFAULTS = "tfpo", "dpo precomputed", "dpo as shipped", "dpo all defaults"


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next: batch, forward, backward and update."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.loaded_gb = 0.0
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.loaded_gb = peak_where(self.device) / 1e9
        self._last = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self._last = now

    def _now(self) -> float:
        # A GPU is given work long before it does it.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def train_tfpo(
    base: LoadedModel, store: RewardStore, folder: Path, batch: int, epochs: float, times: StepTimes
) -> None:
    config = TFPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        num_train_epochs=epochs,
        disable_tqdm=True,
        use_cpu=base.model.device.type == "cpu",
    )
    train_doctor(
        base, store, config, options=DoctorOptions(eval_fraction=0.0), rounds=RoundOptions(rounds=0), callbacks=[times]
    )


def train_dpo(
    way: str, base: LoadedModel, store: RewardStore, folder: Path, options: BaselineOptions, times: StepTimes
) -> None:
    if way == PRECOMPUTED:
        trainer = dpo_trainer(base, store.dataset(), options, BETA, folder, [times])
    else:
        trainer = own_reference_trainer(way, base, store, folder, options, times)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))


def own_reference_trainer(
    way: str, base: LoadedModel, store: RewardStore, folder: Path, options: BaselineOptions, times: StepTimes
) -> Any:
    """As `dpo_trainer`, but with the reference read in every step; with all of TRL's defaults if `way` says so."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class TokenDPOTrainer(AdapterTraining, DPOTrainer):
        pass

    settings: dict[str, Any] = {} if way == DEFAULTS else {"gradient_checkpointing": False, "bf16": False}
    on_cpu = base.model.device.type == "cpu"
    config = DPOConfig(**options.training_arguments(folder, on_cpu), beta=BETA, max_length=None, **settings)
    return TokenDPOTrainer(
        model=base.model,
        args=config,
        train_dataset=Dataset.from_dict(token_rows(store.dataset(), ChatEncoder.for_model(base.model, base.tokenizer))),
        processing_class=base.tokenizer,
        peft_config=lora_config(base.model, options, "CAUSAL_LM"),
        callbacks=[times],
    )


def child(arguments: argparse.Namespace) -> None:
    """One contender; prints its figures as its last line."""
    base, store = load_model(arguments.model), RewardStore.open(arguments.store)
    times, folder = StepTimes(base.model.device), Path(arguments.folder)
    if arguments.child == TFPO:
        train_tfpo(base, store, folder, arguments.batch, arguments.epochs, times)
    else:
        if base.model.device.type == "cpu":
            base.model.set_attn_implementation(arguments.attention)
        options = BaselineOptions(epochs=arguments.epochs, batch_pairs=arguments.batch, eval_fraction=0.0)
        train_dpo(arguments.child, base, store, folder, options, times)
    peak = peak_where(base.model.device) / 1e9
    print(json.dumps({"steps": times.seconds, "loaded_gb": times.loaded_gb, "peak_gb": peak}))


def run(way: str, attention: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`way` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.train", "--child", way, "--folder", folder]
        for name in ("model", "store", "batch", "epochs"):
            command += [f"--{name}", str(getattr(arguments, name))]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--attention", attention],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TQDM_DISABLE": "1"},
        )
        wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    # The first step warms up: allocator, kernels, pages of the weights.
    step = statistics.median(figures["steps"][1:])
    return {"way": way, "attention": attention, "wall_seconds": wall, "step_seconds": step, **figures}


def faster_attention(arguments: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """The attention with which DPO's steps are shorter, and both medians."""
    steps = {name: run(PRECOMPUTED, name, arguments)["step_seconds"] for name in ("eager", "sdpa")}
    return min(steps, key=lambda name: steps[name]), steps


def compare(rows: Sequence[dict[str, Any]], way: str) -> dict[str, float]:
    """TFPO over DPO run in `way`: medians of all repetitions."""

    def median(name: str, of: str) -> float:
        return statistics.median(row[name] for row in rows if row["way"] == of)

    return {
        "examples_ratio_step": median("step_seconds", way) / median("step_seconds", TFPO),
        "examples_ratio_process": median("wall_seconds", way) / median("wall_seconds", TFPO),
        "memory_ratio": median("peak_gb", TFPO) / median("peak_gb", way),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 steps of 3 pairs, once; within a minute on two cores")
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--pairs", default="builtin:sentiment")
    parser.add_argument("--output", type=Path)
    for name in ("child", "store", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--attention", default="eager", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        child(arguments)
        return
    pairs, arguments.batch, arguments.epochs, repetitions = (6, 3, 1.5, 1) if arguments.quick else (96, 8, 1.0, 3)
    with tempfile.TemporaryDirectory() as folder:
        arguments.store = folder
        patient = load_model(arguments.model)
        acquire_rewards(
            patient, load_preferences(arguments.pairs, limit=pairs), folder, faces=face_pairs("positive")[0]
        )
        dtype = str(patient.model.dtype)
        del patient
        attention, tried = ("eager", {}) if arguments.quick else faster_attention(arguments)
        ways = [TFPO, PRECOMPUTED, SHIPPED]
        rows = [run(way, attention, arguments) for _ in range(repetitions) for way in ways]
        if not arguments.quick:
            rows.append(run(DEFAULTS, attention, arguments))
    examples = pairs * arguments.epochs
    print(
        f"{'':>16} {'s/step':>7} {'pairs/s, steps':>15} {'whole process s':>16} {'pairs/s, process':>17} {'peak GB':>8}"
    )
    for row in rows:
        print(
            f"{row['way']:>16} {row['step_seconds']:>7.2f} {arguments.batch / row['step_seconds']:>15.2f} "
            f"{row['wall_seconds']:>16.1f} {examples / row['wall_seconds']:>17.2f} {row['peak_gb']:>8.2f}"
        )
    against = {way: compare(rows, way) for way in dict.fromkeys(row["way"] for row in rows) if way != TFPO}
    headline = [against[PRECOMPUTED], against[SHIPPED]]
    result = {
        "benchmark": "train",
        "quick": arguments.quick,
        "model": arguments.model,
        "dtype": dtype,
        "pairs": pairs,
        "batch_pairs": arguments.batch,
        "epochs": arguments.epochs,
        "repetitions": repetitions,
        "dpo_attention": attention,
        "dpo_attention_step_seconds": tried,
        "examples_ratio": min(ratios["examples_ratio_step"] for ratios in headline),
        "examples_ratio_process": min(ratios["examples_ratio_process"] for ratios in headline),
        "memory_ratio": max(ratios["memory_ratio"] for ratios in headline),
        "against": against,
        "trl": version("trl"),
        "rows": rows,
    }
    record(result, arguments.output)


if __name__ == "__main__":
    main()
