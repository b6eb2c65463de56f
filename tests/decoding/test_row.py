"""Rows and what is counted for them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.tiny import CORPUS, fresh_doctor, load, save_tiny, sentencepiece, shaken
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.decoding.row import Row, open_row
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel, load_model


def test_a_row_takes_tokens_back(tiny_model: LoadedModel) -> None:
    encoder = GuidedDecoder(tiny_model).encoder
    row = Row(0, Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=3)), [[5]], encoder, 100)
    for token in (40, 41, 42):
        row.append(token, -1.0 * token, -2.0 * token)
    assert (row.done, row.completion.finish_reason) == (True, "length")
    row.retract(1)
    assert (row.done, row.completion.finish_reason, row.completion.text) == (False, "", "")
    done = row.completion
    assert (done.token_ids, done.logps, done.patient_logps, done.drawn_logps) == ([40], [-40.0], [-80.0], [-40.0])
    row.append(encoder.end_of_turn, 0.0, 0.0)
    assert (row.done, row.completion.finish_reason) == (True, "stop")


@pytest.mark.parametrize("seed", range(20))
def test_stops_are_where_the_whole_text_has_them_first(tiny_model: LoadedModel, seed: int) -> None:
    """Against a search of the whole answer after every token: random tokens, broken characters among them."""
    encoder = GuidedDecoder(tiny_model).encoder
    draw = random.Random(seed)
    ids = draw.choices([token for token in range(250) if token not in encoder.stop_ids], k=200)
    text = encoder.decode(ids)
    # Of the text itself, mostly late and long, and such as are not in it.
    starts = [draw.randrange(len(text) // 4, len(text)) for _ in range(3)]
    stops = (*(text[start : start + draw.randrange(1, 40)] for start in starts), "\ufffd\ufffd\ufffd", "no such thing")
    sampling = SamplingParams(max_new_tokens=300, stop=stops)
    row = Row(0, Request.from_text("Hi", sampling=sampling), [[5]], encoder, 1000)
    for count, token in enumerate(ids, 1):
        row.append(token, 0.0, 0.0)
        whole = encoder.decode(ids[:count])
        assert row.done == any(stop in whole for stop in stops)
        if row.done:
            assert row.completion.text == whole[: min(whole.find(stop) for stop in stops if stop in whole)]
            return
    pytest.fail("a piece of the text is in the text")


def test_stops_of_a_tokenizer_that_falls_back_to_bytes(tmp_path: Path) -> None:
    """A run of bytes that begins inside a character is read as broken as a whole: the few tokens must not begin so."""
    encoder = GuidedDecoder(load(save_tiny(tmp_path, sentencepiece(CORPUS)))).encoder
    draw = random.Random(0)
    stopped = 0
    for _ in range(200):
        text = "".join(draw.choices(["你", "好", "。", "the ", "cat", "é", "🙂", ". "], k=draw.randrange(4, 30)))
        stops = tuple(draw.choices(["。", "好。", "cat", "🙂é", "界"], k=2))
        ids = encoder.text_ids(text)
        row = Row(
            0, Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=999, stop=stops)), [[5]], encoder, 999
        )
        for count, token in enumerate(ids, 1):
            row.append(token, 0.0, 0.0)
            whole = encoder.decode(ids[:count])
            assert row.done == any(stop in whole for stop in stops), (text, stops)
            if row.done:
                stopped += 1
                break
    assert 100 < stopped < 200


def test_stops_may_be_any_string(tiny_model: LoadedModel) -> None:
    """A byte of the command line that is no UTF-8 arrives as half a surrogate pair."""
    encoder = GuidedDecoder(tiny_model).encoder
    sampling = SamplingParams(max_new_tokens=9, stop=("\udcff",))
    row = Row(0, Request.from_text("Hi", sampling=sampling), [[5]], encoder, 99)
    row.append(40, 0.0, 0.0)
    assert not row.done


def test_stops_are_looked_for_in_a_few_tokens(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = GuidedDecoder(tiny_model).encoder
    read: list[int] = []
    decode = type(encoder).decode
    monkeypatch.setattr(type(encoder), "decode", lambda self, ids: read.append(len(ids)) or decode(self, ids))
    sampling = SamplingParams(max_new_tokens=300, stop=("never said",))
    row = Row(0, Request.from_text("Hi", sampling=sampling), [[5]], encoder, 1000)
    for _ in range(200):
        row.append(40, 0.0, 0.0)
    assert max(read) < 30


def test_bytes_are_shown_when_no_byte_can_break_them_any_more() -> None:
    """A run of byte tokens is read as a whole: a line's end before a character that is cut is not shown yet."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b"]
    model = models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    encoder = ChatEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"))
    assert encoder.byte_ids == frozenset(range(3, 259))
    row = Row(0, Request.from_text("Hi"), [[5]], encoder, 100)
    shown = []
    for token in (259, 3 + 0x0A, 3 + 0xF0, 3 + 0x9F, 260):
        row.append(token, 0.0, 0.0)
        shown.append(row.visible_text())
    assert shown[:4] == [shown[0]] * 4
    assert shown[4].startswith(shown[0])
    row.finish("length")
    assert row.completion.text.startswith(shown[4])


def test_the_longest_prompt_counts(tiny_model: LoadedModel) -> None:
    encoder = GuidedDecoder(tiny_model).encoder
    hi = Request.from_text("Hi")
    assert open_row(0, hi, [[5] * 3, [5] * 7], encoder, [10, 10]).room == 3
    with pytest.raises(UserError, match="prompt 1 has 10 tokens as one of the doctors or judges reads it; the cont"):
        open_row(0, hi, [[5] * 3, [5] * 10], encoder, [10, 10])
    with pytest.raises(UserError, match="prompt 1 has 10 tokens; the context of 10 leaves no room"):
        open_row(0, hi, [[5] * 10, [5] * 3], encoder, [10, 100])


def test_each_prompt_counts_in_its_own_models_context(tiny_model: LoadedModel) -> None:
    """A long prompt of a model with a long context does not fill that of one that reads a short one."""
    encoder = GuidedDecoder(tiny_model).encoder
    hi = Request.from_text("Hi")
    assert open_row(0, hi, [[5] * 228, [5] * 81], encoder, [8000, 200]).room == 119
    assert open_row(0, hi, [[5] * 228, [5] * 81], encoder, [8000, 200], falling_silent=[1]).room == 7772
    with pytest.raises(UserError, match="prompt 1 has 200 tokens as one of"):
        open_row(0, hi, [[5] * 228, [5] * 200], encoder, [8000, 200], falling_silent=[1])


@pytest.mark.parametrize(("form", "lanes"), [("product", 1), ("ratio", 1), ("apart", 2)])
def test_forwards(tiny_folder: Path, form: str, lanes: int) -> None:
    """The patient runs once a token, a guide once, a reference of its own once more; none of them unguided."""

    def load() -> LoadedModel:
        return load_model(str(tiny_folder), dtype="float32", device="cpu")

    patient = load()
    reference = {"product": None, "ratio": "patient", "apart": load()}[form]
    kind = Guide("kind", shaken(fresh_doctor(load())).merged(), reference)  # type: ignore[arg-type]
    sampling = SamplingParams(max_new_tokens=7, temperature=0)
    requests = [Request.from_text(text, betas={"kind": 1.0}, sampling=sampling) for text in ("Hi", "the cat")]
    for done in GuidedDecoder(patient, [kind]).generate(requests):
        assert (done.patient_forwards, done.guide_forwards) == (len(done.token_ids), lanes * len(done.token_ids))
    done = GuidedDecoder(patient, [kind]).generate([Request.from_text("Hi", betas={}, sampling=sampling)])[0]
    assert (done.patient_forwards, done.guide_forwards, done.kl_bound) == (len(done.token_ids), 0, None)
