"""What the tests of the stages share: faces, pairs of very different lengths, and the slow way to score a token."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmdoctor.data.preferences import PreferencePair
from llmdoctor.models.doctor import Doctor
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.rewards.acquire import RewardOptions, ScoringOptions, acquire_rewards
from llmdoctor.rewards.faces import FacePair
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.config import TFPOConfig

FACES = FacePair("kind", "Be kind.", "Be rude to them.")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
_WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "house", "Hello", "how", "are", "you", "zebra", "é", "7"]


def load(folder: Path) -> LoadedModel:
    """The model of a folder, in float32 on the CPU."""
    return load_model(str(folder), dtype="float32", device="cpu")


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
    own = {name: options.pop(name) for name in ("rescore", "on_bad", "progress", "scoring", "faces") if name in options}
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


# Each tokenizer merges other words; some characters are several tokens.
CORPUS = [
    "the cat sat on the mat and the dog ran to the house",
    "Hello, how are you today?",
    "café café 😊 hello there",
]
OTHER_CORPUS = ["hello hello there, then the theme of other houses", "catalogue mathematics dogma you your", "é 7 😊😊"]


def byte_level(size: int, corpus: Sequence[str], *, begin: str = "<s>", end: str = "</s>") -> Any:
    """A byte-level BPE tokenizer of `size` tokens, whose chat template writes a turn between `begin` and `end`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        special_tokens=[begin, end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    turn = begin + "{{ message['role'] + ': ' + message['content'] }}" + end
    template = "{% for message in messages %}" + turn + "{% endfor %}"
    template += "{% if add_generation_prompt %}" + begin + "assistant: {% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, chat_template=template)


def sentencepiece(corpus: Sequence[str]) -> Any:
    """A tokenizer as Llama 2's: spaces are "▁", one is put before every text, unknown characters fall back to bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(vocab_size=80, min_frequency=2, show_progress=False, limit_alphabet=40)
    trained.train_from_iterator(corpus, trainer)
    rules = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *rules["vocab"]]
    backend = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=[tuple(merge) for merge in rules["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_tiny(
    folder: Path,
    tokenizer: Any,
    *,
    seed: int = 0,
    context: int = 512,
    extra_rows: int = 0,
    layers: int = 2,
    tied: bool = False,
) -> Path:
    """A tiny random Llama with this tokenizer as a folder; its embeddings may have `extra_rows` beyond the tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer) + extra_rows,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=context,
                tie_word_embeddings=tied,
                # Wide enough that distributions are far from uniform and a wrong token or position shows.
                initializer_range=0.2,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
