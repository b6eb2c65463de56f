"""Sources on disk, and one comparison of all methods that the tests read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.bench.tools import arena_of, float32, sources

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.table import make_frontier, make_table


@pytest.fixture(autouse=True, scope="module")
def _float32() -> Iterator[None]:
    with float32():
        yield


@pytest.fixture(scope="session")
def bench_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pairs of two tasks and with prompts; read-only for tests."""
    return sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def compared(tiny_folder: Path, bench_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    """All methods on one task with two seeds, table and frontier written; a test that writes copies its folder."""
    with float32():
        arena, _ = arena_of(tiny_folder, bench_sources, tmp_path_factory.mktemp("compared"))
        make_table(arena, everything=True)
        make_frontier(arena, everything=True)
    return arena
