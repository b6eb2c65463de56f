"""How close does stage 1 come to the bare forward pass, and how far ahead of a plain scoring loop is it?

    python -m benchmarks.rewards [--quick] [--model builtin:smollm2] [--output benchmarks/results/rewards.json]

Three ways over the same pairs in one process, after a warm-up of each:

- ours: `acquire_rewards`, disk included;
- floor: the decoder's forward pass over every sequence that a plain loop scores (face, prompt and response, for both
  faces and both responses), in batches of equal length: no padding, no logits, nothing read or written;
- naive: what one writes first: batches of 8 in the order of the data, padded to the longest, the prompt recomputed for
  every response, full logits, log-softmax in float32.

Ratios are of scored completion tokens per second, so they compare the same work.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import record
from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.preferences import PreferencePair, load_preferences
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.rewards.acquire import acquire_rewards
from llmdoctor.rewards.faces import FacePair, face_pairs

NAIVE_BATCH = 8
FLOOR_TOKENS = 8192


def sequences(encoder: ChatEncoder, pairs: list[PreferencePair], faces: FacePair) -> list[tuple[list[int], int]]:
    """(ids, prompt length) of every response under every face."""
    found = []
    for face, pair in itertools.product((faces.positive, faces.negative), pairs):
        prompt = encoder.prompt_ids(pair.prompt, face)
        for text, complete in ((pair.chosen, pair.chosen_complete), (pair.rejected, pair.rejected_complete)):
            found.append((prompt + encoder.completion(text, complete).ids, len(prompt)))
    return found


@torch.inference_mode()
def floor(model: Any, rows: list[tuple[list[int], int]]) -> None:
    decoder = model.get_decoder()
    for length, group in itertools.groupby(sorted((ids for ids, _ in rows), key=len), key=len):
        same = list(group)
        size = max(1, FLOOR_TOKENS // length)
        for start in range(0, len(same), size):
            decoder(input_ids=torch.tensor(same[start : start + size], device=model.device), use_cache=False)


@torch.inference_mode()
def naive(model: Any, rows: list[tuple[list[int], int]]) -> None:
    for start in range(0, len(rows), NAIVE_BATCH):
        batch = rows[start : start + NAIVE_BATCH]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, (row, _) in enumerate(batch):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        logps[:, :-1].gather(-1, ids[:, 1:, None]).cpu()


def ours(patient: LoadedModel, pairs: list[PreferencePair], faces: FacePair) -> None:
    with tempfile.TemporaryDirectory() as folder:
        acquire_rewards(patient, pairs, folder, faces=faces)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16 pairs; within a minute on two cores")
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--pairs", default="builtin:sentiment")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    patient = load_model(arguments.model)
    faces = face_pairs("positive")[0]
    pairs = list(load_preferences(arguments.pairs, limit=16 if arguments.quick else 128))
    encoder = ChatEncoder.for_model(patient.model, patient.tokenizer)
    rows = sequences(encoder, pairs, faces)
    warm = sequences(encoder, pairs[:2], faces)
    ways = {
        "ours": (lambda: ours(patient, pairs, faces), lambda: ours(patient, pairs[:2], faces)),
        "floor": (lambda: floor(patient.model, rows), lambda: floor(patient.model, warm)),
        "naive": (lambda: naive(patient.model, rows), lambda: naive(patient.model, warm)),
    }
    for _, warm_up in ways.values():
        warm_up()
    # Interleaved rounds, and the fastest of each: what else the machine does falls on all alike.
    times: dict[str, float] = dict.fromkeys(ways, float("inf"))
    for _ in range(1 if arguments.quick else 3):
        for name, (work, _) in ways.items():
            start = time.perf_counter()
            work()
            times[name] = min(times[name], time.perf_counter() - start)
    scored = sum(len(ids) - prompt for ids, prompt in rows)
    print(f"{'':>6} {'seconds':>8} {'scored tokens/s':>16}")
    for name, spent in times.items():
        print(f"{name:>6} {spent:>8.2f} {scored / spent:>16,.0f}")
    result = {
        "benchmark": "rewards",
        "quick": arguments.quick,
        "model": arguments.model,
        "pairs": len(pairs),
        "scored_tokens": scored,
        "seconds": times,
        "floor_ratio": times["floor"] / times["ours"],
        "naive_ratio": times["naive"] / times["ours"],
        "dtype": str(patient.model.dtype),
    }
    record(result, arguments.output)


if __name__ == "__main__":
    main()
