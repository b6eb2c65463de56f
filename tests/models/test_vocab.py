"""Tokens as bytes, and one vocabulary in another's words; against sums by hand in float64."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from tests.tiny import CORPUS, OTHER_CORPUS, byte_level, sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.errors import UserError
from llmdoctor.models.vocab import Table, Translation, Vocabulary, same_vocabulary
from llmdoctor.rewards.transfer import carry

TEXTS = ["Hello, how are you?", "  two  spaces\n\n\ttab", "café 😊 日本", "it's 1234", "x", "hello there"]
END = 1
"""The end of turn of the hand-made vocabularies below."""


def by_hand(*tokens: bytes | None, lead: bool = False) -> Vocabulary:
    """A vocabulary of these tokens; id 0 is a control token and id 1 the end; texts are split by the longest match."""
    spelled = [None, None, *tokens]

    def split(text: str) -> list[int]:
        data, ids = (b" " if lead else b"") + text.encode(), []
        while data:
            lengths = [(len(token), -index) for index, token in enumerate(spelled) if token and data.startswith(token)]
            if not lengths:
                return []
            length, index = max(lengths)
            ids.append(-index)
            data = data[length:]
        return ids

    names = [f"{index}" if token is None else token.decode("latin-1") for index, token in enumerate(spelled)]
    return Vocabulary(spelled, names, frozenset({END}), lambda texts: [split(text) for text in texts])


def logps_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


@pytest.mark.parametrize("make", [lambda: byte_level(300, CORPUS), lambda: sentencepiece(CORPUS)])
def test_tokens_spell_the_text(make: Any) -> None:
    """Whatever the tokenizer makes of a text, the bytes of its tokens are the text's (after the lead)."""
    encoder = ChatEncoder(make())
    vocabulary = Vocabulary.of(encoder)
    for text in TEXTS:
        ids = encoder.text_ids(text)
        assert vocabulary.spell(ids) == vocabulary.lead + text.encode()
        assert vocabulary.split(text.encode(), start=True) == ids
        # Within a text: whatever the ids, they spell the piece alone.
        assert vocabulary.spell(vocabulary.split(text.encode())) == text.encode()
    assert vocabulary.spelled[encoder.end_of_turn] is None
    assert vocabulary.spell([encoder.end_of_turn, 10**6]) == b""


def test_leads() -> None:
    assert Vocabulary.of(ChatEncoder(byte_level(300, CORPUS))).lead == b""
    led = Vocabulary.of(ChatEncoder(sentencepiece(CORPUS)))
    assert led.lead == b" "
    assert led.start.bytes[led.inside.by_bytes[b" the"]] == b"the"
    # "▁h" and "h" read alike at the beginning, and the one with the lead is what the tokenizer makes.
    twice = [token for token in led.inside.by_bytes if b" " + token in led.inside.by_bytes and token != b" "]
    assert twice
    for token in twice:
        assert led.start.bytes[led.inside.by_bytes[token]] == token
        assert led.start.by_bytes[token] == led.inside.by_bytes[b" " + token]


def test_broken_characters_are_split_by_the_longest_match() -> None:
    vocabulary = by_hand(b"\xf0", b"\x9f", b"\xf0\x9f", b"\x98", b"a")
    assert vocabulary.split(b"\xf0\x9f\x98") == [4, 5]
    assert vocabulary.split(b"a\x98\xff") == [6, 5], "0xff has no token and is skipped"


def test_added_tokens() -> None:
    """Special ones, and those the template writes, are control tokens; others are text, spaces as they are."""
    tokenizer = byte_level(280, CORPUS)
    tokenizer.add_tokens(["<say>", " wide "])
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant: ", "assistant: <say>")
    vocabulary = Vocabulary.of(ChatEncoder(tokenizer))
    said, wide = (tokenizer.convert_tokens_to_ids(name) for name in ("<say>", " wide "))
    assert vocabulary.spelled[said] is None
    assert vocabulary.spelled[wide] == b" wide "
    assert vocabulary.spell(vocabulary.split(b"<say>")) == b"<say>", "the text, not the control token"


def test_added_tokens_of_spaces() -> None:
    """Gemma lists runs of "▁" among the added tokens, too: they read as the decoder writes them, as spaces."""
    names = ["<unk>", "<bos>", "<eos>", "▁▁", "▁▁▁▁", *(f"<0x{value:02X}>" for value in range(256)), "▁", *"abre"]
    rules = {name: index for index, name in enumerate(names)}
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    backend = Tokenizer(models.BPE(vocab=rules, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[:3]])
    backend.add_tokens([AddedToken(name, normalized=False, special=False) for name in names[3:5]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = byte_level(258, []).chat_template
    encoder = ChatEncoder(tokenizer)
    vocabulary = Vocabulary.of(encoder)
    ids = encoder.text_ids("a    re  b")
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "▁▁▁▁", "r", "e", "▁▁", "b"]
    assert vocabulary.spell(ids).decode() == "a    re  b" == encoder.decode(ids)
    assert vocabulary.split(b"a    re", start=True) == ids[:4]
    # Another tokenizer's rewards lie where the text does: four spaces are four of the seven bytes.
    of_letters = ChatEncoder(byte_level(258, []))
    tokens = of_letters.token_texts(of_letters.text_ids("a    re"))
    values = {"rewards": [1.0 if token == " " else 0.0 for token in tokens]}
    assert carry(tokens, False, values, encoder, vocabulary) == (ids[:4], {"rewards": [0.0, 4.0, 0.0, 0.0]})
    doctor = Vocabulary.of(of_letters)
    read = Translation(vocabulary, doctor, len(names)).read(vocabulary.spell(ids), of_letters.text_ids)
    assert doctor.spell(read) == b"a    re  b"


def test_the_space_before_answers_of_a_model_without_a_template_is_no_part_of_them() -> None:
    """Its answers begin " so", another tokenizer's reading "so": a reward on that lies on the first token."""
    tokenizer = byte_level(300, CORPUS)
    tokenizer.chat_template = None
    encoder = ChatEncoder(tokenizer)
    vocabulary = Vocabulary.of(encoder)
    ids = encoder.text_ids("so it is")
    assert (vocabulary.lead, vocabulary.spell(ids)) == (b" ", b" so it is")
    assert vocabulary.split(b"so it is", start=True) == ids
    of_letters = ChatEncoder(byte_level(258, []))
    tokens = of_letters.token_texts(of_letters.text_ids("so it is"))
    values = {"rewards": [1.0 if place < 2 else 0.0 for place in range(len(tokens))]}
    carried = carry(tokens, False, values, encoder, vocabulary)
    spelled = list(accumulate(len(vocabulary.spelled[index] or b"") for index in ids))
    within = sum(end <= 3 for end in spelled) or 1
    assert carried[0] == ids
    assert sum(carried[1]["rewards"][:within]) == pytest.approx(2.0)


def test_tokens_that_are_no_bytes_are_refused() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="cannot be read as bytes: expected byte-level BPE or sentencepiece"):
        Vocabulary.of(ChatEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")))


def test_same_vocabulary() -> None:
    one = byte_level(300, CORPUS)
    assert same_vocabulary(one, byte_level(300, CORPUS))
    assert not same_vocabulary(one, byte_level(300, OTHER_CORPUS))
    assert not same_vocabulary(one, byte_level(301, CORPUS))


def test_every_token_leads_to_the_patients_first() -> None:
    """Patient: he, l, o, hello, x. Doctor: he, hell, o, hel; ids 0 and 1 are control and end on both sides.

    "he" and "o" are the patient's too. "hell" and "hel" the patient splits as he + l (+ l): both lead to "he", so
    P(he) = .1 + .2 + .3. "hello" (id 5) no token leads to; the doctor begins it with "hell" (longest match), as it
    begins nothing else that is unreached: P(hello) = .2. "l" and "x" the doctor cannot even begin: silent, 1/8. The
    patient's control token 0 has the doctor's name "0": its own .05. Ids 7 (beyond the vocabulary, width 8): silent.
    """
    patient, doctor = by_hand(b"he", b"l", b"o", b"hello", b"x"), by_hand(b"he", b"hell", b"o", b"hel")
    table = Table(patient, doctor, 8, start=False)
    mapped, unmapped = table.apply(logps_of(0.05, 0.15, 0.1, 0.2, 0.2, 0.3))
    expected = [0.05, 0.15, 0.6, 1 / 8, 0.2, 0.2, 1 / 8, 1 / 8]
    assert mapped.exp()[0].tolist() == pytest.approx(expected)
    assert float(unmapped) == pytest.approx(0, abs=1e-12)
    assert table.silent.nonzero()[:, 0].tolist() == [3, 6, 7]
    assert table.pieces.nonzero()[:, 0].tolist() == [5]


def test_first_pieces_are_shared_out() -> None:
    """Patient: ab, ac, abc. The doctor has the letters alone: "a" leads to none, and three tokens share its .6."""
    patient, doctor = by_hand(b"ab", b"ac", b"abc"), by_hand(b"a", b"b", b"c")
    table = Table(patient, doctor, 5, start=False)
    mapped, unmapped = table.apply(logps_of(0.1, 0.1, 0.6, 0.1, 0.1))
    assert mapped.exp()[0].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.2])
    # "a", "b" and "c" stand for no token of the patient's.
    assert float(unmapped) == pytest.approx(0.8)


def test_stop_tokens_go_by_role() -> None:
    """The doctor ends by ids 1 and 3, the patient by 1 (another name) and 2: each of its ends has both, .1 + .4."""
    doctor = Vocabulary(
        [None, None, b"a", None], ["<pad>", "<end>", "a", "<stop>"], frozenset({1, 3}), lambda texts: [[2]]
    )
    patient = Vocabulary([b"a", None, None], ["a", "<eot>", "<eos>"], frozenset({1, 2}), lambda texts: [[0]])
    mapped, unmapped = Table(patient, doctor, 3, start=False).apply(logps_of(0.2, 0.1, 0.3, 0.4))
    assert mapped.exp()[0].tolist() == pytest.approx([0.3, 0.5, 0.5])
    assert float(unmapped) == pytest.approx(0.2), "the padding token"
    # With the same names each end is its own.
    named = Vocabulary([b"a", None, None], ["a", "<end>", "<stop>"], frozenset({1, 2}), lambda texts: [[0]])
    mapped, _ = Table(named, doctor, 3, start=False).apply(logps_of(0.2, 0.1, 0.3, 0.4))
    assert mapped.exp()[0].tolist() == pytest.approx([0.3, 0.1, 0.4])


def test_a_doctors_control_token_is_no_end_and_no_text() -> None:
    """The patient ends by "<eos>", which is a control token of the doctor's but does not end its answers."""
    doctor = Vocabulary([None, None, b"a"], ["<eos>", "<end>", "a"], frozenset({1}), lambda texts: [[2]])
    patient = Vocabulary([b"a", None], ["a", "<eos>"], frozenset({1}), lambda texts: [[0]])
    mapped, unmapped = Table(patient, doctor, 2, start=False).apply(logps_of(0.5, 0.2, 0.3))
    assert mapped.exp()[0].tolist() == pytest.approx([0.3, 0.2])
    assert float(unmapped) == pytest.approx(0.5)


def test_sums_hold_in_the_far_tail() -> None:
    """Log-probabilities whose exponentials underflow: log(e^-900 + e^-901) = −900 + log(1 + e⁻¹); −inf stays −inf."""
    patient, doctor = by_hand(b"a"), by_hand(b"a", b"ab", b"ac")
    logps = torch.tensor([[0.0, -torch.inf, -900.0, -901.0, -torch.inf]], dtype=torch.float32)
    mapped, _ = Table(patient, doctor, 3, start=False).apply(logps)
    assert float(mapped[0, 2]) == pytest.approx(-900 + math.log1p(math.exp(-1)))
    mapped, _ = Table(patient, doctor, 3, start=False).apply(torch.full((1, 5), -torch.inf))
    assert float(mapped[0, 2]) == -torch.inf


@pytest.mark.parametrize("make", [lambda: byte_level(300, CORPUS), lambda: sentencepiece(CORPUS)])
@pytest.mark.parametrize("start", [False, True])
def test_equal_vocabularies_map_token_to_token(make: Any, start: bool) -> None:
    """Also bytes that sentencepiece has twice, "A" and "<0x41>", and what reads alike at the start, "▁h" and "h"."""
    vocabulary = Vocabulary.of(ChatEncoder(make()))
    table = Table(vocabulary, vocabulary, len(vocabulary), start=start)
    logps = torch.randn(3, len(vocabulary), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    mapped, unmapped = table.apply(logps)
    assert torch.equal(mapped, logps)
    assert not table.pieces.any()
    assert unmapped.tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_continuations_agree_with_the_patients_split() -> None:
    """The patient has emitted " he"; it splits " hello" as " he", "llo" and has " hey" whole.

    So " hello" may come (then "llo"), " hey" may not: the patient would have said so. In the middle of a patient's
    token, " h" emitted as one and the doctor's split " " + "h": "he" may take the place of "h" (before = " ").
    """
    patient = by_hand(b" he", b"llo", b" hey", b" h", b"e", b"y")
    doctor = by_hand(b" he", b" hello", b" hey", b"h", b"he", b" ")
    translation = object.__new__(Translation)
    translation.patient, translation.doctor, translation.width = patient, doctor, 8
    translation.inside = translation.start = Table(patient, doctor, 8, start=False)
    translation._continuations = {}
    assert translation.continuations([2], b"", b" he", start=False, first=False) == ([3], [3])
    assert translation.continuations([5], b" ", b"h", start=False, first=False) == ([], []), "the patient has ' he'"
    patient.spelled[2] = None
    translation.patient = by_hand(b" heroic", b"llo", b" hey", b" h", b"e", b"y")
    translation._continuations = {}
    assert translation.continuations([5], b" ", b"h", start=False, first=False) == ([6], [6])


def test_a_doctor_without_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"has no token for \d+ of the bytes .* \(the first is 0x09\)"):
        Translation(by_hand(b"a"), by_hand(b"a", b"b"), 3)


def test_reading_an_answer() -> None:
    """Whole characters by the tokenizer, the beginning of one by its bytes, and on after a broken one."""
    encoder = ChatEncoder(byte_level(300, OTHER_CORPUS))
    doctor = Vocabulary.of(encoder)
    translation = Translation(doctor, doctor, len(doctor))
    for text in TEXTS:
        assert translation.read(text.encode(), encoder.text_ids) == encoder.text_ids(text)
    smile = "😊".encode()
    for cut in range(1, 4):
        ids = translation.read(b"hello " + smile[:cut], encoder.text_ids)
        assert doctor.spell(ids) == b"hello " + smile[:cut]
        assert ids[: len(encoder.text_ids("hello "))] == encoder.text_ids("hello ")
    assert doctor.spell(translation.read(b"a\xff\xfeb " + smile[:2], encoder.text_ids)) == b"a\xff\xfeb " + smile[:2]
    led = ChatEncoder(sentencepiece(CORPUS))
    vocabulary = Vocabulary.of(led)
    translation = Translation(vocabulary, vocabulary, len(vocabulary))
    assert translation.read(b"the cat", led.text_ids) == led.text_ids("the cat")
    assert vocabulary.spell(translation.read(b"the\xffcat", led.text_ids)) == b" the\xffcat"


def test_shares() -> None:
    """Of the patient's four text tokens one is the doctor's, two begin with one of its tokens, one is beyond it."""
    patient, doctor = by_hand(b"a", b"ab", b"ac", b"z"), by_hand(b"a", b"b", b"c")
    translation = object.__new__(Translation)
    translation.patient, translation.width = patient, 6
    translation.inside = Table(patient, doctor, 6, start=False)
    assert translation.shares == {"direct": 0.25, "first_piece": 0.5}
