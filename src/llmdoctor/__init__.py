"""Steer a frozen language model at decoding time with a small trained doctor (LLMdoctor, arXiv 2601.10416).

    pairs ─► token rewards ─► TFPO training ─► doctor ─► guided decoding

The public names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmdoctor.data.preferences import load_preferences
    from llmdoctor.decoding.engine import GuidedDecoder
    from llmdoctor.decoding.guides import load_guide
    from llmdoctor.decoding.request import Request, SamplingParams
    from llmdoctor.models.doctor import Doctor
    from llmdoctor.models.loading import load_model
    from llmdoctor.models.merging import merge_doctors
    from llmdoctor.rewards.acquire import RewardOptions, acquire_rewards
    from llmdoctor.rewards.faces import face_pairs
    from llmdoctor.tfpo.config import TFPOConfig
    from llmdoctor.tfpo.rounds import RoundOptions
    from llmdoctor.tfpo.train import train_doctor

_HOMES = {
    "load_model": "models.loading",
    "load_preferences": "data.preferences",
    "face_pairs": "rewards.faces",
    "RewardOptions": "rewards.acquire",
    "acquire_rewards": "rewards.acquire",
    "TFPOConfig": "tfpo.config",
    "RoundOptions": "tfpo.rounds",
    "train_doctor": "tfpo.train",
    "Doctor": "models.doctor",
    "merge_doctors": "models.merging",
    "load_guide": "decoding.guides",
    "GuidedDecoder": "decoding.engine",
    "Request": "decoding.request",
    "SamplingParams": "decoding.request",
}

__all__ = [
    "Doctor",
    "GuidedDecoder",
    "Request",
    "RewardOptions",
    "RoundOptions",
    "SamplingParams",
    "TFPOConfig",
    "acquire_rewards",
    "face_pairs",
    "load_guide",
    "load_model",
    "load_preferences",
    "merge_doctors",
    "train_doctor",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"llmdoctor.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOMES)
