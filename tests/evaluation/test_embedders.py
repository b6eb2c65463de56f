from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from llmdoctor.errors import UserError
from llmdoctor.evaluation.embedders import get_embedder, unit_vectors


@pytest.fixture
def _own_module(tmp_path, monkeypatch):
    (tmp_path / "own_embedder.py").write_text("def lengths(texts):\n    return [[len(t), 1.0] for t in texts]\nx = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield
    sys.modules.pop("own_embedder", None)


@pytest.mark.usefixtures("_own_module")
def test_a_users_embedder_in_the_current_folder_is_found():
    """(3, 1) and (0, 1) at length 1."""
    vectors = unit_vectors(get_embedder("own_embedder:lengths"), ["abc", ""])
    assert vectors == pytest.approx(np.array([[3 / math.sqrt(10), 1 / math.sqrt(10)], [0, 1]]))


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_embedder:x", "embedder 'own_embedder:x': module 'own_embedder' has no function 'x'"),
        ("own_nothing:f", "embedder 'own_nothing:f': cannot import 'own_nothing'"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_clear_line(path, message):
    with pytest.raises(UserError, match=message) as caught:
        get_embedder(path)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[embed\]'.*package.module:function"):
        get_embedder("all-MiniLM-L6-v2")


def test_a_sentence_transformer_is_loaded_from_a_folder(tiny_folder):
    pytest.importorskip("sentence_transformers")
    embedder = get_embedder(str(tiny_folder))
    same, again, other = unit_vectors(embedder, ["red fish", "red fish", "a quick brown fox"])
    assert same @ again == pytest.approx(1, abs=1e-5)
    assert same @ other < 1 - 1e-5


def test_a_folder_that_holds_no_model_is_one_clear_line(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(UserError, match="cannot load it") as caught:
        get_embedder(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0, 2.0]], r"shape \(1, 2\) for 2 texts"),
        ([1.0, 2.0], r"shape \(2,\) for 2 texts"),
        ([[1.0], [1.0, 2.0]], "did not return an array of numbers for 2 texts"),
        ([[1.0], ["x"]], "did not return an array of numbers for 2 texts"),
        ([[1.0, 0.0], [0.0, 0.0]], "no direction .* to 'second'"),
        ([[1.0, math.nan], [0.0, 1.0]], "no direction .* to 'first'"),
    ],
)
def test_vectors_that_say_nothing_are_refused(vectors, message):
    with pytest.raises(UserError, match=message):
        unit_vectors(lambda _texts: vectors, ["first", "second"])


def test_an_embedder_that_breaks_is_one_clear_line():
    def broken(_texts):
        raise KeyError("no such word")

    with pytest.raises(
        UserError, match=r"did not return an array of numbers for 1 texts \(KeyError: 'no such word'\)$"
    ):
        unit_vectors(broken, ["first"])
