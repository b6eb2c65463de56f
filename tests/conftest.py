"""Shared fixtures: a tiny random Llama with a byte-level tokenizer and a chat template. No network."""

from __future__ import annotations

import os

# As llmdoctor.threads.spin_briefly, before anything can load torch.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes side by side with a thread each do more than threads that wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.killing import JobServer
from tests.tiny import save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmdoctor.models.loading import LoadedModel, load_model

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = ["system user assistant", "the cat sat on the mat and the dog ran to the house", "Hello, how are you today?"]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, 300 tokens: 3 control tokens (end of turn: `<|im_end|>`), 256 bytes, a few merges; ChatML."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        min_frequency=1,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """The tiny model and its tokenizer as a folder. Shared: a test that changes files copies it first."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), tiny_tokenizer)


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Five random layers, embeddings tied to the head, as SmolLM2's are."""
    return save_tiny(tmp_path_factory.mktemp("deep"), tiny_tokenizer, seed=3, context=128, layers=5, tied=True)


@pytest.fixture
def tiny_model(tiny_folder: Path) -> LoadedModel:
    """The tiny model, loaded afresh for every test: float32, frozen, on the CPU."""
    return load_model(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    """Runs jobs in processes that a test can kill with SIGKILL."""
    server = JobServer(tmp_path_factory.mktemp("jobs") / "errors.log")
    yield server
    server.close()
