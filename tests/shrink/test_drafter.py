"""From a patient to a draft model's folder: what is learned, what its record says, and what survives a kill."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.killing import JobServer, last_step
from tests.tiny import load, tensors

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.prompts import Prompt, load_prompts
from llmdoctor.errors import FingerprintMismatch, TrainingDiverged, UserError
from llmdoctor.models.draft import CONFIG_NAME, DraftModel, load_draft
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.shrink import drafter
from llmdoctor.shrink.drafter import DraftOptions, choose_vocabulary, collate, make_draft
from llmdoctor.shrink.samples import Answer, Sampler

PROMPTS = [Prompt(f"p{number}", ({"role": "user", "content": f"{number} the cat" * 3},)) for number in range(40)]
OPTIONS = DraftOptions(
    vocabulary=200, tokens=1500, epochs=4, max_new_tokens=16, held_out=8, batch_tokens=200, learning_rate=1e-2, unroll=2
)


LOWER = [0, 2]
"""Of five layers two at even distances."""


@pytest.fixture(scope="module")
def patient(deep_folder: Path) -> LoadedModel:
    return load(deep_folder)


@pytest.fixture(scope="module")
def made(deep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The draft model's folder and what `make_draft` returned, by one thread: several add up as they please."""
    folder = tmp_path_factory.mktemp("made") / "draft"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return folder, make_draft(load(deep_folder), PROMPTS, folder, options=OPTIONS)
    finally:
        torch.set_num_threads(threads)


def held_out(patient: LoadedModel, folder: Path) -> list[Answer]:
    """The answers that are measured on, drawn once more."""
    mixed = random.Random(0).sample(PROMPTS, len(PROMPTS))
    return Sampler(patient, folder, OPTIONS.max_new_tokens, 0, LOWER).draw("held-out", mixed[-8:], 1)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_the_draft_learns_and_its_record_says_so(patient: LoadedModel, made: tuple[Path, dict[str, Any]]) -> None:
    folder, record = made
    assert json.loads((folder / CONFIG_NAME).read_text()) == record
    assert (record["layers"], record["lower"]) == ([4], LOWER)
    assert record["patient_fingerprint"] == patient.fingerprint
    assert record["options"]["vocabulary"] == 200
    assert record["answers"]["held_out"] == 8
    assert record["tokens"]["learned"] >= 1500
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    assert after["kl"] < 0.7 * before["kl"]
    assert after["acceptance"] > before["acceptance"] + 0.1
    assert after["second_acceptance"] > before["second_acceptance"] + 0.05
    assert 0.7 < after["mass"] < 1
    assert after["mass"] == before["mass"]
    assert not folder.with_name("draft.parts").exists()
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, "draft.safetensors"]


def test_the_patient_is_not_changed(deep_folder: Path, made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    patient = load(deep_folder)
    before = tensors(patient.model)
    make_draft(patient, PROMPTS, tmp_path / "draft", options=replace(OPTIONS, tokens=100, epochs=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(patient.model).items())
    assert not any(parameter.requires_grad for parameter in patient.model.parameters())


def test_the_figures_are_those_of_the_stored_draft(
    patient: LoadedModel, made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Answer by answer in float64, from the patient's plain logits: p_v of the whole vocabulary, q over the cut."""
    draft = load_draft(made[0], patient)
    sums = {"acceptance": 0.0, "second_acceptance": 0.0, "mass": 0.0, "kl": 0.0}
    first_guesses = second_guesses = 0
    with torch.no_grad():
        for answer in held_out(patient, tmp_path):
            ids = torch.tensor([answer.prompt_ids + answer.completion_ids])
            whole = patient.model(input_ids=ids, use_cache=False, output_hidden_states=True)
            last = whole.hidden_states[-1][:, :-1]
            states = torch.cat([last, *(whole.hidden_states[layer + 1][:, :-1] for layer in draft.lower)], dim=-1)
            p = whole.logits[0].double().softmax(-1)[:, draft.vocabulary]
            hidden = draft.decoder(inputs_embeds=draft.embed(ids[:, 1:], states), use_cache=False).last_hidden_state
            own = torch.cat([last[:, :1], hidden[:, :-1]], dim=1)
            again = draft.decoder(inputs_embeds=draft.embed(ids[:, 1:], own), use_cache=False).last_hidden_state
            for position in range(len(answer.prompt_ids), answer.length - 1):
                q = draft.head.logits(hidden[0, position - 1]).double().softmax(-1)
                sums["acceptance"] += float(torch.minimum(p[position], q).sum())
                sums["kl"] += float((p[position] * (p[position] / q).log()).sum())
                sums["mass"] += float(p[position].sum())
                first_guesses += 1
                if position > len(answer.prompt_ids):
                    q = draft.head.logits(again[0, position - 1]).double().softmax(-1)
                    sums["second_acceptance"] += float(torch.minimum(p[position], q).sum())
                    second_guesses += 1
    for name, figure in made[1]["held_out"]["after"].items():
        count = second_guesses if name == "second_acceptance" else first_guesses
        assert figure == pytest.approx(sums[name] / count, abs=1e-4), name


def test_figures_in_bfloat16_are_those_of_the_stored_draft(deep_folder: Path, tmp_path: Path) -> None:
    patient = load_model(str(deep_folder), dtype="bfloat16", device="cpu")
    record = make_draft(patient, PROMPTS, tmp_path / "draft", options=replace(OPTIONS, tokens=200, epochs=1))
    draft = load_draft(tmp_path / "draft", load_model(str(deep_folder), dtype="bfloat16", device="cpu"))
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.bfloat16}
    draft.decoder.set_attn_implementation("eager")
    assert drafter._measure(draft, held_out(patient, tmp_path / "answers")) == record["held_out"]["after"]


def test_each_guess_in_a_row_reads_the_one_before_it_and_weighs_less(patient: LoadedModel, tmp_path: Path) -> None:
    """Three guesses for two answers, one of which is too short for the third, row by row and token by token."""
    drawn = sorted(Sampler(patient, tmp_path, 12, 0).draw("learned", PROMPTS, 1), key=lambda answer: answer.length)
    answers = [next(answer for answer in drawn if len(answer.completion_ids) == 3), drawn[-1]]
    draft = DraftModel.from_layers(patient.model, [4], torch.arange(0, 300, 3))
    means = []
    with torch.no_grad():
        states = [answer.states()[None] for answer in answers]
        read = list(states)
        for number in range(3):
            losses = []
            for row, answer in enumerate(answers):
                ids = torch.tensor([answer.prompt_ids + answer.completion_ids])[:, 1:-1]
                embedded = draft.embed(ids, read[row][:, :-1])
                hidden = draft.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
                read[row] = torch.cat([states[row][:, :1], hidden], dim=1)
                for position in range(len(answer.prompt_ids) + number, answer.length - 1):
                    p = patient.model.lm_head(states[row][0, position]).softmax(-1)[draft.vocabulary]
                    q = draft.head.logits(hidden[0, position - 1]).softmax(-1)
                    losses.append((0.5 * p * (p / q).log() + 0.5 * (p - q).clamp(min=0)).sum())
            means.append(float(torch.stack(losses).mean()))
    for unroll, expected in ((1, means[0]), (3, means[0] + 0.7 * means[1] + 0.49 * means[2])):
        loss = drafter._loss(draft, collate(answers), 0.5, unroll=unroll)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
    none = drafter._loss(draft, collate(answers[:1]), 0.5, unroll=3) - drafter._loss(
        draft, collate(answers[:1]), 0.5, unroll=2
    )
    assert none.item() == 0, "three tokens have two guesses"
    loss.backward()
    assert all(parameter.grad is not None for parameter in draft.own_weights().values())


def test_lower_layers_are_hidden_at_a_share_of_the_places(patient: LoadedModel, tmp_path: Path) -> None:
    """There the guess is that of a draft without them; elsewhere it reads them, and further guesses never do."""
    answers = Sampler(patient, tmp_path, 12, 0, LOWER).draw("learned", PROMPTS, 1)[:8]
    batch = collate(answers)
    draft = DraftModel.from_layers(patient.model, [4], torch.arange(0, 300, 3), LOWER).requires_grad_(False)
    assert draft.fuse_lower is not None
    torch.nn.init.normal_(draft.fuse_lower.weight, generator=torch.Generator().manual_seed(0))
    read: list[torch.Tensor] = []
    embed = draft.embed

    def noted(tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        read.append(states)
        return embed(tokens, states)

    draft.embed = noted  # type: ignore[method-assign]
    torch.manual_seed(0)
    drafter._guesses(draft, batch, 2, 0.25)
    width = patient.model.config.hidden_size
    whole = batch["states"][:, :-1]
    assert torch.equal(read[0][..., :width], whole[..., :width])
    seen = (read[0][..., width:] == whole[..., width:]).all(-1)
    hidden = (read[0][..., width:] == 0).all(-1)
    there = (whole[..., width:] != 0).any(-1)
    assert bool((seen | hidden).all())
    assert 0.15 < float(hidden[there].float().mean()) < 0.35
    assert read[1].shape[-1] == width
    read.clear()
    first, blind = (drafter._guesses(draft, batch, 1, share)[0][0] for share in (0.0, 1.0))
    assert torch.equal(read[0], whole)
    assert not read[1][..., width:].any()
    assert not torch.allclose(first, blind, atol=1e-3)
    draft.fuse_lower.weight.zero_()
    assert torch.allclose(drafter._guesses(draft, batch, 1, 0.0)[0][0], blind, atol=1e-5)


def test_a_finished_run_does_nothing_again(
    deep_folder: Path, made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, record = made
    before = weights(folder)
    folder.with_name("draft.parts").mkdir()
    monkeypatch.setattr(DraftModel, "from_layers", lambda *_: pytest.fail("work"))
    assert make_draft(load(deep_folder), PROMPTS, folder, options=OPTIONS) == record
    assert weights(folder) == before
    assert not folder.with_name("draft.parts").exists(), "what a kill at the very end had left"
    for options, prompts in ((replace(OPTIONS, seed=1), PROMPTS), (OPTIONS, PROMPTS[1:])):
        with pytest.raises(FingerprintMismatch, match=r"was made from other inputs .*stored .*, now "):
            make_draft(load(deep_folder), prompts, folder, options=options)


def test_the_vocabulary_is_what_answers_say_most() -> None:
    """4 three times, 2 and 7 twice, 0 and 9 once; 1, 3, … never, and lowest ids come first among equals."""
    answers = [Answer([8, 8, 8, 8], [4, 4, 7, 2, 9], Path(), 0), Answer([8], [4, 7, 2, 0], Path(), 0)]
    for size, expected in ((1, [4]), (2, [2, 4]), (3, [2, 4, 7]), (4, [0, 2, 4, 7]), (6, [0, 1, 2, 4, 7, 9])):
        assert choose_vocabulary(answers, size, 10, []).tolist() == expected
    assert choose_vocabulary(answers, 3, 10, [5]).tolist() == [2, 4, 5], "an answer must be able to end"
    assert choose_vocabulary(answers, 1, 10, [5, 3]).tolist() == [3, 5]
    assert choose_vocabulary(answers, 10, 10, [5]).tolist() == list(range(10))


def test_the_vocabulary_of_the_folder(patient: LoadedModel, made: tuple[Path, dict[str, Any]]) -> None:
    vocabulary = load_draft(made[0], patient).vocabulary.tolist()
    assert vocabulary == sorted(set(vocabulary))
    assert len(vocabulary) == 200
    assert ChatEncoder.for_model(patient.model, patient.tokenizer).stop_ids <= set(vocabulary)


def test_more_tokens_than_the_patient_has_are_all_of_them(deep_folder: Path, tmp_path: Path) -> None:
    options = DraftOptions(tokens=50, epochs=1, max_new_tokens=8, held_out=2, layers=5)
    record = make_draft(load(deep_folder), PROMPTS, tmp_path / "draft", options=options)
    assert record["layers"] == [0, 1, 2, 3, 4]
    assert load_draft(tmp_path / "draft", load(deep_folder)).vocabulary.tolist() == list(range(300))
    assert record["held_out"]["after"]["mass"] == pytest.approx(1, abs=1e-5)


def test_collate(tmp_path: Path) -> None:
    """The docstring's example, its rows of states in one file."""
    stored = {"states": torch.arange(8.0).reshape(4, 2), "log_normalisers": torch.tensor([5.0, 0.0, 6.0, 7.0])}
    save_file(stored, str(tmp_path / "s"))
    batch = collate([Answer([5, 6], [7, 2], tmp_path / "s", 1), Answer([5], [8], tmp_path / "s", 0)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2] + [0] * 12, [5, 8] + [0] * 14]
    assert batch["guesses"].tolist() == [[0, 0, 1, 0] + [0] * 12, [0] * 16]
    assert torch.equal(batch["states"][0, :3], stored["states"][1:])
    assert torch.equal(batch["states"][1, :1], stored["states"][:1])
    assert batch["log_normalisers"].tolist() == [[0, 6, 7, 0] + [0] * 12, [5, 0] + [0] * 14]
    assert not batch["states"][0, 3:].any()
    assert not batch["states"][1, 1:].any()
    save_file({"states": torch.ones(5, 2), "log_normalisers": torch.ones(5)}, str(tmp_path / "t"))
    longer = collate([Answer([5, 6], [7, 2, 4, 4], tmp_path / "t", 0)])
    assert longer["guesses"][0].tolist() == [0, 0, 1, 2, 3] + [0] * 11


JOB = f"""
import torch
from llmdoctor.data.prompts import Prompt
from llmdoctor.models.loading import load_model
from llmdoctor.shrink.drafter import DraftOptions, make_draft

def main(patient, output):
    torch.set_num_threads(1)
    make_draft(load_model(patient, dtype="float32", device="cpu"), {PROMPTS!r}, output, options={OPTIONS!r})
"""


def test_a_killed_run_goes_on_and_ends_the_same(
    deep_folder: Path, made: tuple[Path, dict[str, Any]], tmp_path: Path, job_server: JobServer
) -> None:
    """Killed while it draws and twice while it trains."""
    output = tmp_path / "draft"
    parts = tmp_path / "draft.parts"

    def progress() -> int:
        return len(list((parts / "answers").glob("*.safetensors"))) + last_step(parts / "checkpoints")

    seen = job_server.run_through_kills(
        JOB, deep_folder, output, progress=progress, kills=(1, 12, 40), left=lambda: (progress(), output.exists())
    )
    assert not any(finished for _, finished in seen)
    assert seen[0][0] < seen[1][0] < seen[2][0]
    assert weights(output) == weights(made[0])
    assert json.loads((output / CONFIG_NAME).read_text())["held_out"] == made[1]["held_out"]
    assert list(tmp_path.iterdir()) == [output]


def test_an_unfinished_run_of_other_settings_is_refused(deep_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "draft"
    with pytest.raises(TrainingDiverged, match="lower learning_rate"):
        make_draft(load(deep_folder), PROMPTS, output, options=replace(OPTIONS, learning_rate=1e30))
    assert not output.exists()
    with pytest.raises(FingerprintMismatch, match=r"draft.parts was made .*\(learning_rate: stored 1e\+30, now "):
        make_draft(load(deep_folder), PROMPTS, output, options=OPTIONS)


def test_bad_input(patient: LoadedModel, tmp_path: Path) -> None:
    output = tmp_path / "draft"
    for options, message in (
        (replace(OPTIONS, layers=6), "layers must be at most the 5 there are, got 6"),
        (replace(OPTIONS, held_out=40), "40 prompts leave none to learn from with held_out 40"),
    ):
        with pytest.raises(UserError, match=message):
            make_draft(patient, PROMPTS, output, options=options)
    assert not list(tmp_path.iterdir()), "refused before anything is written"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something else than a draft model; give a draft model a folder of its"):
        make_draft(patient, PROMPTS, output, options=OPTIONS)
    (output / CONFIG_NAME).write_text("{")
    with pytest.raises(UserError, match=r"draft\.json is broken"):
        make_draft(patient, PROMPTS, output, options=OPTIONS)
    for bad in (
        {"layers": 0},
        {"lower_layers": -1},
        {"vocabulary": 0},
        {"unroll": 0},
        {"tokens": 0},
        {"tv_weight": 1.5},
    ):
        with pytest.raises(UserError, match=f"{next(iter(bad))} must be"):
            DraftOptions(**bad)


@pytest.mark.model
def test_the_real_patient(tmp_path: Path) -> None:
    patient = load_model("builtin:smollm2", device="cpu")
    options = DraftOptions(tokens=800, epochs=2, max_new_tokens=40, held_out=4, batch_tokens=128)
    record = make_draft(patient, load_prompts("builtin:prompts/train", limit=24), tmp_path / "draft", options=options)
    assert record["layers"] == [29]
    assert record["weights_read"]["draft"] < 0.15 * record["weights_read"]["patient"]
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    assert after["mass"] > 0.9
    assert after["acceptance"] > before["acceptance"] + 0.05
    assert after["kl"] < before["kl"] / 2
    assert len(load_draft(tmp_path / "draft", patient).vocabulary) == 16384
