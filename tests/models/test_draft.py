"""A draft model: what it begins as, what it reads, and what its folder must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import load, tensors

from llmdoctor.errors import UserError
from llmdoctor.models.draft import CONFIG_NAME, WEIGHTS_NAME, CutHead, DraftModel, load_draft, save_draft
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.models.logps import LogitsFinish, LogitsHead

VOCABULARY = torch.tensor([0, 2, 3, 40, 299])


@pytest.fixture(scope="module")
def patient(deep_folder: Path) -> LoadedModel:
    return load(deep_folder)


def shaken(patient: LoadedModel) -> DraftModel:
    """Two layers, no two weights alike."""
    draft = DraftModel.from_layers(patient.model, [3, 4], VOCABULARY, [0, 2])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.own_weights().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return draft.requires_grad_(False).eval()


@pytest.fixture
def folder(patient: LoadedModel, tmp_path: Path) -> Path:
    """A draft model's folder that a test may damage."""
    save_draft(shaken(patient), patient, {}, tmp_path / "draft")
    return tmp_path / "draft"


def outputs(draft: DraftModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (2, 7), generator=generator)
    states = torch.randn(2, 7, 96, generator=generator)
    with torch.no_grad():
        hidden = draft.decoder(inputs_embeds=draft.embed(ids, states), use_cache=False).last_hidden_state
        return draft.head.logits(hidden)


def test_it_begins_as_the_patients_layers_on_the_sum_of_embedding_and_state(patient: LoadedModel) -> None:
    before = tensors(patient.model)
    draft = DraftModel.from_layers(patient.model, [3, 4], VOCABULARY)
    for copy, original in zip(draft.decoder.layers, patient.model.model.layers[3:], strict=True):
        theirs = dict(original.named_parameters())
        for name, parameter in copy.named_parameters():
            assert torch.equal(parameter, theirs[name])
            assert parameter.data_ptr() != theirs[name].data_ptr(), "training must not reach the patient"
    assert torch.equal(draft.decoder.norm.weight, patient.model.model.norm.weight)
    assert draft.get_input_embeddings() is patient.model.get_input_embeddings(), "shared, not copied"
    ids, states = torch.tensor([[5, 6]]), torch.randn(1, 2, 32)
    embedded = patient.model.get_input_embeddings()(ids)
    normed = [x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt() for x in (embedded, states)]
    assert torch.allclose(draft.embed(ids, states), normed[0] + normed[1], atol=1e-5)
    assert not any(name.startswith("decoder.embed_tokens") for name in draft.own_weights())
    layer = sum(parameter.numel() for parameter in patient.model.model.layers[0].parameters())
    assert draft.weights_read() == 2 * layer + 32 + 2 * 32 + 2 * 32 * 32 + 5 * 32
    with torch.no_grad():
        for parameter in draft.own_weights().values():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(patient.model).items())


def test_it_makes_no_embeddings_of_its_own(patient: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary's would be gigabytes, made to be thrown away."""
    made: list[int] = []
    init = torch.nn.Embedding.__init__

    def counted(self: Any, rows: int, *args: Any, **kwargs: Any) -> None:
        made.append(rows)
        init(self, rows, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Embedding, "__init__", counted)
    draft = DraftModel.from_layers(patient.model, [1], torch.arange(250))
    assert made == [1]
    assert draft.get_input_embeddings() is patient.model.get_input_embeddings()
    assert draft.config.vocab_size == patient.model.config.vocab_size


@pytest.mark.parametrize("finish", [None, LogitsFinish(scale=0.5, cap=4.0)])
def test_a_cut_head_gives_the_whole_ones_logits(finish: LogitsFinish | None) -> None:
    linear = torch.nn.Linear(4, 9)
    head, hidden, some = LogitsHead(linear, finish), torch.randn(3, 2, 4), torch.tensor([0, 4, 8])
    assert torch.allclose(CutHead(head, some).logits(hidden), head.logits(hidden)[..., some], atol=1e-6)


def test_lower_layers_count_for_nothing_at_first_and_are_read_where_they_are_given(patient: LoadedModel) -> None:
    ids, states = torch.tensor([[5, 6]]), torch.randn(1, 2, 96)
    bare, draft = (DraftModel.from_layers(patient.model, [4], VOCABULARY, lower) for lower in ([], [0, 2]))
    assert torch.equal(draft.embed(ids, states), bare.embed(ids, states[..., :32]))
    assert draft.weights_read() == bare.weights_read() + 2 * 32 * 32
    own = shaken(patient)
    assert own.fuse_lower is not None
    lower = [x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt() for x in states.split(32, dim=-1)[1:]]
    expected = own.embed(ids, states[..., :32]) + torch.cat(lower, dim=-1) @ own.fuse_lower.weight.T
    assert torch.allclose(own.embed(ids, states), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_saved_is_what_is_loaded(deep_folder: Path, tmp_path: Path, dtype: str) -> None:
    patient = load_model(str(deep_folder), dtype=dtype, device="cpu")
    draft = shaken(patient)
    whole = save_draft(draft, patient, {"note": 1}, tmp_path / "draft")
    assert json.loads((tmp_path / "draft" / CONFIG_NAME).read_text()) == whole
    assert (whole["note"], whole["layers"], whole["lower"]) == (1, [3, 4], [0, 2])
    assert whole["weights_read"]["draft"] == draft.weights_read()
    again = load_draft(tmp_path / "draft", load_model(str(deep_folder), dtype=dtype, device="cpu"))
    assert torch.equal(again.vocabulary, VOCABULARY)
    assert torch.equal(outputs(again), outputs(draft))
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    rotary = again.decoder.rotary_emb.inv_freq
    assert torch.equal(rotary, patient.model.model.rotary_emb.inv_freq), "rounded frequencies are other positions"


def test_casting_leaves_the_patients_embeddings_alone(deep_folder: Path) -> None:
    patient = load_model(str(deep_folder), dtype="bfloat16", device="cpu")
    draft = shaken(patient)
    draft.cast(torch.float32)
    assert {parameter.dtype for parameter in draft.own_weights().values()} == {torch.float32}
    assert patient.model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_draft_of_another_patient_is_refused(folder: Path, tiny_model: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"was made for .*deep.*, whose model is another than .*; a draft model serves"):
        load_draft(folder, tiny_model)


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | changes))


@pytest.mark.parametrize("changes", [{"lower": [1, 0]}, {"lower": [0, 0]}, {"layers": [99]}])
def test_layers_that_are_not_ascending_or_not_there_are_refused(
    patient: LoadedModel, folder: Path, changes: dict[str, list[int]]
) -> None:
    """States are put together in the order of the layers, whatever order they are named in."""
    edit(folder, **changes)
    with pytest.raises(UserError, match=rf"draft\.json is broken: {next(iter(changes))} are \["):
        load_draft(folder, patient)


def test_broken_folders_are_refused(patient: LoadedModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent is not a draft model: it has no draft\.json \(make one with"):
        load_draft(tmp_path / "absent", patient)
    weights = load_file(folder / WEIGHTS_NAME)
    for wrong, message in (
        ({name: tensor for name, tensor in weights.items() if name != "fuse.weight"}, "in excess: fuse.weight$"),
        (weights | {"more": torch.zeros(1)}, "lacks or has in excess: more$"),
        (weights | {"token_norm": torch.zeros(3)}, "in excess: token_norm$"),
        ({name: tensor for name, tensor in weights.items() if name != "vocabulary"}, "cannot be read .*vocabulary"),
    ):
        save_file(wrong, str(folder / WEIGHTS_NAME))
        with pytest.raises(UserError, match=message):
            load_draft(folder, patient)
    (folder / WEIGHTS_NAME).write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"draft\.safetensors cannot be read .*; make the draft model anew"):
        load_draft(folder, patient)
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(UserError, match=r"draft\.safetensors cannot be read"):
        load_draft(folder, patient)
    edit(folder, schema_version=99)
    with pytest.raises(UserError, match="has schema version 99; this version of llmdoctor reads 1"):
        load_draft(folder, patient)
    for text in ("{", "[]", "{}", '{"schema_version": 1, "patient_fingerprint": 3, "layers": [4]}'):
        (folder / CONFIG_NAME).write_text(text)
        with pytest.raises(UserError, match=r"draft\.json is broken .*; make the draft model anew"):
            load_draft(folder, patient)
