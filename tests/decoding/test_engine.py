"""The decode loop against the slow way: whole forward passes, one row at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import fresh_doctor, load, shaken
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.decoding import engine, ward
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel, load_model

TEXTS = ["Hi", "the cat sat on the mat and the dog ran", "zebra? é 7", "how are you today, and " * 3]


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder)


@pytest.fixture(scope="module")
def kind(tiny_folder: Path) -> LoadedModel:
    return shaken(fresh_doctor(load(tiny_folder)), seed=1).merged()


@pytest.fixture(scope="module")
def terse(tiny_folder: Path) -> LoadedModel:
    return shaken(fresh_doctor(load(tiny_folder)), seed=2).merged()


@pytest.fixture
def decoder(patient: LoadedModel, kind: LoadedModel, terse: LoadedModel) -> GuidedDecoder:
    """Two doctors: `kind` in the ratio form, `terse` in the product form."""
    return GuidedDecoder(patient, [Guide("kind", kind, "patient"), Guide("terse", terse)])


def ask(text: str, *, alpha: float = 1.0, betas: dict[str, float] | None = None, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_new_tokens": 12, "temperature": 0.0, **sampling})
    return Request.from_text(text, alpha=alpha, betas={} if betas is None else betas, sampling=params)


def same(one: Completion, other: Completion) -> None:
    assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
    assert one.logps == pytest.approx(other.logps, abs=1e-4)
    assert one.patient_logps == pytest.approx(other.patient_logps, abs=1e-4)


@torch.no_grad()
def log_probs(loaded: LoadedModel, ids: list[int]) -> Tensor:
    """[V] float64: the distribution of the next token, from a whole forward pass."""
    return loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)


def product(request: Request, parts: list[tuple[LoadedModel, float]], ids: list[int]) -> Tensor:
    """log π_dec [V] in float64, by definition: Σ exponent · log π, normalised."""
    return sum((exponent * log_probs(loaded, ids) for loaded, exponent in parts), torch.zeros(300)).log_softmax(-1)


MIXTURES: list[tuple[float, dict[str, float]]] = [
    (1.0, {}),
    (1.0, {"kind": 2.0}),
    (0.5, {"kind": -1.0, "terse": 0.75}),
    (0.0, {"terse": 1.0}),
]


@pytest.mark.parametrize(("alpha", "betas"), MIXTURES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_is_uncached(
    decoder: GuidedDecoder,
    patient: LoadedModel,
    kind: LoadedModel,
    terse: LoadedModel,
    alpha: float,
    betas: dict[str, float],
    temperature: float,
) -> None:
    """At every step the token's log-probability is the product's, recomputed from scratch; greedy takes its mode."""
    requests = [ask(text, alpha=alpha, betas=betas, temperature=temperature, seed=3) for text in TEXTS]
    first, second = betas.get("kind", 0.0), betas.get("terse", 0.0)
    parts = [(patient, alpha - first), (kind, first), (terse, second)]
    for request, done in zip(requests, decoder.generate(requests), strict=True):
        ids = decoder.encoder.prompt_ids(request.messages)
        assert 1 <= len(done.token_ids) <= 12
        assert len(done.logps) == len(done.patient_logps) == len(done.token_ids)
        for token, logp, patient_logp in zip(done.token_ids, done.logps, done.patient_logps, strict=True):
            expected = product(request, parts, ids)
            assert logp == pytest.approx(float(expected[token]), abs=1e-4)
            assert patient_logp == pytest.approx(float(log_probs(patient, ids)[token]), abs=1e-4)
            if temperature == 0:
                assert token == int(expected.argmax())
            ids.append(token)


def test_steering_that_grows_is_the_product_with_the_exponents_of_each_place(
    decoder: GuidedDecoder, patient: LoadedModel, kind: LoadedModel, terse: LoadedModel
) -> None:
    """Rows whose βs grow over 0, 1, 4 and 40 tokens in one batch, each against the definition."""
    onsets = [0, 1, 4, 40]
    requests = [
        replace(ask(text, betas={"kind": 2.0, "terse": 0.5}, temperature=1.0, seed=3), onset=onset)
        for text, onset in zip(TEXTS * 2, onsets, strict=False)
    ]
    assert len(requests) == len(onsets)
    for request, done in zip(requests, decoder.generate(requests), strict=True):
        ids = decoder.encoder.prompt_ids(request.messages)
        for place, (token, logp) in enumerate(zip(done.token_ids, done.logps, strict=True)):
            share = min(1.0, (place + 1) / (request.onset + 1))
            parts = [(patient, 1 - 2.0 * share), (kind, 2.0 * share), (terse, 0.5 * share)]
            assert logp == pytest.approx(float(product(request, parts, ids)[token]), abs=1e-4)
            ids.append(token)


def generated(loaded: LoadedModel, text: str, count: int) -> list[int]:
    ids = ChatEncoder.for_model(loaded.model, loaded.tokenizer).prompt_ids([{"role": "user", "content": text}])
    out = loaded.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)
    return [int(token) for token in out[0, len(ids) :]]


def test_without_beta_greedy_is_generate(decoder: GuidedDecoder, patient: LoadedModel) -> None:
    """Prompts of different lengths in one batch beside a guided row: the others are the patient's own tokens."""
    requests = [*(ask(text, max_new_tokens=30) for text in TEXTS), ask("Hi", betas={"kind": 3.0})]
    for text, done in zip(TEXTS, decoder.generate(requests), strict=False):
        assert done.token_ids == generated(patient, text, 30)
    assert len({tuple(generated(patient, text, 30)) for text in TEXTS}) == len(TEXTS)


@pytest.mark.model
def test_the_real_model_greedy_is_generate() -> None:
    patient = load_model("builtin:smollm2", dtype="float32", device="cpu")
    texts = ["Tell me about rain.", "What is it like to share a kitchen with four flatmates?", "Hi"]
    done = GuidedDecoder(patient).generate([ask(text, max_new_tokens=40) for text in texts])
    for text, completion in zip(texts, done, strict=True):
        assert completion.token_ids == generated(patient, text, 40)


def mixed_requests() -> list[Request]:
    """Rows that differ in everything a row can differ in, and end at different times."""
    return [
        ask(TEXTS[0], max_new_tokens=3),
        ask(TEXTS[1], alpha=0.5, betas={"terse": 1.0}, temperature=1.0, seed=1, max_new_tokens=25),
        ask(TEXTS[2], betas={"kind": 2.0}, max_new_tokens=9, repetition_penalty=1.5),
        ask(TEXTS[3], betas={"kind": -1.0, "terse": 0.5}, temperature=0.7, seed=2, top_k=20),
        ask(TEXTS[0], temperature=1.3, seed=3, top_p=0.8, max_new_tokens=20),
        ask(TEXTS[1], temperature=1.0, seed=4, min_p=0.05, max_new_tokens=16),
        ask(TEXTS[2], max_new_tokens=0),
        ask(TEXTS[3], betas={"kind": 1.0}, stop=("e", "t"), max_new_tokens=25),
        ask(TEXTS[0], temperature=1.0, seed=3, max_new_tokens=1),
    ]


@pytest.mark.parametrize("max_batch_size", [9, 4])
def test_a_row_does_not_see_its_batch(decoder: GuidedDecoder, max_batch_size: int) -> None:
    """Greedy and sampled, whole through the rows that leave before it."""
    alone = [decoder.generate([request])[0] for request in mixed_requests()]
    assert len({len(done.token_ids) for done in alone}) >= 5, "they should end at different times"
    decoder.max_batch_size = max_batch_size
    order: list[int] = []
    together = decoder.generate(mixed_requests(), on_done=lambda index, completion: order.append(index))
    for one, other in zip(alone, together, strict=True):
        same(one, other)
    assert sorted(order) == list(range(9))


@pytest.mark.parametrize("compact_below", [0.0, 1.0])
def test_dropping_finished_rows_changes_nothing(
    decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch, compact_below: float
) -> None:
    expected = decoder.generate(mixed_requests())
    monkeypatch.setattr(ward, "_COMPACT_BELOW", compact_below)
    for one, other in zip(expected, decoder.generate(mixed_requests()), strict=True):
        same(one, other)


def test_a_seed_decides(decoder: GuidedDecoder) -> None:
    sampled = [decoder.generate([ask("Hi", temperature=1.0, seed=seed)])[0].token_ids for seed in (5, 5, 6)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5, "top_k": 6}, {"top_p": 0.5}])
def test_frequencies_are_the_product(
    decoder: GuidedDecoder, patient: LoadedModel, kind: LoadedModel, terse: LoadedModel, sampling: dict[str, Any]
) -> None:
    """Chi-square of 3,000 first tokens against the exact warped product; mean df, standard deviation √(2 df)."""
    betas = {"kind": 1.5, "terse": 0.25}
    decoder.max_batch_size = 500
    requests = [
        ask("Hi", alpha=0.5, betas=betas, max_new_tokens=1, **{"temperature": 1.0, "seed": seed, **sampling})
        for seed in range(3000)
    ]
    ids = decoder.encoder.prompt_ids(requests[0].messages)
    logps = product(requests[0], [(patient, 0.5 - 1.5), (kind, 1.5), (terse, 0.25)], ids)
    expected = (logps / sampling.get("temperature", 1.0)).softmax(-1)
    ordered, order = expected.sort(descending=True)
    if "top_k" in sampling:
        expected[order[6:]] = 0
    if "top_p" in sampling:
        # The smallest set of most likely tokens whose mass reaches top_p.
        expected[order[int((ordered.cumsum(0) < 0.5).sum()) + 1 :]] = 0
    expected = 3000 * expected / expected.sum()
    drawn = torch.tensor([done.token_ids[0] for done in decoder.generate(requests)])
    counts = torch.bincount(drawn, minlength=300).double()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert freedom >= 2
    assert float(((observed - wanted).square() / wanted).sum()) < freedom + 4 * (2 * freedom) ** 0.5


def test_patient_as_reference_is_a_reference_loaded_apart(
    tiny_folder: Path, patient: LoadedModel, kind: LoadedModel
) -> None:
    requests = [ask(text, betas={"kind": 2.0}, temperature=t, seed=1) for text in TEXTS for t in (0.0, 1.0)]
    shared = GuidedDecoder(patient, [Guide("kind", kind, "patient")])
    apart = GuidedDecoder(patient, [Guide("kind", kind, load(tiny_folder))])
    assert (len(shared.lanes), len(apart.lanes)) == (2, 3)
    for one, other in zip(shared.generate(requests), apart.generate(requests), strict=True):
        same(one, other)


def test_guides_come_from_load_guide(patient: LoadedModel) -> None:
    doctor = fresh_doctor(patient)
    for guides, got in ((["runs/doctor"], "str"), ([Path("runs")], "PosixPath"), ([doctor], "Doctor")):
        with pytest.raises(UserError, match=rf"a guide must be what load_guide\(.*\) gives, got a {got}; "):
            GuidedDecoder(patient, guides)  # type: ignore[arg-type]
    for alone, got in (("runs/doctor", "str"), (doctor, "Doctor"), (Guide("kind", patient), "Guide")):
        with pytest.raises(UserError, match=rf"guides must be a list of what load_guide\(.*\) gives, got a {got}$"):
            GuidedDecoder(patient, alone)  # type: ignore[arg-type]


def test_without_betas_all_doctors_guide(decoder: GuidedDecoder) -> None:
    """As with β = 1 each; an empty mixture is the patient alone."""
    plain = ask("the cat", temperature=1.0, seed=3)
    left_out, ones, alone = decoder.generate(
        [replace(plain, betas=None), replace(plain, betas={"kind": 1.0, "terse": 1.0}), plain]
    )
    same(left_out, ones)
    assert left_out.kl != 0
    assert alone.kl == pytest.approx(0, abs=1e-4)
    assert decoder.generate([replace(plain, betas=None)])[0].guide_forwards > 0


def test_a_doctor_equal_to_its_reference_changes_nothing(patient: LoadedModel) -> None:
    guided = GuidedDecoder(patient, [Guide("self", patient, "patient")])
    for text in TEXTS:
        same(guided.generate([ask(text, betas={"self": 5.0})])[0], guided.generate([ask(text)])[0])


def test_a_guides_system_prompt_is_its_references_too(patient: LoadedModel, kind: LoadedModel) -> None:
    guided = GuidedDecoder(patient, [Guide("kind", kind, "patient", system="Be kind.")])
    request = ask("Hi", betas={"kind": 1.0}, max_new_tokens=1)
    done = guided.generate([request])[0]
    ids = guided.encoder.prompt_ids(request.messages)
    under = guided.encoder.prompt_ids(request.messages, "Be kind.")
    score = log_probs(patient, ids) + log_probs(kind, under) - log_probs(patient, under)
    assert done.token_ids == [int(score.argmax())]
    assert done.logps[0] == pytest.approx(float(score.log_softmax(-1).max()), abs=1e-4)


class Script:
    """Stands for sampling: hands out given tokens, one a step, whatever the models say."""

    def __init__(self, decoder: GuidedDecoder, text: str, *, complete: bool = True) -> None:
        ids = decoder.encoder.text_ids(text)
        self.ids = [*ids, decoder.encoder.end_of_turn] if complete else ids
        self._left = iter(self.ids)

    def __call__(self, scores: Tensor, uniforms: Tensor, greedy: Tensor) -> Tensor:
        return torch.full((scores.shape[0],), next(self._left))


def run_stream(stream: Iterator[str]) -> tuple[list[str], Completion]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("text", ["naïve 日本 cafés — 👩‍👩‍👧 done", "plain", "é", ""])
def test_a_stream_has_whole_characters(decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Every character of several bytes is several tokens here; none is shown in part."""
    script = Script(decoder, text)
    monkeypatch.setattr(engine, "sample", script)
    pieces, done = run_stream(decoder.stream(ask("Hi", max_new_tokens=200)))
    assert not any("\ufffd" in piece or not piece for piece in pieces)
    assert "".join(pieces) == done.text == text
    assert done.finish_reason == "stop"
    assert done.token_ids == script.ids
    assert len(script.ids) > len(text) or text == "plain"
    monkeypatch.setattr(engine, "sample", Script(decoder, text))
    same(done, decoder.generate([ask("Hi", max_new_tokens=200)])[0])


STOP_CASES = [
    ("the cat sat on it", ("sat",), "the cat "),
    ("xaaab and on", ("aab",), "xa"),
    ("one\n\nHuman: two", ("\n\nHuman:",), "one"),
    ("ab abc", ("abc", "zz"), "ab "),
    ("say yes. no", ("no", "yes"), "say "),
    ("é日x", ("日",), "é"),
    ("never", ("Never", "rx"), "never"),
    ("ends in sto", ("stop",), "ends in sto"),
    ("the", ("t",), ""),
]


@pytest.mark.parametrize(("text", "stop", "expected"), STOP_CASES)
def test_stop_strings(
    decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch, text: str, stop: tuple[str, ...], expected: str
) -> None:
    """Cut where the first one starts, over any token boundary; not a character of it is ever streamed."""
    ids = decoder.encoder.text_ids(text)
    assert len(ids) > 1 or text == "the"
    for run in ("generate", "stream"):
        monkeypatch.setattr(engine, "sample", Script(decoder, text))
        request = ask("Hi", max_new_tokens=100, stop=stop)
        if run == "generate":
            done = decoder.generate([request])[0]
        else:
            pieces, done = run_stream(decoder.stream(request))
            assert "".join(pieces) == expected
        assert done.text == expected
        assert done.finish_reason == "stop"
        assert done.token_ids == [*ids, decoder.encoder.end_of_turn][: len(done.token_ids)]
        assert done.text == text or done.token_ids[-1] != decoder.encoder.end_of_turn


@pytest.mark.parametrize("stop", [(), ("e", "\ufffd"), ("a", "be", "the c")])
def test_streamed_is_generated(decoder: GuidedDecoder, stop: tuple[str, ...]) -> None:
    """Also where the model's bytes make no text: pieces joined are the completion's text."""
    for seed in range(4):
        request = ask("Hi", betas={"kind": 1.0}, temperature=1.0, seed=seed, max_new_tokens=30, stop=stop)
        pieces, done = run_stream(decoder.stream(request))
        same(done, decoder.generate([request])[0])
        assert "".join(pieces) == done.text
        assert all(pieces)
        assert not any(part in done.text for part in stop)


def test_finish_reasons(decoder: GuidedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    length = decoder.generate([ask("Hi", max_new_tokens=2)])[0]
    assert (length.finish_reason, len(length.token_ids)) == ("length", 2)
    nothing = decoder.generate([ask("Hi", max_new_tokens=0)])[0]
    assert (nothing.finish_reason, nothing.token_ids, nothing.text) == ("length", [], "")
    assert run_stream(decoder.stream(ask("Hi", max_new_tokens=0))) == ([], nothing)
    monkeypatch.setattr(engine, "sample", Script(decoder, "the end"))
    stop = decoder.generate([ask("Hi", max_new_tokens=100)])[0]
    assert (stop.finish_reason, stop.text, stop.token_ids[-1]) == ("stop", "the end", decoder.encoder.end_of_turn)
    monkeypatch.setattr(engine, "sample", Script(decoder, "the end"))
    exact = decoder.generate([ask("Hi", max_new_tokens=len(stop.token_ids))])[0]
    assert exact.finish_reason == "stop", "the end of turn counts although it is the last token allowed"


def test_a_full_context_ends_a_row(decoder: GuidedDecoder) -> None:
    """The shortest of all models' contexts counts, here 512 for all."""
    text = "7" * 480
    prompt = len(decoder.encoder.prompt_ids([{"role": "user", "content": text}]))
    assert 480 < prompt < 511
    long, short = ask(text, temperature=1.0, max_new_tokens=200), ask("Hi", max_new_tokens=60)
    for seed in range(20):
        long = replace(long, sampling=replace(long.sampling, seed=seed))
        done = decoder.generate([long, short])
        if done[0].finish_reason == "context":
            break
    assert done[0].finish_reason == "context"
    assert len(done[0].token_ids) == 512 - prompt
    same(done[1], decoder.generate([short])[0])
    with pytest.raises(UserError, match=r"prompt 1 has \d+ tokens; the context of 512 leaves no room for an answer"):
        decoder.generate([ask("7" * 600)])


def test_a_finished_row_may_outlive_its_context(patient: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned positions end with the context. A finished row that is still in the batch must not look behind them."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    model.requires_grad_(False)
    decoder = GuidedDecoder(replace(patient, model=model))
    monkeypatch.setattr(ward, "_COMPACT_BELOW", 0.0)
    prompt = len(decoder.encoder.prompt_ids([{"role": "user", "content": "7" * 30}]))
    requests = [ask("7" * 30, max_new_tokens=64), ask("Hi", max_new_tokens=35)]
    assert len(decoder.encoder.prompt_ids(requests[1].messages)) + 35 <= 64 < prompt + 35
    together = decoder.generate(requests)
    for request, done in zip(requests, together, strict=True):
        same(done, decoder.generate([request])[0])
    assert len(together[1].token_ids) > len(together[0].token_ids), "nothing went on after the other had ended"


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_doctor_breaks_its_rows_only(patient: LoadedModel, kind: LoadedModel, poison: float) -> None:
    """Row 0 (the shortest prompt) gets broken logits at the third token; a row with β = 0 does not care."""
    broken = copy.deepcopy(kind.model)
    calls = 0

    def poisoned(module: Any, arguments: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            output[0, 0, 7] = poison
        return output

    clean = GuidedDecoder(patient, [Guide("kind", kind, "patient")])
    decoder = GuidedDecoder(patient, [Guide("kind", replace(kind, model=broken), "patient")])
    broken.get_output_embeddings().register_forward_hook(poisoned)
    requests = [ask(text, betas={"kind": 1.0}) for text in TEXTS]
    expected, got = clean.generate(requests), decoder.generate(requests)
    assert got[0].finish_reason == "error"
    assert got[0].token_ids == expected[0].token_ids[:2]
    assert len(got[0].logps) == 2
    for one, other in zip(expected[1:], got[1:], strict=True):
        same(one, other)
    calls = 0
    silent = [replace(requests[0], betas={}), *requests[1:]]
    for one, other in zip(clean.generate(silent), decoder.generate(silent), strict=True):
        same(one, other)


def test_unguided_batches_leave_the_doctors_alone(patient: LoadedModel, kind: LoadedModel) -> None:
    calls: list[int] = []
    doctor = copy.deepcopy(kind.model)
    decoder = GuidedDecoder(patient, [Guide("kind", replace(kind, model=doctor), "patient")])
    doctor.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    decoder.generate([ask("Hi"), ask("Hi", betas={"kind": 0.0})])
    assert not calls
    decoder.generate([ask("Hi", betas={"kind": 1.0}, max_new_tokens=2)])
    assert calls


def test_unknown_and_double_names(decoder: GuidedDecoder, patient: LoadedModel, kind: LoadedModel) -> None:
    with pytest.raises(UserError, match="no doctor is named nice; loaded: kind, terse"):
        decoder.generate([ask("Hi", betas={"nice": 1.0})])
    with pytest.raises(UserError, match="no doctor is named nice; loaded: none"):
        GuidedDecoder(patient).generate([ask("Hi", betas={"nice": 1.0})])
    with pytest.raises(UserError, match="two doctors share a name: kind, kind; give each its own"):
        GuidedDecoder(patient, [Guide("kind", kind), Guide("kind", kind)])
    with pytest.raises(UserError, match="max_batch_size must be at least 1, got 0"):
        GuidedDecoder(patient, max_batch_size=0)


def test_no_requests(decoder: GuidedDecoder) -> None:
    assert decoder.generate([]) == []
