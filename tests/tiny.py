"""What the tests of the stages share: faces, pairs of very different lengths, and the slow way to score a token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmdoctor.data.preferences import PreferencePair
from llmdoctor.models.doctor import Doctor
from llmdoctor.models.loading import LoadedModel
from llmdoctor.rewards.acquire import RewardOptions, ScoringOptions, acquire_rewards
from llmdoctor.rewards.faces import FacePair
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.config import TFPOConfig

FACES = FacePair("kind", "Be kind.", "Be rude to them.")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
_WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "house", "Hello", "how", "are", "you", "zebra", "é", "7"]


def pair(chosen: str, rejected: str, prompt: str = "Hi", **options: Any) -> PreferencePair:
    return PreferencePair(({"role": "user", "content": prompt},), chosen, rejected, **options)


def some_pairs(count: int, seed: int = 0) -> list[PreferencePair]:
    """Pairs whose prompts and responses have from 1 to 12 words; every fourth has a cut response."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(1, 12)))

    return [
        pair(text(), text() + "!", f"{number} {text()}", chosen_complete=number % 4 != 3) for number in range(count)
    ]


def acquire(model: LoadedModel, pairs: Sequence[PreferencePair], folder: Path, **options: Any) -> RewardStore:
    """Stage 1 with `FACES`, unsigned; options that are not `acquire_rewards`'s own go to `RewardOptions`."""
    options = {"signed": False, **options}
    own = {name: options.pop(name) for name in ("rescore", "progress", "scoring", "faces") if name in options}
    own = {"faces": FACES, "scoring": ScoringOptions(shard_size=8, batch_tokens=600), **own}
    return acquire_rewards(model, pairs, folder, rewards=RewardOptions(**options), **own)


@torch.no_grad()
def naive_logps(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """[L] log-probabilities of a completion: the whole sequence, one row, no cache, no padding."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return torch.stack([logps[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])


def fresh_doctor(base: LoadedModel, *, lora: bool = True, seed: int = 0, **options: Any) -> Doctor:
    """An untrained doctor; LoRA on some layers of both kinds."""
    return Doctor.from_base(base, lora=dict(LORA) if lora else None, seed=seed, **options)


def shaken(doctor: Doctor, seed: int = 1) -> Doctor:
    """The doctor with random numbers added to all that is trained: as good as trained, and at once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in doctor.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return doctor


def config(folder: Path, **options: Any) -> TFPOConfig:
    """Training arguments without evaluation, checkpoints and log lines, unless asked for."""
    quiet = {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return TFPOConfig(output_dir=str(folder), **{**quiet, "per_device_train_batch_size": 4, **options})


def tensors(module: Any) -> dict[str, Tensor]:
    """A copy of every parameter and buffer by its name."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
