"""Steer a frozen language model at decoding time with a small trained doctor (LLMdoctor, arXiv 2601.10416).

    pairs ─► token rewards ─► TFPO training ─► doctor ─► guided decoding

The public names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmdoctor.baselines.best_of_n import BestOfN
    from llmdoctor.data.preferences import PreferencePair, load_preferences
    from llmdoctor.decoding.engine import GuidedDecoder
    from llmdoctor.decoding.guides import Guide, load_guide
    from llmdoctor.decoding.request import Completion, Request, SamplingParams
    from llmdoctor.errors import UserError
    from llmdoctor.models.doctor import Doctor
    from llmdoctor.models.draft import load_draft
    from llmdoctor.models.loading import LoadedModel, load_model
    from llmdoctor.models.merging import merge_doctors
    from llmdoctor.rewards.acquire import RewardOptions, ScoringOptions, acquire_rewards
    from llmdoctor.rewards.faces import face_pairs
    from llmdoctor.rewards.readout import Readout, fit_readout
    from llmdoctor.rewards.store import RewardStore
    from llmdoctor.tfpo.config import TFPOConfig
    from llmdoctor.tfpo.options import DoctorOptions
    from llmdoctor.tfpo.rounds import RoundOptions
    from llmdoctor.tfpo.train import train_doctor

    __version__: str

_HOMES = {
    "load_model": "models.loading",
    "LoadedModel": "models.loading",
    "load_preferences": "data.preferences",
    "PreferencePair": "data.preferences",
    "face_pairs": "rewards.faces",
    "RewardOptions": "rewards.acquire",
    "ScoringOptions": "rewards.acquire",
    "acquire_rewards": "rewards.acquire",
    "RewardStore": "rewards.store",
    "TFPOConfig": "tfpo.config",
    "DoctorOptions": "tfpo.options",
    "RoundOptions": "tfpo.rounds",
    "train_doctor": "tfpo.train",
    "Doctor": "models.doctor",
    "merge_doctors": "models.merging",
    "Readout": "rewards.readout",
    "fit_readout": "rewards.readout",
    "load_guide": "decoding.guides",
    "Guide": "decoding.guides",
    "load_draft": "models.draft",
    "GuidedDecoder": "decoding.engine",
    "BestOfN": "baselines.best_of_n",
    "Request": "decoding.request",
    "SamplingParams": "decoding.request",
    "Completion": "decoding.request",
    "UserError": "errors",
}

__all__ = [
    "BestOfN",
    "Completion",
    "Doctor",
    "DoctorOptions",
    "Guide",
    "GuidedDecoder",
    "LoadedModel",
    "PreferencePair",
    "Readout",
    "Request",
    "RewardOptions",
    "RewardStore",
    "RoundOptions",
    "SamplingParams",
    "ScoringOptions",
    "TFPOConfig",
    "UserError",
    "__version__",
    "acquire_rewards",
    "face_pairs",
    "fit_readout",
    "load_draft",
    "load_guide",
    "load_model",
    "load_preferences",
    "merge_doctors",
    "train_doctor",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("llmdoctor")
    if name in _HOMES:
        return getattr(import_module(f"llmdoctor.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
