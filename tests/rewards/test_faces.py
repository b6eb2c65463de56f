"""Faces: what ships, and files of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmdoctor.errors import UserError
from llmdoctor.rewards.faces import FacePair, _shipped, face_pairs

PROMISED = {"helpful", "harmless", "honest", "polite", "positive", "concise", "readable"}


def test_every_promised_dimension_ships() -> None:
    assert set(_shipped()) >= PROMISED


@pytest.mark.parametrize("dimension", sorted(_shipped()))
def test_a_shipped_dimension_has_three_paraphrases_all_different(dimension: str) -> None:
    pairs = face_pairs(dimension)
    assert [pair.name for pair in pairs[:3]] == [dimension, f"{dimension}#2", f"{dimension}#3"]
    texts = [text for pair in pairs for text in (pair.positive, pair.negative)]
    assert len(set(texts)) == len(texts) >= 6
    assert len({pair.fingerprint() for pair in pairs}) == len(pairs)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "faces.yaml"
    path.write_text(
        "brève:\n- {positive: ' Sois bref. ', negative: Sois long.}\n- {positive: a, negative: b}\n", "utf-8"
    )
    assert face_pairs("brève", path) == [
        FacePair("brève", "Sois bref.", "Sois long."),
        FacePair("brève#2", "a", "b"),
    ]


def test_the_fingerprint_sees_texts_and_sides_but_not_the_name() -> None:
    pair = FacePair("x", "good", "bad")
    assert pair.fingerprint() == FacePair("y", "good", "bad").fingerprint()
    assert pair.fingerprint() != FacePair("x", "bad", "good").fingerprint()
    assert FacePair("x", "ab", "c").fingerprint() != FacePair("x", "a", "bc").fingerprint()


def test_an_unknown_dimension_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no faces for the dimension 'happy' in the shipped faces; it has: .*positive"):
        face_pairs("happy")
    path = tmp_path / "faces.yaml"
    # YAML reads a bare `no` as a boolean: still a clear line.
    path.write_text(
        "no: [{positive: a, negative: b}]\n1: [{positive: a, negative: b}]\nz: [{positive: a, negative: b}]"
    )
    with pytest.raises(UserError, match=r"no faces for the dimension 'no' in .*faces\.yaml; it has: 1, False, z"):
        face_pairs("no", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x: [{positive: a}]", "x, entry 1 needs two texts, `positive` and `negative`"),
        (b"x: [{positive: a, negative: b}, {positive: '  ', negative: b}]", "x, entry 2 needs two texts"),
        (b"x: [{positive: 3, negative: b}]", "x, entry 1 needs two texts"),
        (b"x: [just text]", "x, entry 1 needs two texts"),
        (b"x: [{positive: same, negative: ' same '}]", "x, entry 1: both faces are the same text"),
        (b"x: {positive: a, negative: b}", "must map each dimension to a list"),
        (b"x: []", "must map each dimension to a list"),
        (b"- a", "must map each dimension to a list"),
        (b"", "must map each dimension to a list"),
        (b"{}", "must map each dimension to a list"),
        (b"x: [", "is not YAML"),
        (b"x: \xff", "is not YAML"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "faces.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"faces\.yaml") as caught:
        face_pairs("x", path)
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no faces file .*absent\.yaml"):
        face_pairs("positive", tmp_path / "absent.yaml")
