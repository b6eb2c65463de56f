"""Loading: what is refused and why, and what a fingerprint sees. Tiny random models, no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from llmdoctor.errors import UserError
from llmdoctor.models import hub, loading
from llmdoctor.models.loading import (
    LoadedModel,
    load_model,
    need_one_gpu,
    placement_of,
    split_revision,
    template_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)

LETTERS = {"a": 2, "b": 3, "c": 4, "ab": 5}


def tiny_tokenizer(**options: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={"<unk>": 0, "</s>": 1, **LETTERS}, merges=[("a", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"eos_token": "</s>", "unk_token": "<unk>", "chat_template": "{{ messages }}"} | options,
    )


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(spec: Path | str, **options: object) -> LoadedModel:
    return load_model(str(spec), **{"dtype": "float32", "device": "cpu"} | options)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_loads_frozen_and_ready_to_pad(saved: Path) -> None:
    loaded = load(saved)
    assert loaded.spec == str(saved) == load_model(saved, dtype="float32", device="cpu").spec
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert weights_fingerprint(loaded.model) == weights_fingerprint(tiny_llama())
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.pad_token == "</s>"
    assert loaded.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    batch = loaded.tokenizer(["a b", "a"], padding=True)
    assert batch["input_ids"] == [[2, 3], [1, 2]]


def test_one_that_is_put_together_by_hand_is_in_evaluation_mode(folder: Path) -> None:
    model = tiny_llama().train()
    assert not LoadedModel(model, tiny_tokenizer(), "mine", {}).model.training


def test_one_that_is_loaded_already_is_known_as_the_folder_that_it_came_from(saved: Path) -> None:
    loaded = load(saved)
    own = LoadedModel.of(tiny_llama().train(), tiny_tokenizer(), saved)
    assert (own.spec, own.fingerprint) == (loaded.spec, loaded.fingerprint)
    assert not own.model.training
    assert not any(parameter.requires_grad for parameter in own.model.parameters())
    assert own.tokenizer.padding_side == "left"
    with pytest.raises(UserError, match="There is no folder"):
        LoadedModel.of(tiny_llama(), tiny_tokenizer(), saved / "elsewhere")


def test_one_that_is_loaded_already_and_came_from_nowhere_is_known_by_its_weights() -> None:
    own, same = (LoadedModel.of(tiny_llama(), tiny_tokenizer()) for _ in range(2))
    assert own.spec == "LlamaForCausalLM in memory"
    assert own.fingerprint == same.fingerprint
    changed = tiny_llama()
    changed.get_input_embeddings().weight.data[0, 0] += 1
    assert LoadedModel.of(changed, tiny_tokenizer()).fingerprint["model"] != own.fingerprint["model"]


def test_one_that_is_loaded_already_but_lies_elsewhere_is_refused() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(UserError, match=r"LlamaForCausalLM in memory has weights that are fetched from"):
        LoadedModel.of(model, tiny_tokenizer())


@pytest.mark.parametrize("quantised", [True, False])
def test_one_whose_weights_are_not_quite_those_of_its_folder_says_so(saved: Path, quantised: bool) -> None:
    model = tiny_llama()
    model.is_quantized = quantised
    assert LoadedModel.of(model, tiny_tokenizer(), saved).quantised is quantised
    assert not LoadedModel.of(model, tiny_tokenizer()).quantised, "known by the weights that it has"


def test_a_padding_token_that_is_there_is_kept(folder: Path) -> None:
    tiny_tokenizer(pad_token="c").save_pretrained(folder)
    assert load(folder).tokenizer.pad_token == "c"


def test_a_tilde_is_the_home_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load(f"~/{saved.name}").fingerprint == load(saved).fingerprint


def test_loading_is_silent(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(saved)
    assert capfd.readouterr() == ("", "")
    load(saved, verbose=True)
    assert "Loading weights" in capfd.readouterr().err


# What a fingerprint sees


def test_loading_again_gives_the_same_fingerprint(saved: Path, folder: Path) -> None:
    first = load(saved).fingerprint
    assert set(first) == {"model", "tokenizer", "template", "dtype"}
    assert first["dtype"] == "float32"
    assert load(saved).fingerprint == first
    assert load(folder).fingerprint == first


def changed_keys(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {key for key in before if before[key] != after[key]}


def test_each_change_shows_in_its_own_entry_only(saved: Path, folder: Path) -> None:
    before = load(saved).fingerprint
    assert changed_keys(before, load(saved, dtype="bfloat16").fingerprint) == {"dtype"}

    tiny_tokenizer(chat_template="{{ messages | length }}").save_pretrained(folder)
    assert changed_keys(before, load(folder).fingerprint) == {"template"}

    other = tiny_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other.save_pretrained(folder)
    assert changed_keys(before, load(folder).fingerprint) == {"tokenizer"}

    tiny_tokenizer().save_pretrained(folder)
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"][3].add_(1e-6))
    assert changed_keys(before, load(folder).fingerprint) == {"model"}


def test_big_models_are_told_apart_by_names_sizes_index_and_revision(
    saved: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_HASHED_IN_FULL_BYTES", 0)
    prints = [load(saved).fingerprint["model"]]
    assert load(folder).fingerprint["model"] == prints[0]
    prints.append(loading._stored_weights_fingerprint(loading._Source(folder, revision="abc")))
    (folder / "model.safetensors.index.json").write_text("{}")
    prints.append(loading._stored_weights_fingerprint(loading._Source(folder)))
    edit_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(100)))
    prints.append(loading._stored_weights_fingerprint(loading._Source(folder)))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    prints.append(loading._stored_weights_fingerprint(loading._Source(folder)))
    assert len(set(prints)) == len(prints)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_one_bit_of_any_weight_changes_the_weights_fingerprint(dtype: torch.dtype, data: st.DataObject) -> None:
    network = tiny_llama().to(dtype).requires_grad_(False)
    before = weights_fingerprint(network)
    name = data.draw(st.sampled_from(sorted(dict(network.named_parameters()))))
    raw = network.get_parameter(name).view(-1).view(torch.uint8)
    place = data.draw(st.integers(0, raw.numel() - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    raw[place] ^= bit
    assert weights_fingerprint(network) != before
    raw[place] ^= bit
    assert weights_fingerprint(network) == before


def test_weights_fingerprint_sees_dtype_shape_and_name_but_not_memory_layout(model: LlamaForCausalLM) -> None:
    before = weights_fingerprint(model)
    assert weights_fingerprint(tiny_llama(seed=1)) != before
    assert weights_fingerprint(tiny_llama().to(torch.bfloat16)) != before

    transposed = tiny_llama()
    weight = transposed.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert weights_fingerprint(transposed) == before

    reshaped = tiny_llama()
    reshaped.model.layers[0].mlp.up_proj.weight.data = weight.data.reshape(16, 24)
    assert weights_fingerprint(reshaped) != before

    swapped = tiny_llama()
    layers = swapped.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert weights_fingerprint(swapped) != before


def test_using_a_tokenizer_does_not_change_its_fingerprint() -> None:
    tokenizer = tiny_tokenizer(pad_token="</s>")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=3)
    tokenizer.padding_side = "left"
    tokenizer.chat_template = "other"
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(tiny_tokenizer()) == before


def test_vocabulary_merges_and_added_tokens_change_the_tokenizer_fingerprint(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == before

    written = (tmp_path / "tokenizer.json").read_text()
    found = {before}
    without_merges = json.loads(written)
    without_merges["model"]["merges"] = []
    exchanged = json.loads(written)
    vocabulary = exchanged["model"]["vocab"]
    vocabulary["b"], vocabulary["c"] = vocabulary["c"], vocabulary["b"]
    for changed in (without_merges, exchanged):
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        found.add(tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)))
    tokenizer.add_tokens(["new"])
    found.add(tokenizer_fingerprint(tokenizer))
    assert len(found) == 4


def test_template_fingerprint() -> None:
    tokenizer = tiny_tokenizer()
    assert template_fingerprint(tokenizer) == template_fingerprint(tiny_tokenizer())
    assert template_fingerprint(tokenizer) != template_fingerprint(tiny_tokenizer(chat_template="{{ messages }} "))


# What is refused


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json; a model's folder has one"):
        load(folder)
    (folder / "weights.gguf").touch()
    with pytest.raises(UserError, match=r"GGUF files: name one of them, such as weights\.gguf"):
        load(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        load(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (folder / "exploded",))

    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights in safetensors \(only pytorch_model\.bin\)\. Pickled .* never"):
        load(folder)
    assert not (folder / "exploded").exists()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no weights in safetensors \(none\)"):
        load(folder)


def test_an_unknown_architecture(folder: Path) -> None:
    edit_config(folder, model_type="zorp")
    with pytest.raises(UserError, match="is of architecture 'zorp', which this version of transformers does not know"):
        load(folder)


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"has a config\.json that transformers cannot use"):
        load(folder)


def test_code_of_its_own_is_not_run_unasked(folder: Path) -> None:
    edit_config(folder, model_type="zorp", auto_map={"AutoConfig": "code.ZorpConfig"})
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n")
    with pytest.raises(UserError, match=r"comes with code of its own; .*--trust-remote-code"):
        load(folder)
    assert not (folder / "ran").exists()


def test_an_encoder_is_refused(folder: Path) -> None:
    config = BertConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(folder)
    with pytest.raises(UserError, match=r"not a causal \(decoder-only\) language model: .* says BertForMaskedLM"):
        load(folder)


def test_an_encoder_decoder_is_refused(folder: Path) -> None:
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(folder)
    with pytest.raises(UserError, match=r"not a causal .* says T5ForConditionalGeneration"):
        load(folder)


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"lacks 1 of its weights \(lm_head\.weight\), which would be random numbers"):
        load(folder)


def test_damaged_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="could not be loaded: "):
        load(folder)


def test_no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"has no tokenizer that can be loaded .*expected a tokenizer\.json"):
        load(folder)


def test_a_tokenizer_that_does_not_fit(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["x", "y", "z"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="a tokenizer of 9 tokens does not fit a model of 8 embeddings"):
        load(folder)


def test_a_tokenizer_without_an_end(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": None}))
    content = json.loads((folder / "tokenizer_config.json").read_text())
    del content["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="names no end-of-sequence token"):
        load(folder)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("builtin:gpt9", r"no built-in model 'gpt9'; known: smollm2"),
        ("./absent", r"There is no folder \./absent"),
        ("absent.gguf", r"There is no file absent\.gguf"),
        ("not a hub id", r"'not a hub id' is neither a folder here nor a hub id"),
        ("a/b/c", r"'a/b/c' is neither a folder here nor a hub id"),
    ],
)
def test_names_that_lead_nowhere(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(spec)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt is a file; expected a folder, a \.gguf file"):
        load(tmp_path / "notes.txt")
    (tmp_path / "broken.gguf").write_text("hello")
    with pytest.raises(UserError, match=r"broken\.gguf could not be read as a GGUF language model: \S"):
        load(tmp_path / "broken.gguf")


def test_a_revision_needs_a_hub_id(folder: Path) -> None:
    with pytest.raises(UserError, match="A revision belongs to a hub id"):
        load(folder, revision="main")


# The hub


def hub_error(kind: type[Exception]) -> Exception:
    """An instance without the HTTP response that some of these insist on."""
    return kind.__new__(kind, "the hub's words")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hub_errors.LocalEntryNotFoundError, "hub could not be reached for team/model at revision v1 .*offline, use"),
        (hub_errors.OfflineModeIsEnabled, "hub could not be reached .*the hub's words"),
        (hub_errors.GatedRepoError, "team/model is gated: accept its terms on the hub, then log in: hf auth login"),
        (hub_errors.RepositoryNotFoundError, "no public model of that id on the hub"),
        (hub_errors.RevisionNotFoundError, "team/model has no revision 'v1' on the hub"),
    ],
)
def test_what_can_go_wrong_at_the_hub(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message):
        load("team/model", revision="v1")


def test_a_hub_model_comes_without_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    loaded = load("team/model", revision="v1")
    assert (asked["repository"], asked["revision"]) == ("team/model", "v1")
    assert not any(str(pattern).endswith((".bin", ".pt", ".pth", "*")) for pattern in asked["allow_patterns"])
    assert loaded.fingerprint == load(folder).fingerprint
    assert loaded.spec == "team/model@v1"
    asked.clear()
    again = load(loaded.spec)
    assert (asked["repository"], asked["revision"], again.spec) == ("team/model", "v1", loaded.spec)
    assert load("team/model").spec == "team/model"
    assert asked["revision"] is None


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("team/model@v1", ("team/model", "v1")),
        ("team/model@refs/pr/3", ("team/model", "refs/pr/3")),
        ("gpt2@main", ("gpt2", "main")),
        ("team/model", ("team/model", None)),
        ("/models/one@v1", ("/models/one@v1", None)),
        ("builtin:smollm2", ("builtin:smollm2", None)),
    ],
)
def test_what_has_a_revision(spec: str, expected: tuple[str, str | None]) -> None:
    assert split_revision(spec) == expected


def test_a_folder_may_have_an_at_sign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "runs").mkdir()
    folder.rename(folder.parent / "runs" / "model@v1")
    monkeypatch.chdir(folder.parent)
    assert load("runs/model@v1").spec == str(folder.parent / "runs" / "model@v1")
    assert split_revision("runs/model@v1") == ("runs/model@v1", None)


# Dtypes and devices


def test_torchs_own_dtypes_and_devices_will_do(saved: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        loaded = load_model(str(saved), dtype=dtype, device=torch.device("cpu"))
        assert (loaded.model.dtype, loaded.fingerprint["dtype"]) == (dtype, str(dtype).removeprefix("torch."))
    with pytest.raises(UserError, match="Unknown dtype 'int8'; expected auto"):
        load_model(str(saved), dtype=torch.int8)
    with pytest.raises(UserError, match="Unknown device 'meta'; expected auto"):
        load_model(str(saved), device=torch.device("meta"))


def test_placement_is_the_models_own_where_it_lies_on_one_device() -> None:
    def spread(*devices: str) -> Any:
        parameters = [SimpleNamespace(device=torch.device(device)) for device in devices]
        return SimpleNamespace(model=SimpleNamespace(parameters=lambda: iter(parameters), dtype=torch.float16))

    assert placement_of(spread("cpu", "cpu")) == {"dtype": torch.float16, "device": "cpu"}
    assert placement_of(spread("mps:0"))["device"] == "mps"
    assert placement_of(spread("cuda:1", "cuda:1"))["device"] == "cuda:1"
    assert placement_of(spread("cuda:0", "cuda:1")) == {"dtype": torch.float16, "device": "auto"}


def test_unknown_dtype(saved: Path) -> None:
    with pytest.raises(UserError, match="Unknown dtype 'float8'; expected auto, bfloat16, float16, float32"):
        load(saved, dtype="float8")


@pytest.mark.parametrize(
    ("local", "expected"), [("", "cuda"), ("0", "cuda:0"), ("3", "cuda:3"), ("4", "cuda"), ("x", "cuda")]
)
def test_each_process_of_a_training_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch, local: str, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert loading.resolve_device("auto") == expected


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:0", "mps:1", ""])
def test_unknown_device(saved: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"Unknown device '{device}'; expected auto, cpu, cuda"):
        load(saved, device=device)


def test_devices_that_are_not_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:3"):
        with pytest.raises(UserError, match=f"Device '{device}' is not available: torch sees 0 GPUs"):
            load(saved, device=device)
    with pytest.raises(UserError, match="Device 'mps' is not available"):
        load(saved, device="mps")
    with pytest.raises(UserError, match="'balanced' spreads a model over GPUs, and torch sees none"):
        load(saved, device="balanced")
    assert load(saved, device="auto").model.device.type == "cpu"


PROBES = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


@pytest.mark.parametrize("answers", [(True, False), (False, True), (True, True), (False, False)])
def test_auto_dtype_on_a_cpu_follows_its_instructions(
    saved: Path, monkeypatch: pytest.MonkeyPatch, answers: tuple[bool, bool]
) -> None:
    for probe, answer in zip(PROBES, answers, strict=True):
        monkeypatch.setattr(torch.cpu, probe, lambda answer=answer: answer, raising=False)
    loaded = load(saved, dtype="auto")
    expected = torch.bfloat16 if any(answers) else torch.float32
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}
    assert loaded.fingerprint["dtype"] == ("bfloat16" if any(answers) else "float32")


def test_auto_dtype_without_the_probes_is_float32(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for probe in PROBES:
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert load(saved, dtype="auto").model.dtype == torch.float32


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_on_a_gpu_wants_native_bfloat16(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert loading.resolve_dtype("auto", "cuda:0") == expected


def test_what_is_trained_needs_one_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(UserError, match="2 GPUs in one process are not supported: start one process a GPU"):
        need_one_gpu(on_gpu)
    need_one_gpu(SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setenv("LOCAL_RANK", "0")
    need_one_gpu(on_gpu)
    spread = SimpleNamespace(device=torch.device("cuda", 0), hf_device_map={"model.layers.0": 0, "model.layers.1": 1})
    with pytest.raises(UserError, match="must lie on one device, and is spread over several"):
        need_one_gpu(spread)
