"""Rewards carried over to another tokenizer's tokens: by hand, against a loop over bytes, and through training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import CORPUS, OTHER_CORPUS, acquire, byte_level, load, pair, save_tiny, sentencepiece
from tokenizers import normalizers

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.models.vocab import Vocabulary
from llmdoctor.rewards.acquire import ScoringOptions
from llmdoctor.rewards.store import SIDES, RewardStore
from llmdoctor.rewards.transfer import CARRIED, TransferredRewards, carry, rewards_for, share_out


@pytest.mark.parametrize(
    ("values", "source", "target", "expected"),
    [
        ([3, 1], [3, 4], [1, 4], [1, 3]),
        ([3, 1], [3, 4], [3, 4], [3, 1]),
        ([4], [8], [1, 2, 8], [0.5, 0.5, 3]),
        ([1, 2, 4], [1, 2, 4], [4], [7]),
        # The first two tokens are part of the third's character; the last has no text of its own.
        ([1, 2, 3, 5], [0, 0, 2, 2], [1, 2], [5.5, 5.5]),
        ([1, 0, 2], [2, 2, 4], [2, 4], [1, 2]),
        ([1, 2], [0, 0], [0], [3]),
        ([], [], [0], [0]),
        ([1, 2], [1, 2], [], []),
    ],
)
def test_share_out(values: list[float], source: list[int], target: list[float], expected: list[float]) -> None:
    assert share_out(values, source, target) == pytest.approx(expected)


SPANS = st.lists(st.integers(1, 5), min_size=1, max_size=8)


@given(SPANS, st.lists(st.integers(0, 60), max_size=7), st.data())
def test_share_out_is_a_sum_over_bytes(lengths: list[int], cuts: list[int], data: st.DataObject) -> None:
    """Every byte carries value/length of its token; a target has the sum of its bytes'."""
    values = data.draw(st.lists(st.floats(-1, 1), min_size=len(lengths), max_size=len(lengths)))
    total = sum(lengths)
    source = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    target = [*sorted({cut % total for cut in cuts} - {0}), total]
    by_byte = [value / length for value, length in zip(values, lengths, strict=True) for _ in range(length)]
    expected = [sum(by_byte[begin:end]) for begin, end in zip([0, *target], target, strict=False)]
    assert share_out(values, source, target) == pytest.approx(expected, abs=1e-12)


TEXT = st.text(alphabet="the catéö 😊日\n<s>", max_size=20)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.booleans(), st.data())
@pytest.mark.parametrize("led", [False, True])
def test_totals_are_kept(led: bool, text: str, terminal: bool, data: st.DataObject) -> None:
    """Any text either way between a byte-level and a sentencepiece tokenizer; the end's reward is the end's."""
    ours, theirs = (ChatEncoder(tokenizer) for tokenizer in _tokenizers(led))
    ids = ours.completion(text, terminal).ids
    values = data.draw(st.lists(st.floats(-1, 1), min_size=len(ids), max_size=len(ids)))
    vocabulary = Vocabulary.of(theirs)
    got, carried = carry(ours.token_texts(ids), terminal, {"rewards": values}, theirs, vocabulary)
    # Not `text`: sentencepiece puts a space into a text that spells a control token, where it is cut.
    assert got == theirs.completion(ours.decode(ids), terminal).ids
    assert len(carried["rewards"]) == len(got)
    assert sum(carried["rewards"]) == pytest.approx(sum(values), abs=1e-9)
    if terminal:
        assert carried["rewards"][-1] == values[-1]


def _tokenizers(led: bool, made: list[Any] = []) -> list[Any]:  # noqa: B006 made once
    if not made:
        made += [byte_level(300, CORPUS), sentencepiece(OTHER_CORPUS)]
    return made[::-1] if led else made


def test_a_character_of_several_tokens() -> None:
    """ "a😊b": the patient has five tokens, one a byte of "😊"; the doctor merges its bytes as two. What the four bytes
    have, .1 + .2 + .3 + .4, is the character's; each of the doctor's halves gets half of it."""
    ours = ChatEncoder(byte_level(258, CORPUS))
    theirs = ChatEncoder(byte_level(320, ["😊😊 x"]))
    vocabulary = Vocabulary.of(theirs)
    tokens = ours.token_texts(ours.text_ids("a😊b"))
    assert len(tokens) == 6
    ids, carried = carry(tokens, False, {"rewards": [1, 0.1, 0.2, 0.3, 0.4, 2]}, theirs, vocabulary)
    lengths = [len(vocabulary.spelled[index] or b"") for index in ids]
    assert sum(lengths) == 6
    assert len(lengths) < 6
    assert carried["rewards"] == pytest.approx([1, *(length / 4 for length in lengths[1:-1]), 2])


def test_a_cut_character_is_left_out() -> None:
    """A response cut within "😊": the doctor reads "a", which gets its own reward and the broken character's."""
    ours, theirs = ChatEncoder(byte_level(258, CORPUS)), ChatEncoder(byte_level(300, OTHER_CORPUS))
    tokens = ours.token_texts(ours.text_ids("a😊")[:3])
    assert "".join(tokens) == "a\ufffd"
    ids, carried = carry(tokens, False, {"rewards": [1, 0.25, 0.5]}, theirs, Vocabulary.of(theirs))
    assert theirs.decode(ids) == "a"
    assert carried["rewards"] == [1.75]


def test_a_tokenizer_that_normalises() -> None:
    """The doctor reads e and an accent (3 bytes) as a letter of 2, and its four tokens, a byte each, end at 5/4, 10/4,
    15/4 and 5 of the text's 5 bytes, which carry 1, 2, 2, 2 and 8."""
    tokenizer = byte_level(258, CORPUS)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    ours, theirs = ChatEncoder(byte_level(258, CORPUS)), ChatEncoder(tokenizer)
    text = "xe\u0301y"
    tokens = ours.token_texts(ours.text_ids(text))
    values = [1.0, 2.0, 0.0, 4.0, 8.0]
    ids, carried = carry(tokens, False, {"rewards": values}, theirs, Vocabulary.of(theirs))
    assert len(ids) == 4
    assert carried["rewards"] == pytest.approx([1 + 2 / 4, 2 * 3 / 4 + 2 * 2 / 4, 2 * 5 / 4, 2 / 4 + 8])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RewardStore:
    folder = tmp_path_factory.mktemp("patient")
    patient = load(save_tiny(folder / "model", byte_level(300, CORPUS), seed=1))
    pairs = [
        pair("hello there café 😊", "the dog", f"{number} hello", rejected_complete=number % 2 == 0)
        for number in range(6)
    ]
    return acquire(patient, pairs, folder / "rewards", theta=0.1, scoring=ScoringOptions(max_completion_length=12))


@pytest.mark.parametrize("make", [lambda: byte_level(320, OTHER_CORPUS), lambda: sentencepiece(OTHER_CORPUS)])
def test_a_store_in_other_tokens(store: RewardStore, tmp_path: Path, make: Any) -> None:
    base = load(save_tiny(tmp_path / "base", make(), seed=2))
    encoder = ChatEncoder.for_model(base.model, base.tokenizer)
    carried = rewards_for(base, store)
    assert isinstance(carried, TransferredRewards)
    assert rewards_for(base, carried) is carried
    rows, dataset = list(carried.rows()), carried.dataset()
    assert len(rows) == len(dataset) == len(store) == 6
    assert [row["chosen_ids"] for row in dataset] == [row["chosen_ids"] for row in rows]
    some = 0
    for before, after in zip(store.rows(), rows, strict=True):
        assert after["prompt"] == before["prompt"]
        for side in SIDES:
            terminal = before[f"{side}_terminal"]
            text = "".join(before[f"{side}_tokens"][:-1] if terminal else before[f"{side}_tokens"]).rstrip("\ufffd")
            assert after[f"{side}_ids"] == encoder.completion(text, terminal).ids
            assert after[f"{side}_terminal"] == terminal
            assert len(after[f"{side}_tokens"]) == len(after[f"{side}_ids"])
            for name in CARRIED:
                assert len(after[f"{side}_{name}"]) == len(after[f"{side}_ids"])
                assert sum(after[f"{side}_{name}"]) == pytest.approx(sum(before[f"{side}_{name}"]), abs=1e-5)
            some += any(after[f"{side}_rewards"])
    assert some == 12
    assert {key: carried.fingerprint[key] for key in store.fingerprint} == store.fingerprint
    assert set(carried.fingerprint) - set(store.fingerprint) == {"carried_to"}


def test_the_patients_own_tokenizer_changes_nothing(store: RewardStore, tmp_path: Path) -> None:
    base = load(save_tiny(tmp_path / "base", byte_level(300, CORPUS), seed=5))
    assert rewards_for(base, store) is store
