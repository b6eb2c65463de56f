"""Rows and what is counted for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import fresh_doctor, shaken

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


def test_the_longest_prompt_counts(tiny_model: LoadedModel) -> None:
    encoder = GuidedDecoder(tiny_model).encoder
    assert open_row(0, Request.from_text("Hi"), [[5] * 3, [5] * 7], encoder, 10).room == 3
    with pytest.raises(UserError, match="prompt 1 has 10 tokens; the context of 10 leaves no room"):
        open_row(0, Request.from_text("Hi"), [[5] * 3, [5] * 10], encoder, 10)


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
    done = GuidedDecoder(patient, [kind]).generate([Request.from_text("Hi", sampling=sampling)])[0]
    assert (done.patient_forwards, done.guide_forwards, done.kl_bound) == (len(done.token_ids), 0, None)
