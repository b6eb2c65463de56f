"""Does a doctor steer a patient of another family, with another tokenizer?

    python -m benchmarks.cross_tokenizer --patient FOLDER --work FOLDER [--base builtin:smollm2]
        [--output benchmarks/results/cross_tokenizer.json] [--quick]

The patient scores the tokens of the first builtin sentiment pairs, a LoRA doctor on the base is trained on them
(carried over to its own tokens), and both decode test prompts together in the ratio form at several β. `--work` keeps
rewards and doctor: a run that was cut goes on, and does not time what it found there. `--quick` is a smoke run on a few
pairs and prompts; its figures mean nothing.

`score` is VADER's sentiment from −1 to 1, with a 95 % bootstrap interval; `kl` the mean over answers of the estimated
KL(guided ‖ patient) in nats a response; `perplexity` that of the patient at the answers; `unmapped_mass` the mean
probability of doctor's tokens that stand for none of the patient's, over doctor and reference; `first_piece_share` the
share of drawn tokens that were scored by their first piece alone (see `llmdoctor.models.vocab`).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from llmdoctor.data.preferences import load_preferences
from llmdoctor.data.prompts import load_prompts
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import load_guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.decoding.row import Tally
from llmdoctor.demo import peak_rss_gb
from llmdoctor.evaluation.metrics import WinTieLoss, bootstrap_ci, distinct_n, perplexity
from llmdoctor.evaluation.scorers import get_scorer
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.rewards.acquire import ScoringOptions, acquire_rewards
from llmdoctor.rewards.faces import face_pairs
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.config import TFPOConfig
from llmdoctor.tfpo.options import DoctorOptions
from llmdoctor.tfpo.rounds import RoundOptions
from llmdoctor.tfpo.train import train_doctor

NAME = "positive"
OPTIONS = DoctorOptions(eval_fraction=0.1)


def token_rewards(patient: LoadedModel, folder: Path, pairs: int) -> RewardStore:
    scoring = ScoringOptions(batch_tokens=1024, shard_size=24)
    data = load_preferences("builtin:sentiment", limit=pairs)
    return acquire_rewards(patient, data, folder, faces=face_pairs(NAME)[0], scoring=scoring)


def trained(base: str, rewards: RewardStore, folder: Path, epochs: int, dtype: str) -> Path:
    config = TFPOConfig(
        output_dir=str(folder), num_train_epochs=epochs, seed=0, disable_tqdm=True, use_cpu=True, report_to="none"
    )
    rounds = RoundOptions(rounds=0)
    return train_doctor(load_model(base, dtype=dtype), rewards, config, options=OPTIONS, rounds=rounds, dimension=NAME)


def answers(
    decoder: GuidedDecoder, beta: float, prompts: int, tokens: int, plain: list[float] | None
) -> dict[str, Any]:
    requests = [
        Request(
            tuple(prompt.messages),
            betas={NAME: beta},
            sampling=SamplingParams(max_new_tokens=tokens, seed=number),
        )
        for number, prompt in enumerate(load_prompts("builtin:prompts/test", prompts))
    ]
    decoder.tally = Tally()
    # Of all cores together: steadier than the clock on a machine that does other work beside.
    start = time.process_time()
    done = decoder.generate(requests)
    busy = time.process_time() - start
    texts = [row.text for row in done]
    scores = get_scorer("vader")(texts)
    row = {
        "beta": beta,
        "score": float(np.mean(scores)),
        "score_interval": list(bootstrap_ci(scores))[-2:],
        "kl": float(np.mean([row.kl for row in done])),
        "perplexity": perplexity([row.patient_logps for row in done]),
        "distinct_4": distinct_n(texts, 4),
        "tokens": sum(len(row.token_ids) for row in done),
        "tokens_per_cpu_second": sum(len(row.token_ids) for row in done) / busy,
        "cpu_seconds": busy,
        "unmapped_mass": decoder.tally.unmapped_mass,
        "first_piece_share": decoder.tally.first_piece_share,
        "scores": scores,
        "texts": texts,
    }
    if plain is not None:
        row["win_plus_half_tie"] = WinTieLoss.from_scores(scores, plain).win_plus_half_tie
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patient", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default="builtin:smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pairs", type=int, default=72)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 1.0, 2.0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pairs, arguments.epochs, arguments.prompts, arguments.tokens = 8, 1, 3, 8
    seconds: dict[str, float | None] = {}

    def timed(stage: str, start: float, anew: bool = True) -> None:
        seconds[stage] = round(time.perf_counter() - start, 1) if anew else None
        print(f"{stage}: {seconds[stage]} s", flush=True)

    patient = load_model(arguments.patient, dtype=arguments.dtype)
    anew = [not (arguments.work / name).exists() for name in ("rewards", "doctor")]
    start = time.perf_counter()
    rewards = token_rewards(patient, arguments.work / "rewards", arguments.pairs)
    timed("rewards", start, anew[0])
    start = time.perf_counter()
    doctor = trained(arguments.base, rewards, arguments.work / "doctor", arguments.epochs, arguments.dtype)
    timed("training", start, anew[1])
    start = time.perf_counter()
    guide = load_guide(doctor, patient, name=NAME, dtype=arguments.dtype)
    decoder = GuidedDecoder(patient, [guide])
    timed("loading the doctor and mapping the vocabularies", start)
    translation = next(lane.translation for lane in decoder.lanes if lane.translation is not None)
    # The first answers read the weights into memory and look up how texts go on; they are not timed.
    answers(decoder, arguments.betas[-1], arguments.prompts, 2, None)
    rows: list[dict[str, Any]] = []
    print(f"{'β':>4} {'score':>7} {'KL':>6} {'ppl':>6} {'dist-4':>7} {'tok/cpu s':>9} {'unmapped':>9} {'1st piece':>9}")
    for beta in arguments.betas:
        row = answers(decoder, beta, arguments.prompts, arguments.tokens, rows[0]["scores"] if rows else None)
        rows.append(row)
        print(
            f"{beta:>4} {row['score']:>7.3f} {row['kl']:>6.2f} {row['perplexity']:>6.1f} {row['distinct_4']:>7.3f} "
            f"{row['tokens_per_cpu_second']:>9.1f} {row['unmapped_mass'] or 0:>9.4f} "
            f"{row['first_piece_share'] or 0:>9.4f}",
            flush=True,
        )
    config = patient.model.config
    result = {
        "benchmark": "cross_tokenizer",
        "quick": arguments.quick,
        "patient": {
            "architecture": config.architectures[0] if config.architectures else config.model_type,
            "parameters": sum(parameter.numel() for parameter in patient.model.parameters()),
            "tokens": len(translation.patient),
            "fingerprint": patient.fingerprint,
        },
        "doctor": {
            "base": arguments.base,
            "tokens": len(translation.doctor),
            "training": {"pairs": arguments.pairs, "epochs": arguments.epochs, **asdict(OPTIONS)},
        },
        "shares_of_the_patients_tokens": translation.shares,
        "seconds": seconds,
        "peak_rss_gb": peak_rss_gb(),
        "rows": rows,
    }
    record(result, arguments.output)


if __name__ == "__main__":
    main()
