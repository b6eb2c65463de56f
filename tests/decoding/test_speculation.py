"""Guessing ahead changes no token: whatever guesses, however many, whoever shares the batch."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import fresh_doctor, load, shaken
from torch import Tensor

from llmdoctor.data.prompts import load_prompts
from llmdoctor.decoding.controls import Controls
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide, lanes_of, load_guide
from llmdoctor.decoding.lane import Lane
from llmdoctor.decoding.mixture import Mixture
from llmdoctor.decoding.pace import Pace
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.decoding.row import RANKS
from llmdoctor.decoding.speculation import stand_in
from llmdoctor.decoding.tree import Branching, Tree
from llmdoctor.decoding.ward import Ward
from llmdoctor.errors import UserError
from llmdoctor.models.draft import DraftModel
from llmdoctor.models.loading import LoadedModel, load_model

TEXTS = ["Hi", "the cat sat on the mat and the dog ran", "zebra? é 7", "how are you today, and " * 5]
RATES = [0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0, 0.0]


@pytest.fixture(scope="module")
def patient(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder)


@pytest.fixture(scope="module")
def draft(patient: LoadedModel) -> DraftModel:
    """Untrained, on a part of the vocabulary: its guesses are bad, and some tokens cannot be guessed at all."""
    width = int(patient.model.get_output_embeddings().weight.shape[0])
    vocabulary = torch.arange(width)[torch.arange(width) % 3 != 1]
    drafter = DraftModel.from_layers(patient.model, [1], vocabulary, [0]).requires_grad_(False).eval()
    assert drafter.fuse_lower is not None
    torch.nn.init.normal_(drafter.fuse_lower.weight, std=0.2, generator=torch.Generator().manual_seed(2))
    return drafter


@pytest.fixture(scope="module")
def guides(tiny_folder: Path, patient: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Guide]:
    """An adapter on the patient, run in its pass; and a model of its own in product and in ratio form."""
    folder = tmp_path_factory.mktemp("speculation") / "doctor"
    shaken(fresh_doctor(load(tiny_folder))).save_pretrained(folder)
    beside = load_guide(folder, patient, name="beside")
    assert beside.adapter is not None
    other, base = (shaken(fresh_doctor(load(tiny_folder)), seed=seed).merged() for seed in (4, 5))
    return [beside, Guide("product", other), Guide("ratio", other, base, system="Be kind.")]


def requests(count: int = 14, **betas: float) -> list[Request]:
    """Of all lengths from 1 to 37 tokens, with every warper, greedy ones, stops and rows of β = 0 among them."""
    draw = random.Random(1)
    found = []
    for place in range(count):
        sampling = SamplingParams(
            max_new_tokens=1 + 36 * (place % 5) // 4,
            seed=place,
            temperature=(0.0, 1.0, 0.7, 1.4)[place % 4],
            top_k=20 if place % 6 == 2 else 0,
            top_p=0.8 if place % 6 == 3 else 1.0,
            min_p=0.05 if place % 6 == 4 else 0.0,
            repetition_penalty=1.3 if place % 7 == 2 else 1.0,
            stop=("a",) if place % 5 == 4 else (),
        )
        own = {name: beta * draw.choice([0.0, 0.5, 1.0]) for name, beta in betas.items()}
        alpha, onset = draw.choice([1.0, 0.7]), 3 if place % 3 == 1 else 0
        found.append(Request.from_text(TEXTS[place % 4], alpha=alpha, betas=own, sampling=sampling, onset=onset))
    return found


def same(one: Completion, other: Completion) -> None:
    assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
    assert one.logps == pytest.approx(other.logps, abs=1e-3)
    assert one.patient_logps == pytest.approx(other.patient_logps, abs=1e-3)
    assert one.drawn_logps == pytest.approx(other.drawn_logps, abs=1e-3)


def always(monkeypatch: pytest.MonkeyPatch, tree: Tree) -> None:
    monkeypatch.setattr(Pace, "choose", lambda self, rows: tree)


TREES = [
    Tree((0,), (0,)),
    Tree((0, 1, 2, 3), (0, 0, 0, 0)),
    Tree((0, 0, 0), (0, 1, 2)),
    Branching(RATES, 12, 3).tree(12),
]


@pytest.mark.parametrize("tree", TREES, ids=["one", "chain", "siblings", "tree"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("guided", ["nobody", "beside", "product", "ratio", "everybody"])
def test_no_token_changes(
    patient: LoadedModel,
    draft: DraftModel,
    guides: list[Guide],
    monkeypatch: pytest.MonkeyPatch,
    tree: Tree,
    size: int,
    guided: str,
) -> None:
    """Fourteen requests through one or four places: rows come, go, and keep different numbers of guesses."""
    here = [guide for guide in guides if guided in (guide.name, "everybody")]
    asked = requests(**{guide.name: 1.0 for guide in here})
    plain = GuidedDecoder(patient, here, max_batch_size=size).generate(asked)
    always(monkeypatch, tree)
    guessing = GuidedDecoder(patient, here, max_batch_size=size, draft=draft, max_guesses=12)
    found = guessing.generate(asked)
    for one, other in zip(plain, found, strict=True):
        same(one, other)
    tokens = sum(len(done.token_ids) for done in found)
    assert sum(done.guessed for done in found) > tokens / 2
    assert 0 < sum(done.guesses_held for done in found) < tokens


@pytest.mark.parametrize("tree", [TREES[1], TREES[3]], ids=["chain", "tree"])
def test_guesses_are_made_at_the_strength_of_their_place(
    patient: LoadedModel, draft: DraftModel, guides: list[Guide], monkeypatch: pytest.MonkeyPatch, tree: Tree
) -> None:
    """β · min(1, (t + 1) / 6): of each guess, too, t tokens being said or guessed before it."""
    always(monkeypatch, tree)
    guess, scores = Ward._guess, Mixture.scores
    guessing: list[list[float]] = []
    heard: list[tuple[list[float], list[float]]] = []

    def noted(self: Ward, tree: Tree, inner: Any, says: Any) -> None:
        depth = next(number for number, level in enumerate(tree.levels) if inner[0] in level)
        said = [len(row.completion.token_ids) + depth for row in self.rows for _ in inner]
        guessing.append([min(1.0, (count + 1) / 6) for count in said])
        guess(self, tree, inner, says)
        guessing.clear()

    def listened(self: Mixture, logits: Any, controls: Controls) -> Any:
        if guessing:
            heard.append((guessing[0], controls.betas.flatten().tolist()))
        return scores(self, logits, controls)

    monkeypatch.setattr(Ward, "_guess", noted)
    monkeypatch.setattr(Mixture, "scores", listened)
    sampling = SamplingParams(max_new_tokens=12, seed=3)
    asked = [Request.from_text(text, betas={"beside": 1.0}, sampling=sampling, onset=5) for text in TEXTS[:2]]
    GuidedDecoder(patient, guides[:1], draft=draft, max_guesses=12).generate(asked)
    assert any(min(expected) < 1 for expected, _ in heard)
    assert any(min(expected) == 1 for expected, _ in heard)
    for expected, betas in heard:
        assert betas == pytest.approx(expected)


@pytest.mark.parametrize("tree", TREES, ids=["one", "chain", "siblings", "tree"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("guided", ["product", "ratio", "everybody"])
def test_no_token_changes_where_doctors_guess(
    patient: LoadedModel, guides: list[Guide], monkeypatch: pytest.MonkeyPatch, tree: Tree, size: int, guided: str
) -> None:
    """Their guesses are good here: patient and doctors are close to one another."""
    here = [guide for guide in guides if guided in (guide.name, "everybody")]
    asked = requests(**{guide.name: 1.0 for guide in here})
    plain = GuidedDecoder(patient, here, max_batch_size=size).generate(asked)
    always(monkeypatch, tree)
    guessing = GuidedDecoder(patient, here, max_batch_size=size, draft="doctors", max_guesses=12)
    found = guessing.generate(asked)
    for one, other in zip(plain, found, strict=True):
        same(one, other)
    tokens = sum(len(done.token_ids) for done in found)
    assert sum(done.guessed for done in found) > tokens / 3
    assert sum(done.guesses_held for done in found) > tokens / 10


def test_doctors_whose_reference_is_the_patient_always_guess_right(
    patient: LoadedModel, guides: list[Guide], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare model that is the patient over again stands in for it, so every chain of four holds whole."""
    twin = replace(patient, model=copy.deepcopy(patient.model))
    guide = Guide("it", guides[1].model, twin)
    always(monkeypatch, TREES[1])
    decoder = GuidedDecoder(patient, [guide], draft="doctors")
    decoder.encoder.stop_ids = frozenset()
    sampling = SamplingParams(max_new_tokens=26, seed=3, top_k=30)
    done = decoder.generate([Request.from_text("Hi", betas={"it": 1.5}, sampling=sampling)])[0]
    # The first token comes from the prompt; five passes give five tokens each.
    assert (done.guessed, done.guesses_held) == (20, 20)


def test_of_several_models_a_reference_stands_in(patient: LoadedModel, guides: list[Guide]) -> None:
    """Doctors with weights of their own are bare models, too, but what they say is steered."""
    beside, product, ratio = guides
    plain = replace(ratio, name="plain", system=None)
    # Lanes come in the order of the guides, each guide's reference after all guides.
    for here, expected in (([product], (1, 0)), ([ratio, product], (3, 0)), ([product, plain], (2, 0))):
        lanes, _, references = lanes_of(patient, [beside, *here])
        assert stand_in(lanes, references) == expected


@pytest.mark.parametrize("draft", ["doktors", "/runs/draft", 7])
def test_a_draft_that_is_none_is_refused(patient: LoadedModel, guides: list[Guide], draft: Any) -> None:
    with pytest.raises(UserError, match='draft must be a model from load_draft, or "doctors", got '):
        GuidedDecoder(patient, guides[1:], draft=draft)


def test_requests_without_doctors_are_answered_without_guesses(patient: LoadedModel, guides: list[Guide]) -> None:
    asked = [replace(request, betas={}) for request in requests(3)]
    expected = GuidedDecoder(patient).generate(asked)
    found = GuidedDecoder(patient, guides[1:2], draft="doctors").generate(asked)
    for one, other in zip(expected, found, strict=True):
        same(one, other)
    assert not any(done.guessed for done in found)


@pytest.mark.parametrize("count", [0, 1])
def test_doctors_on_the_patient_cannot_guess(patient: LoadedModel, guides: list[Guide], count: int) -> None:
    with pytest.raises(UserError, match="no doctor here can guess"):
        GuidedDecoder(patient, guides[:count], draft="doctors")


def test_left_to_itself_it_changes_no_token_either(
    patient: LoadedModel, draft: DraftModel, guides: list[Guide]
) -> None:
    asked = requests(28, beside=1.0)
    plain = GuidedDecoder(patient, guides[:1], max_batch_size=5).generate(asked)
    decoder = GuidedDecoder(patient, guides[:1], max_batch_size=5, draft=draft)
    for one, other in zip(plain, decoder.generate(asked), strict=True):
        same(one, other)


@pytest.mark.parametrize("tree", [None, *TREES], ids=["none", "one", "chain", "siblings", "tree"])
@pytest.mark.parametrize("size", [1, 4])
def test_rows_given_up_change_no_token_of_the_others(
    patient: LoadedModel,
    draft: DraftModel,
    guides: list[Guide],
    monkeypatch: pytest.MonkeyPatch,
    tree: Tree | None,
    size: int,
) -> None:
    """Against each alone, plainly: some requests are given up after so many rounds, waiting ones among them."""
    asked = requests(beside=1.0, product=1.0)
    alone = GuidedDecoder(patient, guides[:2])
    expected = [alone.generate([request])[0] for request in asked]
    if tree is not None:
        always(monkeypatch, tree)
    # Fewer places, more rounds.
    limits = {index: limit * 4 // size for index, limit in {2: 9, 8: 5, 11: 15, 12: 0}.items()}
    rounds = dict.fromkeys(range(len(asked)), 0)

    def cancelled(index: int) -> bool:
        rounds[index] += 1
        return rounds[index] > limits.get(index, 1000)

    decoder = GuidedDecoder(patient, guides[:2], max_batch_size=size, draft=None if tree is None else draft)
    found = decoder.generate(asked, cancelled=cancelled)
    given_up = {index for index, done in enumerate(found) if done.finish_reason == "cancelled"}
    assert len(given_up) >= 3
    assert given_up <= set(limits)
    assert any(found[index].token_ids for index in given_up)
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        if index in given_up:
            count = len(other.token_ids)
            assert other.token_ids == one.token_ids[:count] != one.token_ids
            assert other.patient_forwards == count + other.guessed - other.guesses_held
        else:
            same(one, other)


def oracle(monkeypatch: pytest.MonkeyPatch, truth: dict[int, list[int]], wrong: int | None = None) -> list[int]:
    """Let the guesses be what plain decoding drew, but for the `wrong`-th of every answer; counts the passes."""
    passes: list[int] = []
    guess, grow = Ward._guess, Lane.grow

    def guided(self: Ward, tree: Tree, inner: Any, says: Any) -> None:
        guess(self, tree, inner, says)
        depth = len(self.guesses[0]) - 1
        for place, row in enumerate(self.rows):
            at = len(row.completion.token_ids) + depth - 1
            own = truth[row.index]
            token = own[at] if at < len(own) else 0
            self.guesses[place, -1] = token if at != wrong else (token + 1) % 250

    def counted(self: Lane, tokens: Tensor, parents: Any) -> Tensor:
        if not tokens.is_floating_point():
            passes.append(tokens.shape[1])
        return grow(self, tokens, parents)

    monkeypatch.setattr(Ward, "_guess", guided)
    monkeypatch.setattr(Lane, "grow", counted)
    return passes


def test_guesses_come_from_what_training_reads(
    patient: LoadedModel, draft: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each pass the draft expects what it does over the whole text at once, with the patient's states on it: the
    last ones and those of the lower layer, wherever in the tree they were read; a guess behind a guess has estimates.
    """
    always(monkeypatch, TREES[1])
    asked = [Request.from_text(text, sampling=SamplingParams(max_new_tokens=9, seed=3)) for text in TEXTS[:3]]
    decoder = GuidedDecoder(patient, draft=draft, max_guesses=12)
    decoder.encoder.stop_ids = frozenset()
    expected, checked = Ward._expected, 0

    def noted(self: Ward, tree: Tree, inner: Any, says: Any) -> Tensor:
        nonlocal checked
        found = expected(self, tree, inner, says)
        for place, row in enumerate(self.rows):
            ids = torch.tensor([row.prompts[0] + row.completion.token_ids])
            whole = patient.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
            states = torch.cat([whole[-1], whole[1]], dim=-1)[:, :-1]
            embedded = draft.embed(ids[:, 1:], states)
            if inner[0]:
                last = draft.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -1:]
                for guess in self.guesses[place, 1 : inner[0] + 1]:
                    embedded = torch.cat([embedded, draft.embed(guess[None, None], last)], dim=1)
                    last = draft.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -1:]
            hidden = draft.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, -1]
            assert torch.allclose(found[0, place, 0], draft.head.logits(hidden), atol=1e-3)
            checked += 1
        return found

    monkeypatch.setattr(Ward, "_expected", noted)
    decoder.generate(asked)
    assert checked > 40


@pytest.mark.parametrize("wrong", [None, 9])
def test_good_guesses_save_passes(
    patient: LoadedModel, draft: DraftModel, monkeypatch: pytest.MonkeyPatch, wrong: int | None
) -> None:
    """Chains of three that always hold: 25 tokens in 6 passes and that of the prompt; a wrong guess costs one more."""
    asked = [Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=25, seed=3))]
    decoder = GuidedDecoder(patient, draft=draft)
    decoder.encoder.stop_ids = frozenset()
    plain = GuidedDecoder(patient)
    plain.encoder.stop_ids = frozenset()
    expected = plain.generate(asked)[0]
    always(monkeypatch, Tree((0, 1, 2), (0, 0, 0)))
    passes = oracle(monkeypatch, {0: expected.token_ids}, wrong)
    found = decoder.generate(asked)[0]
    same(expected, found)
    # The first token comes from the prompt. A pass gives three guesses and the token behind them.
    assert passes == [4] * (6 if wrong is None else 7)
    assert found.guessed == 3 * len(passes)
    assert found.guesses_held == 25 - 1 - len(passes)
    assert found.patient_forwards == 25 + found.guessed - found.guesses_held


@pytest.mark.parametrize("guided", ["beside", "two doctors that guess"])
def test_draws_follow_the_enumerated_distribution(
    patient: LoadedModel, draft: DraftModel, guides: list[Guide], monkeypatch: pytest.MonkeyPatch, guided: str
) -> None:
    """χ² of 10⁵ draws, by threes, the third mostly behind a guess, against the distribution of all threes.

    By a draft model beside an adapter in ratio form; and by a doctor in product form and one in ratio form themselves,
    the latter reading another prompt.
    """
    temperature, top_k = 0.8, 5
    sampling = SamplingParams(max_new_tokens=3, temperature=temperature, top_k=top_k)
    here, betas = (guides[:1], {"beside": 1.5}) if guided == "beside" else (guides[1:], {"product": 0.5, "ratio": 1.5})
    request = Request.from_text("Hi", alpha=0.9, betas=betas, sampling=sampling)
    always(monkeypatch, Branching(RATES, 6, 2).tree(6))
    guesses: Any = draft if guided == "beside" else "doctors"
    decoder = GuidedDecoder(patient, here, max_batch_size=2500, draft=guesses)
    decoder.encoder.stop_ids = frozenset()
    rows = 35_000
    threes: dict[tuple[int, ...], int] = {}
    held = 0
    for start in range(0, rows, 2500):
        asked = [replace(request, sampling=replace(sampling, seed=start + place)) for place in range(2500)]
        for done in decoder.generate(asked):
            threes[tuple(done.token_ids)] = threes.get(tuple(done.token_ids), 0) + 1
            held += done.guesses_held
    assert held > rows / 50, "guesses should have held"

    def follows(ids: list[int]) -> Tensor:
        """The distribution after these tokens, by the formula, from whole models that read everything anew."""

        def said(model: LoadedModel, system: str | None = None) -> Tensor:
            whole = [*decoder.encoder.prompt_ids(request.messages, system), *ids]
            with torch.no_grad():
                return model.model(input_ids=torch.tensor([whole])).logits[0, -1].double()

        scores = 0.9 * said(patient)
        for guide in here:
            model = load_merged(patient, guide) if guide.adapter else guide.model
            reference = patient if guide.reference == "patient" else guide.reference
            term = said(model, guide.system)
            if reference is not None:
                term = term - said(reference, guide.system)
            scores = scores + betas[guide.name] * term
        scores = scores / temperature
        return scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf).softmax(-1)

    chi_square, cells = 0.0, 0
    first = follows([])
    for one in first.nonzero()[:, 0].tolist():
        second = follows([one])
        for two in second.nonzero()[:, 0].tolist():
            third = follows([one, two])
            for three in third.nonzero()[:, 0].tolist():
                expected = rows * float(first[one] * second[two] * third[three])
                chi_square += (threes.pop((one, two, three), 0) - expected) ** 2 / expected
                cells += 1
    assert not threes
    assert chi_square < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5


def load_merged(patient: LoadedModel, guide: Guide) -> LoadedModel:
    """The guide's adapter in weights of its own, by plain arithmetic."""
    model = copy.deepcopy(patient.model)
    assert guide.adapter is not None
    fused = {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("o_proj",), "gate_up": ("gate_proj", "up_proj"),
             "down": ("down_proj",)}  # fmt: skip
    with torch.no_grad():
        for number, delta in guide.adapter.layers.items():
            layer = model.get_decoder().layers[number]
            for place, names in fused.items():
                change = getattr(delta, place)
                if change is None:
                    continue
                modules = [dict(layer.named_modules())[f"{'self_attn' if place in ('qkv', 'out') else 'mlp'}.{name}"]
                           for name in names]  # fmt: skip
                whole = change(torch.eye(modules[0].in_features)).T
                for module, part in zip(modules, whole.split([module.out_features for module in modules]), strict=True):
                    module.weight = torch.nn.Parameter(module.weight + part)
    return replace(patient, model=model)


@pytest.mark.model
def test_two_thousand_tokens_of_the_real_model_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen rows, greedy and sampled, most of them guided, ten at a time, in float32.

    Guesses hold three times out of five, row by row.
    """
    model = load_model("builtin:smollm2", dtype="float32", device="cpu")
    shaken(fresh_doctor(load_model("builtin:smollm2", dtype="float32", device="cpu"))).save_pretrained(tmp_path)
    guide = load_guide(tmp_path, model, name="it")
    asked = [
        Request(
            prompt.messages,
            betas={"it": (0.0, 0.5, 1.0)[place % 3]},
            sampling=SamplingParams(max_new_tokens=130, temperature=place % 2, seed=place),
        )
        for place, prompt in enumerate(load_prompts("builtin:prompts/test", 16))
    ]
    plain = GuidedDecoder(model, [guide], max_batch_size=10)
    plain.encoder.stop_ids = frozenset()
    expected = plain.generate(asked)
    assert sum(len(done.token_ids) for done in expected) == 2080

    untrained = DraftModel.from_layers(model.model, [29], torch.arange(4000)).requires_grad_(False).eval()
    decoder = GuidedDecoder(model, [guide], max_batch_size=10, draft=untrained)
    decoder.encoder.stop_ids = frozenset()
    always(monkeypatch, TREES[1])
    draw, guess = random.Random(0), Ward._guess

    def informed(self: Ward, tree: Tree, inner: Any, says: Any) -> None:
        guess(self, tree, inner, says)
        for place, row in enumerate(self.rows):
            at = len(row.completion.token_ids) + len(self.guesses[0]) - 2
            if at < 130 and draw.random() < 0.6:
                self.guesses[place, -1] = expected[row.index].token_ids[at]

    monkeypatch.setattr(Ward, "_guess", informed)
    found = decoder.generate(asked)
    for one, other in zip(expected, found, strict=True):
        assert one.token_ids == other.token_ids
    assert 700 < sum(done.guesses_held for done in found) < 1500


def test_streams_show_whole_text(patient: LoadedModel, draft: DraftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, TREES[1])
    request = Request.from_text(TEXTS[1], sampling=SamplingParams(max_new_tokens=30, seed=5))
    expected = GuidedDecoder(patient).generate([request])[0]
    assert "".join(GuidedDecoder(patient, draft=draft).stream(request)) == expected.text


def test_a_broken_model_behind_a_guess_ends_its_row_alone(
    patient: LoadedModel, draft: DraftModel, guides: list[Guide], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second row's product guide says NaN from the fifth token on; the first one does not listen to it."""
    always(monkeypatch, TREES[1])
    asked = [
        Request.from_text("Hi", betas={"product": beta}, sampling=SamplingParams(max_new_tokens=12, seed=1))
        for beta in (0.0, 1.0)
    ]
    decoder = GuidedDecoder(patient, guides[1:2], draft=draft)
    decoder.encoder.stop_ids = frozenset()
    expected = decoder.generate(asked)
    logits = Ward.logits

    def poisoned(self: Ward, places: Any, nodes: Any) -> list[Tensor]:
        found = logits(self, places, nodes)
        for number, place in enumerate(places):
            if len(self.rows[place].completion.token_ids) >= 5:
                found[1][:, number] = float("nan")
        return found

    monkeypatch.setattr(Ward, "logits", poisoned)
    found = decoder.generate(asked)
    same(expected[0], found[0])
    assert (found[1].finish_reason, found[1].token_ids) == ("error", expected[1].token_ids[:5])


def test_out_of_memory_goes_on_with_fewer(
    patient: LoadedModel, draft: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [replace(request, betas={}) for request in requests(6)]
    expected = GuidedDecoder(patient, max_batch_size=6).generate(asked)
    always(monkeypatch, TREES[3])
    grow, calls = Lane.grow, 0

    def failing(self: Lane, tokens: Tensor, parents: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grow(self, tokens, parents)

    monkeypatch.setattr(Lane, "grow", failing)
    for one, other in zip(expected, GuidedDecoder(patient, max_batch_size=6, draft=draft).generate(asked), strict=True):
        same(one, other)
    assert calls > 7


def test_a_draft_of_another_patient_is_refused(tiny_folder: Path, draft: DraftModel) -> None:
    with pytest.raises(UserError, match="another patient"):
        GuidedDecoder(load(tiny_folder), draft=draft)


def test_a_draft_beyond_a_doctors_logits_is_refused(
    patient: LoadedModel, draft: DraftModel, guides: list[Guide], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = copy.deepcopy(guides[1].model.model)
    narrow.lm_head = torch.nn.Linear(narrow.lm_head.in_features, 200, bias=False)
    narrow.config.vocab_size = 200
    with pytest.raises(UserError, match="may guess tokens from 200 on"):
        GuidedDecoder(patient, [Guide("narrow", replace(guides[1].model, model=narrow))], draft=draft)


def test_memory_that_runs_out_while_rows_are_dropped(
    patient: LoadedModel, draft: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [replace(request, betas={}) for request in requests(10)]
    expected = GuidedDecoder(patient, max_batch_size=10).generate(asked)
    keep, calls = Lane.keep, 0

    def failing(self: Lane, places: list[int]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        keep(self, places)

    monkeypatch.setattr(Lane, "keep", failing)
    for one, other in zip(
        expected, GuidedDecoder(patient, max_batch_size=10, draft=draft).generate(asked), strict=True
    ):
        same(one, other)
    assert calls > 1


def test_prompts_of_one_token(patient: LoadedModel, draft: DraftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come while others are under way, so the draft's cache has to exist although there was nothing to read."""
    always(monkeypatch, TREES[1])
    decoders = [GuidedDecoder(patient, max_batch_size=2, draft=guesses) for guesses in (None, draft)]
    asked = [
        Request.from_text("Hi", sampling=SamplingParams(max_new_tokens=5 + 7 * place, seed=place)) for place in range(5)
    ]
    for decoder in decoders:
        monkeypatch.setattr(decoder.lanes[0].encoder, "prompt_ids", lambda messages, system=None: [7])
    for one, other in zip(decoders[0].generate(asked), decoders[1].generate(asked), strict=True):
        same(one, other)


def test_the_number_of_guesses_is_checked(patient: LoadedModel, draft: DraftModel) -> None:
    with pytest.raises(UserError, match="max_guesses must be at least 1, got 0"):
        GuidedDecoder(patient, draft=draft, max_guesses=0)


def test_ranks_are_as_many_as_candidates() -> None:
    assert len(RATES) == RANKS
