"""A tiny patient with enough layers to leave some out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Five random layers, embeddings tied to the head, as SmolLM2's are."""
    return save_tiny(tmp_path_factory.mktemp("deep"), tiny_tokenizer, seed=3, context=128, layers=5, tied=True)
