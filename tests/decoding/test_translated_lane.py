"""A doctor of another vocabulary, position by position, against a float64 enumeration from whole forward passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import CORPUS, OTHER_CORPUS, byte_level, fresh_doctor, load, save_tiny, sentencepiece, shaken
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from llmdoctor.decoding import translated_lane
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide, LaneSpec, lanes_of
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.decoding.row import Tally
from llmdoctor.decoding.translated_lane import TranslatedLane, open_lane
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.logps import LogitsHead
from llmdoctor.models.vocab import Translation, Vocabulary

TEXTS = ["hello there you", "the café 😊 is hot", "then 7 catalogues", "hello"]
EXTRA_ROWS = 3


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("patient")
    return load(save_tiny(folder, byte_level(300, CORPUS), seed=1, extra_rows=EXTRA_ROWS))


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_level(320, OTHER_CORPUS, begin="<|begin|>", end="<|end|>")
    return save_tiny(tmp_path_factory.mktemp("other"), tokenizer, seed=2)


@pytest.fixture(scope="module")
def other(other_folder: Path) -> LoadedModel:
    return load(other_folder)


@pytest.fixture(scope="module")
def trained(other_folder: Path) -> LoadedModel:
    with torch.inference_mode(False):
        return shaken(fresh_doctor(load(other_folder))).merged()


@pytest.fixture(scope="module")
def led(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(save_tiny(tmp_path_factory.mktemp("led"), sentencepiece(OTHER_CORPUS), seed=3))


def spec_of(patient: LoadedModel, doctor: LoadedModel) -> LaneSpec:
    lanes, guides, _ = lanes_of(patient, [Guide("doctor", doctor)])
    assert lanes[0].translation is None
    return lanes[guides[0][0]]


def prompts_of(spec: LaneSpec, count: int) -> list[list[int]]:
    return [spec.encoder.prompt_ids([{"role": "user", "content": f"{row}" + " and" * row}]) for row in range(count)]


def log_probs(spec: LaneSpec, ids: list[int]) -> Tensor:
    """[W] float64 after `ids`: one row, no cache."""
    return spec.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)


def doctors_ids(spec: LaneSpec, data: bytes) -> list[int]:
    """The whole characters by the tokenizer, then the longest token each time."""
    text = data.decode(errors="ignore")
    spelled = Vocabulary.of(spec.encoder).spelled
    ids = spec.encoder.text_ids(text) if text else []
    rest = data[len(text.encode()) :]
    while rest:
        ids.append(max((i for i, t in enumerate(spelled) if t and rest.startswith(t)), key=lambda i: len(spelled[i])))
        rest = rest[len(spelled[ids[-1]] or b"") :]
    return ids


def reference(spec: LaneSpec, patient: LoadedModel, prompt: list[int], emitted: list[int]) -> dict[int, float]:
    """The patient's token -> probability that the doctor's text goes on with it, for tokens that any doctor's token
    leads to; and under −1 the mass that stands for none. By enumeration of every token at every place."""
    encoder = lanes_of(patient, [])[0][0].encoder
    ours, theirs = Vocabulary.of(encoder), Vocabulary.of(spec.encoder)
    data = ours.spell(emitted).removeprefix(ours.lead if emitted else b"")
    own = doctors_ids(spec, data)
    found: dict[int, float] = {}
    total = 0.0
    weight = 1.0
    for kept in range(len(own) + 1):
        logps = log_probs(spec, prompt + own[:kept])
        begin = len(theirs.spell(own[:kept]).removeprefix(theirs.lead if kept else b""))
        for token, logp in enumerate(logps.tolist()):
            spelled = theirs.spelled[token]
            if kept == 0 and theirs.lead and spelled:
                spelled = spelled.removeprefix(theirs.lead)
            mass = weight * math.exp(logp)
            if kept == len(own):
                if token in theirs.stop_ids:
                    target = encoder.end_of_turn
                else:
                    ids = ours.split(spelled, start=not emitted) if spelled else []
                    target = ids[0] if ids else -1
                    if theirs.spelled[token] is None and theirs.names[token] == ours.names[0]:
                        target = 0
            else:
                text = data[:begin] + (spelled or b"")
                ids = ours.split(text, start=True)
                if len(text) <= len(data) or not text.startswith(data) or ids[: len(emitted)] != emitted:
                    continue
                target = ids[len(emitted)]
            found[target] = found.get(target, 0.0) + mass
            total += mass
        if kept < len(own):
            weight *= math.exp(float(logps[own[kept]]))
    return {target: mass / total for target, mass in found.items()}


def check(spec: LaneSpec, patient: LoadedModel, prompt: list[int], emitted: list[int], got: Tensor) -> float:
    """The lane's row against the enumeration; returns the mass that stands for no token."""
    expected = reference(spec, patient, prompt, emitted)
    unmapped = expected.pop(-1, 0.0)
    assert len(got) == 300 + EXTRA_ROWS
    for target, mass in expected.items():
        assert float(got[target]) == pytest.approx(math.log(mass), abs=2e-4), target
    return unmapped


@pytest.mark.parametrize("which", ["other", "led"])
def test_against_an_enumeration(request: pytest.FixtureRequest, patient: LoadedModel, which: str) -> None:
    """Four texts of different lengths as the patient splits them, one token at a time, among them the bytes of "😊";
    rows that are at their end go on with the end-of-turn token and are dropped midway."""
    spec = spec_of(patient, request.getfixturevalue(which))
    encoder = lanes_of(patient, [])[0][0].encoder
    answers = [encoder.completion(text, True).ids for text in TEXTS]
    prompts = prompts_of(spec, len(TEXTS))
    lane = open_lane(spec, prompts, [[]] * len(prompts), 4)
    assert isinstance(lane, TranslatedLane)
    assert lane.width == 300 + EXTRA_ROWS
    got, alive, taken_back = lane.prefill(), list(range(len(TEXTS))), 0
    tallies, unmapped = [Tally() for _ in TEXTS], [0.0] * len(TEXTS)
    for step in range(max(map(len, answers))):
        for place, row in enumerate(alive):
            if step < len(answers[row]):
                unmapped[row] += check(spec, patient, prompts[row], answers[row][:step], got[place])
                lane.count(place, answers[row][step], tallies[row])
        taken_back += sum(bool(lane._endings(text)) for text in lane._texts)
        keep = [place for place, row in enumerate(alive) if step + 1 < len(answers[row])]
        if step % 3 == 2:
            lane.keep(keep)
            alive = [alive[place] for place in keep]
        if alive:
            tokens = [answers[row][step] if step < len(answers[row]) else encoder.end_of_turn for row in alive]
            got = lane.step(torch.tensor(tokens))
    assert taken_back > 5, "the texts have no ending that could go on"
    assert [tally.positions for tally in tallies] == list(map(len, answers))
    assert [tally.unmapped for tally in tallies] == pytest.approx(unmapped, rel=1e-3)
    assert min(unmapped) > 1e-4


def test_tokens_are_taken_back(patient: LoadedModel, other: LoadedModel) -> None:
    """Letter by letter, the doctor's split of "hello then" changes at nearly every step; its cache follows."""
    spec = spec_of(patient, other)
    ours = Vocabulary.of(lanes_of(patient, [])[0][0].encoder)
    lane = TranslatedLane(spec, prompts_of(spec, 2), 4)
    lane.prefill()
    lengths = []
    data = "hello then the other 😊 theme".encode()
    for end in range(1, len(data) + 1):
        tokens = torch.tensor([ours.inside.by_bytes[data[end - 1 : end]], ours.inside.by_bytes[b"x"]])
        lane.step(tokens, torch.tensor([True, end % 2 == 0]))
        lengths.append(len(lane._texts[0].doctor_ids))
        for text, prompt, said in zip(lane._texts, prompts_of(spec, 2), (data[:end], b"x" * (end // 2)), strict=True):
            assert text.data == said
            assert text.doctor_ids == doctors_ids(spec, said)
            assert len(text.states) == len(text.doctor_ids) + 1 == len(text.columns) + 1
            logits = spec.head.logits(text.states[-1]).double().log_softmax(-1)
            assert float((logits - log_probs(spec, prompt + text.doctor_ids)).abs().max()) < 1e-3
    assert any(after < before for before, after in itertools.pairwise(lengths))
    assert int(lane.mask[0].sum()) == len(prompts_of(spec, 2)[0]) + lengths[-1]


def test_equal_tokenizers_give_the_plain_lane(patient: LoadedModel, led: LoadedModel) -> None:
    """Where the text is split as the tokenizer splits it, the translated lane is the plain one's log-softmax."""
    for loaded in (patient, led):
        plain = lanes_of(loaded, [])[0][0]
        vocabulary = Vocabulary.of(plain.encoder)
        width = int(loaded.model.get_output_embeddings().weight.shape[0])
        spec = replace(plain, translation=Translation(vocabulary, vocabulary, width))
        prompts = prompts_of(plain, len(TEXTS))
        one, other = Lane(plain, prompts, 30), TranslatedLane(spec, prompts, 30)
        answers = [plain.encoder.text_ids(text) for text in TEXTS]
        expected, got = one.prefill(), other.prefill()
        known = len(vocabulary)
        for step in range(min(map(len, answers)) + 1):
            assert float((got - expected.log_softmax(-1))[:, :known].abs().max()) < 1e-4
            assert got[:, known:].eq(torch.tensor(-math.log(width))).all(), "rows of the head that are no tokens"
            if step < min(map(len, answers)):
                tokens = torch.tensor([answer[step] for answer in answers])
                expected, got = one.step(tokens), other.step(tokens)


def test_what_cannot_be_mapped_cancels(patient: LoadedModel, trained: LoadedModel, other: LoadedModel) -> None:
    """Doctor and reference agree on the patient's control token and on the head's spare rows, at every step."""
    lanes, guides, references = lanes_of(patient, [Guide("d", trained, other)])
    doctor, reference = lanes[guides[0][0]], lanes[(references[0] or (0, 0))[0]]
    assert doctor.translation is reference.translation, "made once"
    one, two = (TranslatedLane(spec, prompts_of(spec, 1), 9) for spec in (doctor, reference))
    apart, term = 0, one.prefill() - two.prefill()
    for token in lanes[0].encoder.text_ids("hello there"):
        silent = [0, *range(300, 300 + EXTRA_ROWS)]
        assert term[0, silent].tolist() == [0.0] * 4
        assert float(term.abs().max()) > 0.01
        term = one.step(torch.tensor([token])) - two.step(torch.tensor([token]))
        apart += bool(one._endings(one._texts[0]))
    assert apart, "the text has no other ending, for which the rows would be weighed"


def test_control_tokens_say_nothing_to_the_doctor(patient: LoadedModel, other: LoadedModel) -> None:
    spec = spec_of(patient, other)
    encoder = lanes_of(patient, [])[0][0].encoder
    begin = patient.tokenizer.convert_tokens_to_ids("<s>")
    lane = TranslatedLane(spec, prompts_of(spec, 1), 4)
    before = lane.prefill()
    for token in (begin, 300 + EXTRA_ROWS - 1, encoder.end_of_turn):
        assert torch.equal(lane.step(torch.tensor([token])), before)


def test_pieces_are_counted(patient: LoadedModel, other: LoadedModel) -> None:
    spec = spec_of(patient, other)
    assert spec.translation is not None
    pieces = spec.translation.inside.pieces.nonzero()[:, 0].tolist()
    direct = spec.translation.inside.leads_to[spec.encoder.text_ids("a")[0]]
    lane = TranslatedLane(spec, prompts_of(spec, 1), 4)
    lane.prefill()
    tally = Tally()
    for token in (pieces[0], direct, pieces[1], direct):
        lane.count(0, token, tally)
        lane.step(torch.tensor([token]))
    assert (tally.positions, tally.first_pieces, tally.first_piece_share) == (4, 2, 0.5)


def test_a_full_context_is_silence(
    patient: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doctor needs a token a letter and has room for two more; from the third on every token is as likely."""
    doctor = load(save_tiny(tmp_path, byte_level(258, OTHER_CORPUS), seed=2))
    spec = spec_of(patient, doctor)
    prompts = prompts_of(spec, 1)
    monkeypatch.setattr(translated_lane, "context_of", lambda model: len(prompts[0]) + 2)
    lane = TranslatedLane(spec, prompts, 4)
    lane.prefill()
    tokens = [Vocabulary.of(spec.encoder).inside.by_bytes[letter] for letter in (b"q", b"z")]
    for token in tokens:
        assert float(lane.step(torch.tensor([token])).std()) > 0.1
    assert not caplog.records
    for token in tokens:
        assert lane.step(torch.tensor([token])).eq(torch.tensor(-math.log(300 + EXTRA_ROWS))).all()
    assert [record.getMessage() for record in caplog.records] == [
        f"a doctor's context of {len(prompts[0]) + 2} tokens is full; it is silent from there on"
    ]


def test_a_window_is_refused(patient: LoadedModel, other: LoadedModel) -> None:
    config = MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    spec = spec_of(patient, other)
    model: Any = MistralForCausalLM(config).eval()
    with pytest.raises(UserError, match="has layers that see a window"):
        TranslatedLane(replace(spec, model=model, head=LogitsHead.for_model(model)), prompts_of(spec, 1), 4)


def ask(text: str, beta: float, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_new_tokens": 12, "temperature": 0.0, **sampling})
    return Request.from_text(text, betas={"doctor": beta}, sampling=params)


def test_guided_by_another_vocabulary(patient: LoadedModel, trained: LoadedModel, other: LoadedModel) -> None:
    """Every token's log-probability is the ratio form's, rebuilt from lanes of one row; β = 0 is the patient."""
    decoder = GuidedDecoder(patient, [Guide("doctor", trained, other)])
    requests = [ask(text, beta) for text in TEXTS for beta in (0.0, 2.0)]
    done = decoder.generate(requests)
    alone = GuidedDecoder(patient).generate([replace(request, betas={}) for request in requests[::2]])
    assert [row.token_ids for row in done[::2]] == [row.token_ids for row in alone]
    assert any(one.token_ids != two.token_ids for one, two in zip(done[::2], done[1::2], strict=True))
    own, guide, reference = decoder.lanes
    for request, row in zip(requests[1::2], done[1::2], strict=True):
        lanes = [
            open_lane(spec, [spec.encoder.prompt_ids(request.messages)], [[]], 12) for spec in (own, guide, reference)
        ]
        scores = [lane.prefill()[0].double() for lane in lanes]
        tally = Tally()
        for token, logp in zip(row.token_ids, row.logps, strict=True):
            guided = (scores[0] + 2 * (scores[1] - scores[2])).log_softmax(-1)
            assert token == int(guided.argmax())
            assert logp == pytest.approx(float(guided[token]), abs=1e-3)
            for lane in lanes[1:]:
                assert isinstance(lane, TranslatedLane)
                lane.count(0, token, tally)
            scores = [lane.step(torch.tensor([token]))[0].double() for lane in lanes]
        assert row.unmapped_mass == pytest.approx(tally.unmapped_mass, rel=1e-3)
    assert [row.unmapped_mass for row in done[::2]] == [None] * len(TEXTS), "β = 0 listens to no doctor"
    assert decoder.tally.positions == 2 * sum(len(row.token_ids) for row in done[1::2])


def test_only_doctors_that_are_listened_to_count(patient: LoadedModel, other: LoadedModel, led: LoadedModel) -> None:
    """Three doctors in one batch: one shares the patient's vocabulary, the second one's reference is the third."""
    decoder = GuidedDecoder(patient, [Guide("same", patient), Guide("one", other, led), Guide("two", led)])
    mixtures: list[dict[str, float]] = [
        {}, {"same": 1.0}, {"same": 1.0, "two": 0.5}, {"one": 1.0}, {"one": 1.0, "two": -0.5}, {"one": 0.0, "two": 0.5}
    ]  # fmt: skip
    requests = [replace(ask("hello", 0.0, temperature=1.0, seed=3), betas=betas) for betas in mixtures]
    together = decoder.generate(requests)
    tally = decoder.tally
    assert [row.unmapped_mass is None for row in together] == [True, True, False, False, False, False]
    lanes = [0, 0, 1, 2, 2, 1]
    assert tally.positions == sum(n * len(row.token_ids) for n, row in zip(lanes, together, strict=True))
    masses = [n * len(row.token_ids) * (row.unmapped_mass or 0) for n, row in zip(lanes, together, strict=True)]
    assert tally.unmapped == pytest.approx(sum(masses))
    for request, row in zip(requests, together, strict=True):
        alone = decoder.generate([request])[0]
        assert (alone.unmapped_mass is None) == (row.unmapped_mass is None)
        assert (alone.unmapped_mass or 0) == pytest.approx(row.unmapped_mass or 0, rel=1e-3)


def test_sampled_rows_do_not_depend_on_their_batch(patient: LoadedModel, led: LoadedModel) -> None:
    """Random tokens, broken characters among them; product form; one by one and together."""
    guides = [Guide("doctor", led)]
    requests = [ask(text, 0.5, temperature=1.0, max_new_tokens=20, seed=row) for row, text in enumerate(TEXTS * 2)]
    together = GuidedDecoder(patient, guides).generate(requests)
    single = GuidedDecoder(patient, guides, max_batch_size=1).generate(requests)
    assert [row.token_ids for row in together] == [row.token_ids for row in single]
    for one, two in zip(together, single, strict=True):
        assert one.logps == pytest.approx(two.logps, abs=1e-3)
    assert all(row.finish_reason in ("length", "stop") for row in together)


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("fails_at", [None, 7])
def test_rows_come_and_go(
    patient: LoadedModel,
    trained: LoadedModel,
    other: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    fails_at: int | None,
    size: int,
) -> None:
    """Two places for six rows of many lengths, and memory that runs out: then rows go on from what they have said.

    With six places, rows that are finished stay for a while. A token counts once, read again or not."""
    guides = [Guide("doctor", trained, other)]
    requests = [
        ask(text * (1 + place % 3), 1.0, max_new_tokens=3 + 5 * (place % 4), seed=place)
        for place, text in enumerate(["Hi", "the cat", "zebra é", "how are you", "7", "mat"])
    ]
    single = GuidedDecoder(patient, guides, max_batch_size=1).generate(requests)
    inner = Lane.step_states
    steps = 0

    def step(self: Lane, tokens: Tensor, active: Any = None) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, tokens, active)

    monkeypatch.setattr(Lane, "step_states", step)
    decoder = GuidedDecoder(patient, guides, max_batch_size=size)
    done = decoder.generate(requests)
    for one, same in zip(done, single, strict=True):
        assert one.token_ids == same.token_ids
        assert one.logps == pytest.approx(same.logps, abs=1e-3)
        assert one.unmapped_mass == pytest.approx(same.unmapped_mass, rel=1e-3)
    assert decoder.tally.positions == 2 * sum(len(one.token_ids) for one in done)
    assert steps > 7
