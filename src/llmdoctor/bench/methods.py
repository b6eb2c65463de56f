"""The contenders: each a decoder behind the engine's interface, its settings, and where it is from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmdoctor.bench.kit import LABELS, MERGED, MERGED_SUBTB, PAIRS, READOUT, Kit
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide
from llmdoctor.decoding.request import Decoder

Setting = Mapping[str, float]
Build = Callable[[Kit, int, Setting], "Built"]

DOCTOR = "llmdoctor"
DOCTOR_OF_ROUNDS = "llmdoctor_rounds"
DOCTOR_OF_PAIRS = "llmdoctor_pairs"
DOCTOR_OF_LABELS = "llmdoctor_labels"
DOCTOR_BALANCED = "llmdoctor_subtb"
PATIENT = "patient"
BEST_OF_N = "best_of_n"
SAMPLES = 8
"""Answers of the patient to each prompt: the first is its own, the first n are best-of-n's."""

TRANSFER_Q_CANDIDATES = 5
"""Each token costs as many continuations; the paper takes 10."""


@dataclass(frozen=True)
class Built:
    """A decoder ready to answer, and what its requests say.

    Attributes:
        decoder: the method.
        request: `Request`'s alpha, betas and onset.
        sampling: `SamplingParams` beside length and seed.
        samples: answers a prompt.
    """

    decoder: Decoder
    request: Mapping[str, Any]
    sampling: Mapping[str, Any]
    samples: int = 1


@dataclass(frozen=True)
class Contender:
    """One method of the comparison.

    Attributes:
        name: in files and tables.
        title: for people.
        source: paper.
        settings: those that are measured; more than one makes a curve.
        build: makes the decoder of a task, seed and setting; None where nothing is decoded: the answer is the one of
            the patient's first `n` that the only model of `trained` likes best.
        any_task: it has nothing to learn, so its answers serve every task.
        few_prompts: it answers `transfer_q_prompts` prompts only.
        trained: the models it needs, as `Kit.trained` names them.
        aside: it takes part where it is named, or where all are asked for: another form of LLMdoctor, or what such a
            form has to be compared with.
    """

    name: str
    title: str
    source: str
    settings: tuple[Setting, ...]
    build: Build | None
    any_task: bool = False
    few_prompts: bool = False
    trained: tuple[str, ...] = ()
    aside: bool = False


def _patient_alone(samples: int = 1, **sampling: Any) -> Build:
    def build(kit: Kit, seed: int, setting: Setting) -> Built:
        decoder = GuidedDecoder(kit.patient, max_batch_size=kit.options.batch_size)
        return Built(decoder, {}, sampling, samples)

    return build


def guided(kind: str, form: str) -> Build:
    """Guided decoding with a trained guide, in ratio or product form.

    The setting holds `beta`, perhaps `alpha` and `onset`.
    """

    def build(kit: Kit, seed: int, setting: Setting) -> Built:
        guide = kit.guide(kind, seed, form)
        decoder = GuidedDecoder(kit.patient, [guide], max_batch_size=kit.options.batch_size)
        request = {"alpha": setting.get("alpha", 1.0), "betas": {guide.name: setting["beta"]}}
        return Built(decoder, request | {"onset": int(setting.get("onset", 0))}, {})

    return build


def _best_guided(kind: str) -> Build:
    """Guided decoding, several times over; the answer that the patient's read-out likes best is kept."""

    def build(kit: Kit, seed: int, setting: Setting) -> Built:
        from llmdoctor.baselines.best_of_n import BestOfN

        inner = guided(kind, "ratio")(kit, seed, setting)
        return Built(BestOfN(inner.decoder, kit.readout(), int(setting["n"])), inner.request, inner.sampling)

    return build


def _faces(kit: Kit, seed: int, setting: Setting) -> Built:
    from llmdoctor.rewards.faces import face_pairs

    faces = face_pairs(kit.task.faces)[0]
    good = Guide("good_face", kit.patient, system=faces.positive)
    bad = Guide("bad_face", kit.patient, system=faces.negative)
    decoder = GuidedDecoder(kit.patient, [good, bad], max_batch_size=kit.options.batch_size)
    return Built(decoder, {"betas": {"good_face": setting["beta"], "bad_face": -setting["beta"]}}, {})


def _contrastive(kit: Kit, seed: int, setting: Setting) -> Built:
    from llmdoctor.baselines.contrastive import ContrastiveSearch

    return Built(ContrastiveSearch(kit.patient, max_batch_size=kit.options.batch_size), {}, {})


def _args(temperature: float) -> Build:
    def build(kit: Kit, seed: int, setting: Setting) -> Built:
        from llmdoctor.baselines.args import ARGS

        critic = kit.reward_model(seed)
        decoder = ARGS(kit.patient, critic, weight=setting["weight"], max_batch_size=kit.options.batch_size)
        return Built(decoder, {}, {"temperature": temperature})

    return build


def _cards(kit: Kit, seed: int, setting: Setting) -> Built:
    from llmdoctor.baselines.cards import CARDS, CARDSOptions

    options = CARDSOptions(reward_threshold=kit.good_reward(seed), temperature=setting["temperature"])
    critic = kit.reward_model(seed)
    return Built(CARDS(kit.patient, critic, options, max_batch_size=kit.options.batch_size), {}, {})


def _transfer_q(kit: Kit, seed: int, setting: Setting) -> Built:
    from llmdoctor.baselines.transfer_q import TransferQ

    decoder = TransferQ(
        kit.patient,
        kit.policy("dpo", seed),
        kit.reward_model(seed),
        strength=setting["strength"],
        top_k=TRANSFER_Q_CANDIDATES,
        rollout_tokens=kit.options.rollout_tokens,
        max_batch_size=max(1, kit.options.batch_size // TRANSFER_Q_CANDIDATES),
    )
    return Built(decoder, {}, {})


def _grid(knob: str, *values: float, **fixed: float) -> tuple[Setting, ...]:
    return tuple({knob: float(value), **fixed} for value in values)


_CRITIC = ("reward_model",)

CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(DOCTOR, "LLMdoctor", "this project; arXiv 2601.10416",
                  _grid("beta", 0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3), guided(MERGED, "ratio"),
                  trained=(MERGED,)),
        Contender(DOCTOR_OF_ROUNDS, "LLMdoctor, trained in rounds", "this project; arXiv 2601.10416",
                  _grid("beta", 0.25, 0.5, 1, 1.5, 2, 3, 4), guided("tfpo", "ratio"), trained=("tfpo",), aside=True),
        Contender(DOCTOR_OF_LABELS, "LLMdoctor, trained on the pairs' labels", "this project",
                  _grid("beta", 0.125, 0.25, 0.5, 1, 2), guided(LABELS, "ratio"), trained=(LABELS,), aside=True),
        Contender(DOCTOR_OF_PAIRS, "LLMdoctor, trained on the pairs", "this project; arXiv 2601.10416",
                  _grid("beta", 0.25, 0.5, 1, 1.5, 2, 3), guided(PAIRS, "ratio"), trained=(PAIRS,), aside=True),
        Contender(DOCTOR_BALANCED, "LLMdoctor, rounds and pairs added up", "this project; arXiv 2601.10416",
                  _grid("beta", 0.25, 0.5, 0.75, 1, 1.5, 2, 3), guided(MERGED_SUBTB, "ratio"),
                  trained=(MERGED_SUBTB,), aside=True),
        Contender("llmdoctor_onset", "LLMdoctor, β growing over 4 tokens", "this project",
                  _grid("beta", 1, 2, onset=4.0), guided(MERGED, "ratio"), trained=(MERGED,), aside=True),
        Contender("llmdoctor_alpha", "LLMdoctor at β = 1, α = ¾ and 1¼", "this project",
                  _grid("alpha", 0.75, 1.25, beta=1.0), guided(MERGED, "ratio"), trained=(MERGED,), aside=True),
        Contender("llmdoctor_product", "LLMdoctor (product)", "arXiv 2601.10416", _grid("beta", 0.5, 1),
                  guided(MERGED, "product"), trained=(MERGED,)),
        Contender("llmdoctor_best", "LLMdoctor, best of 4 by read-out", "this project", _grid("beta", 0.5, 1, n=4.0),
                  _best_guided(MERGED), trained=(MERGED, READOUT), aside=True),
        Contender(PATIENT, "patient, sampled", "", ({},), _patient_alone(samples=SAMPLES), any_task=True),
        Contender("greedy", "greedy", "", ({},), _patient_alone(temperature=0.0), any_task=True),
        Contender("temperature", "temperature 0.7", "", ({},), _patient_alone(temperature=0.7), any_task=True),
        Contender("top_k", "top-k 50", "arXiv 1805.04833", ({},), _patient_alone(top_k=50), any_task=True),
        Contender("top_p", "top-p 0.9", "arXiv 1904.09751", ({},), _patient_alone(top_p=0.9), any_task=True),
        Contender("contrastive", "contrastive search", "arXiv 2202.06417", ({},), _contrastive, any_task=True),
        Contender(BEST_OF_N, "best-of-n", "arXiv 2401.01879", _grid("n", 2, 4, 8), None, trained=_CRITIC),
        Contender("readout_best", "best-of-n by read-out", "this project", _grid("n", 2, 4, 8), None,
                  trained=(READOUT,), aside=True),
        Contender("args", "ARGS, greedy", "arXiv 2402.01694", _grid("weight", 1.5), _args(0.0), trained=_CRITIC),
        Contender("args_stochastic", "ARGS, stochastic", "arXiv 2402.01694", _grid("weight", 1, 3), _args(1.0),
                  trained=_CRITIC),
        Contender("cards", "CARDS", "arXiv 2406.16306", _grid("temperature", 0.7), _cards,
                  trained=_CRITIC),
        Contender("transfer_q", "Transfer-Q*", "arXiv 2405.20495", _grid("strength", 1), _transfer_q,
                  few_prompts=True, trained=("dpo", "reward_model")),
        Contender("genarm", "GenARM", "arXiv 2410.08193", _grid("beta", 0.25, 0.5, 1, 2), guided("genarm", "product"),
                  trained=("genarm",)),
        Contender("faces", "two faces contrasted, no training", "this project", _grid("beta", 1, 2), _faces),
        Contender("dpo", "DPO (policy at β = 1, log-ratio guide elsewhere)", "arXiv 2305.18290",
                  _grid("beta", 0.25, 0.5, 1, 1.5, 2), guided("dpo", "ratio"), trained=("dpo",)),
        Contender("dpo_best", "DPO, best of 4 by read-out", "this project's read-out", _grid("beta", 0.5, 1, n=4.0),
                  _best_guided("dpo"), trained=("dpo", READOUT), aside=True),
    )
}  # fmt: skip
"""DPO's log-ratio guide at β = 1 is its policy wherever its base is the patient."""

FORMS = (
    DOCTOR_OF_ROUNDS, DOCTOR_OF_LABELS, DOCTOR_OF_PAIRS, DOCTOR_BALANCED, "llmdoctor_onset", "llmdoctor_product",
    "llmdoctor_best",
)  # fmt: skip
"""Other forms of LLMdoctor with β as their knob, so that below their gentlest setting there is the patient itself."""
