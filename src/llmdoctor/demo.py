"""The whole pipeline on a real model, small enough for two CPU cores: what `llmdoctor demo` runs."""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from llmdoctor.data.preferences import PreferencePair, load_preferences
from llmdoctor.data.prompts import Prompt, load_prompts
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import load_guide
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.evaluation.metrics import WinTieLoss, bootstrap_ci, distinct_n, perplexity, sequence_kl
from llmdoctor.evaluation.report import DemoRow, DemoSummary, SystemFigures, render_demo_report
from llmdoctor.evaluation.scorers import get_scorer
from llmdoctor.files import write_json
from llmdoctor.models.loading import load_model
from llmdoctor.rewards.acquire import acquire_rewards
from llmdoctor.rewards.faces import face_pairs
from llmdoctor.rewards.store import RewardStore

PATIENT = "builtin:smollm2"
PAIRS = "builtin:sentiment"
PROMPTS = "builtin:prompts/test"
DIMENSION = "positive"
SCORER = "vader"
MAX_NEW_TOKENS = 48


class Steps(Protocol):
    """What the demo tells the outside world; the command line draws bars from it."""

    def start(self, description: str, total: int) -> None:
        """A step of `total` units begins."""

    def advance(self, units: int = 1) -> None:
        """Units were finished."""

    def done(self) -> None:
        """The step is over."""

    def training_callback(self, description: str) -> Any:
        """A `TrainerCallback` that reports a training as one step."""


@dataclass(frozen=True)
class DemoOptions:
    """Settings of the demo.

    Attributes:
        pairs: preference pairs to train on, drawn from the shipped ones by `seed`.
        prompts: unseen prompts to answer.
        alpha: exponent of the patient, α.
        beta: exponent of the doctor over its base, β.
        seed: of the choice of pairs, of training and of sampling.
    """

    pairs: int = 180
    prompts: int = 104
    alpha: float = 1.0
    beta: float = 1.5
    seed: int = 0


@dataclass
class DemoResult:
    """What a finished demo leaves: its summary, every answered prompt, and where the report lies."""

    summary: DemoSummary
    rows: list[DemoRow]
    report: Path


def run_demo(output: str | Path, steps: Steps, options: DemoOptions | None = None) -> DemoResult:
    """Run stages 1, 2 and 3 on the embedded patient and the shipped pairs.

    Token rewards, checkpoints and the doctor are kept under `output`, so a run that was cut goes on where it stopped.

    Args:
        output: folder for everything.
        steps: told of progress.
        options: defaults if None.
    """
    options = options or DemoOptions()
    folder = Path(output)
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        patient = load_model(PATIENT)
        prompts = load_prompts(PROMPTS, limit=options.prompts)
        pairs = _draw(list(load_preferences(PAIRS)), options)
    with _timed(seconds, "rewards"):
        steps.start("Stage 1 · token rewards", len(pairs))
        rewards = acquire_rewards(
            patient, pairs, folder / "rewards", faces=face_pairs(DIMENSION)[0], progress=steps.advance
        )
        steps.done()
    with _timed(seconds, "training"):
        doctor = _train(rewards, folder / "doctor", steps, options)
    decoder = GuidedDecoder(patient, [load_guide(doctor, patient)], max_batch_size=options.prompts)
    answers = {}
    for name, beta, alpha in (("patient", 0.0, 1.0), ("guided", options.beta, options.alpha)):
        with _timed(seconds, f"answers_{name}"):
            answers[name] = _answer(decoder, prompts, alpha, beta, options.seed, steps, name)
    with _timed(seconds, "report"):
        summary, rows = _summarise(prompts, answers, decoder, options)
        summary["seconds"] = seconds
        report = render_demo_report(
            summary,
            rows,
            folder / "report.html",
            pairs=rewards.rows(limit=6),
            settings={"pairs": len(rewards), "prompts": len(prompts), **asdict(options)},
            patient_name="SmolLM2-135M-Instruct",
        )
    summary["peak_rss_gb"] = peak_rss_gb()
    write_json(folder / "answers.json", rows)
    write_json(folder / "summary.json", summary)
    return DemoResult(summary, rows, report)


def peak_rss_gb() -> float:
    """Peak resident memory of this process in 10⁹ bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def _draw(pairs: list[PreferencePair], options: DemoOptions) -> list[PreferencePair]:
    random.Random(options.seed).shuffle(pairs)
    return pairs[: options.pairs]


def _train(rewards: RewardStore, folder: Path, steps: Steps, options: DemoOptions) -> Path:
    from llmdoctor.tfpo.config import TFPOConfig
    from llmdoctor.tfpo.rounds import RoundOptions
    from llmdoctor.tfpo.train import train_doctor

    base = load_model(PATIENT)
    on_cpu = base.model.device.type == "cpu"
    config = TFPOConfig(output_dir=str(folder), seed=options.seed, disable_tqdm=True, use_cpu=on_cpu)
    return train_doctor(
        base,
        rewards,
        config,
        # A minute instead of several; the figures of docs/arena.md are of rounds and pairs.
        rounds=RoundOptions(rounds=0),
        dimension=DIMENSION,
        callbacks=[steps.training_callback("Stage 2 · training the doctor")],
        told=lambda what, units: steps.start(f"Stage 2 · {what}", units) if what else steps.advance(units),
    )


def _answer(
    decoder: GuidedDecoder, prompts: Sequence[Prompt], alpha: float, beta: float, seed: int, steps: Steps, name: str
) -> list[Completion]:
    requests = [
        Request(
            prompt.messages,
            alpha=alpha,
            betas={decoder.names[0]: beta},
            sampling=SamplingParams(max_new_tokens=MAX_NEW_TOKENS, seed=(seed << 32) + place),
            id=prompt.id,
        )
        for place, prompt in enumerate(prompts)
    ]
    steps.start(f"Stage 3 · {name} answers", len(requests))
    done = decoder.generate(requests, on_done=lambda index, completion: steps.advance())
    steps.done()
    return done


def _summarise(
    prompts: Sequence[Prompt],
    answers: dict[str, list[Completion]],
    decoder: GuidedDecoder,
    options: DemoOptions,
) -> tuple[DemoSummary, list[DemoRow]]:
    scorer = get_scorer(SCORER)
    scores = {name: scorer([answer.text for answer in done]) for name, done in answers.items()}
    rows: list[DemoRow] = []
    for place, prompt in enumerate(prompts):
        guided = answers["guided"][place]
        rows.append(
            {
                "prompt": prompt.messages[-1]["content"],
                "patient": answers["patient"][place].text,
                "guided": guided.text,
                "patient_score": scores["patient"][place],
                "guided_score": scores["guided"][place],
                "guided_tokens": decoder.encoder.token_texts(guided.token_ids),
                "guided_shift": [a - b for a, b in zip(guided.logps, guided.patient_logps, strict=True)],
            }
        )
    outcome = WinTieLoss.from_scores(scores["guided"], scores["patient"])
    summary: DemoSummary = {
        "patient": _figures(answers["patient"], scores["patient"]),
        "guided": _figures(answers["guided"], scores["guided"]),
        "win_plus_half_tie": outcome.win_plus_half_tie,
        "scorer": scorer.name,
        "alpha": options.alpha,
        "beta": options.beta,
        "seed": options.seed,
        "seconds": {},
        "peak_rss_gb": peak_rss_gb(),
        "versions": {name: version(name) for name in ("llmdoctor", "torch", "transformers", "peft")},
    }
    return summary, rows


def _figures(answers: Sequence[Completion], scores: Sequence[float]) -> SystemFigures:
    interval = bootstrap_ci(scores)
    return {
        "score": interval.mean,
        "score_ci": [interval.low, interval.high],
        "distinct_4": distinct_n([answer.text for answer in answers], 4),
        "perplexity": perplexity([answer.patient_logps for answer in answers]),
        "kl": sequence_kl([answer.logps for answer in answers], [answer.patient_logps for answer in answers]).mean,
    }
