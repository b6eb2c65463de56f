"""From a model's name to a frozen model, its tokenizer, and the fingerprint of both."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmdoctor.errors import UserError, first_line
from llmdoctor.files import digest, sha256_file
from llmdoctor.models import builtin
from llmdoctor.models.hub import hub_folder

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BUILTIN_PREFIX = "builtin:"
_HASHED_IN_FULL_BYTES = 2_000_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CAUSAL_HEADS = ("CausalLM", "LMHead", "ConditionalGeneration")
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.py", "*.safetensors", "*.tiktoken", "*.txt"]
# Some repositories carry their weights a second time in the vendor's own layout.
_HUB_DUPLICATES = ["*/*.safetensors", "consolidated*.safetensors"]
_LOAD_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


@dataclass
class LoadedModel:
    """A frozen model in evaluation mode with its tokenizer.

    `fingerprint` has the keys `model` (its stored weights, whatever the dtype they are loaded in), `tokenizer`,
    `template` and `dtype`. `quantised` says that the weights in memory are coarser than those stored.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: str
    fingerprint: dict[str, str]
    quantised: bool = False

    def __post_init__(self) -> None:
        # One that is put together by hand may come from a training, where dropout would change what is decoded.
        self.model.eval()

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: str | os.PathLike[str] | None = None
    ) -> LoadedModel:
        """A causal LM that is loaded already, in whatever way: quantised, sharded, …; it is frozen.

        Args:
            model, tokenizer: used as they are; the tokenizer pads on the left from now on.
            spec: what `load_model` would find its weights by, where they are unchanged but for dtype or quantisation:
                then doctors, rewards and drafts that were made with the one serve the other, and training can load it
                a second time. Without it the weights in memory are what it is known by. (A doctor that is an adapter
                on a quantised patient is not run in its pass: the base it was trained on is loaded beside it.)

        Raises:
            UserError: no model behind `spec`, weights that lie on a disk or in the host's memory, or a tokenizer that
                does not fit.
        """
        name = os.fspath(spec) if spec is not None else f"{type(model).__name__} in memory"
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError(
                f"{name} has weights that are fetched from the host's memory or a disk whenever they are used, which "
                "is not supported: load it so that it fits into the GPUs (quantised, or spread over more of them)"
            )
        _prepare_tokenizer(name, tokenizer, model)
        model.requires_grad_(False)
        stored = weights_fingerprint(model) if spec is None else stored_weights_fingerprint(name)
        fingerprint = _fingerprint(stored, tokenizer, model.dtype)
        coarser = spec is not None and bool(getattr(model, "is_quantized", False))
        return cls(model, tokenizer, name if spec is None else _from_anywhere(name), fingerprint, coarser)


@dataclass(frozen=True)
class _Source:
    """Where a model's files lie: a folder, or one GGUF file."""

    path: Path
    revision: str = ""

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()


def load_model(
    spec: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    verbose: bool = False,
) -> LoadedModel:
    """Load a causal language model and freeze it; should it be trained nevertheless, it has no dropout.

    `spec` is `builtin:NAME`, a folder, a `.gguf` file or a hub id, of which `@` or `revision` may name a branch, tag or
    commit: `owner/name@v1` is also what the model goes by then, so that whatever was made with it finds it again. For
    the same reason a folder or file here goes by its whole path.
    Weights are read from safetensors or GGUF only. `dtype` is `auto`, `bfloat16`, `float16` or `float32`; `auto` means
    bfloat16 where the hardware multiplies it fast, else float32. `device` is `auto`, `cpu`, `cuda`, `cuda:N`, `mps`, or
    `balanced` (spread over all GPUs). Either may be torch's own, such as `torch.bfloat16`. The tokenizer pads on the
    left. Raises UserError saying what does not fit.
    """
    spec = os.fspath(spec)
    target = resolve_device(str(device))
    torch_dtype = resolve_dtype(str(dtype).removeprefix("torch."), target)
    source = _locate(spec, revision)
    with nullcontext() if verbose else builtin.quiet_transformers():
        if source.is_gguf:
            model, tokenizer = _load_gguf(spec, source.path, torch_dtype, target)
        else:
            model = _load_folder(spec, source.path, torch_dtype, target, trust_remote_code)
            tokenizer = _load_tokenizer(spec, source.path, trust_remote_code)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"{spec} does not fit into the memory of the GPUs here; give more of them, or a smaller model")
    _prepare_tokenizer(spec, tokenizer, model)
    model.eval().requires_grad_(False)
    fingerprint = _fingerprint(_stored_weights_fingerprint(source), tokenizer, torch_dtype)
    pinned = _from_anywhere(spec) if revision is None else f"{spec}@{revision}"
    return LoadedModel(model=model, tokenizer=tokenizer, spec=pinned, fingerprint=fingerprint)


def placement_of(loaded: LoadedModel) -> dict[str, Any]:
    """`dtype` and `device` that `load_model` puts another model beside this one by; auto where it is on several."""
    devices = {parameter.device for parameter in loaded.model.parameters()}
    # Apple's one GPU is mps to `load_model` and mps:0 to torch.
    names = {str(device) if device.type == "cuda" else device.type for device in devices}
    return {"dtype": loaded.model.dtype, "device": names.pop() if len(names) == 1 else "auto"}


def split_revision(spec: str) -> tuple[str, str | None]:
    """`owner/name@revision` in its two parts; what is no such thing has no revision."""
    found = re.fullmatch(r"((?:[\w-][\w.-]*/)?[\w-][\w.-]*)@([\w./-]+)", spec)
    return (spec, None) if found is None or Path(spec).exists() else (found[1], found[2])


def name_base(adapter: Any, spec: str) -> None:
    """Name the base in a peft config; else it is the folder of this machine where the base's files lie."""
    adapter.base_model_name_or_path, adapter.revision = split_revision(spec)


def _fingerprint(weights: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> dict[str, str]:
    return {
        "model": weights,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template_fingerprint(tokenizer),
        "dtype": str(dtype).removeprefix("torch."),
    }


def stored_weights_fingerprint(spec: str) -> str:
    """The `model` fingerprint that `load_model(spec)` would have, without loading it."""
    return _stored_weights_fingerprint(_locate(spec, None))


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hash of every parameter's name, dtype, shape and bits, as they are in memory; tied weights count once."""
    return tensors_fingerprint(dict(model.named_parameters()))


def tensors_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of each tensor's name, dtype, shape and bits."""
    named = sorted(tensors.items(), key=lambda item: item[0])
    # hashlib lets go of the interpreter lock on large buffers, so this uses all cores.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        hashes = list(pool.map(_tensor_digest, (tensor for _, tensor in named)))
    return digest([[name, hashed] for (name, _), hashed in zip(named, hashes, strict=True)])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides which ids a text gets: vocabulary, merges, splitting rules, added tokens.

    The chat template is left out (see `template_fingerprint`), and so are padding and truncation.
    """
    parts: dict[str, Any] = {
        "vocabulary": sorted((index, token) for token, index in tokenizer.get_vocab().items()),
        "added": sorted(
            [index, token.content, token.special, token.normalized, token.lstrip, token.rstrip, token.single_word]
            for index, token in tokenizer.added_tokens_decoder.items()
        ),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        merges = rules["model"].get("merges", [])
        # Older versions of tokenizers write a merge as one string.
        parts["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        parts["rules"] = [rules.get(rule) for rule in ("normalizer", "pre_tokenizer", "post_processor")]
    return digest(parts)


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the chat template."""
    return digest(tokenizer.chat_template)


def _tensor_digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    hasher = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    hasher.update(raw.numpy().data)
    return hasher.hexdigest()


def _stored_weights_fingerprint(source: _Source) -> str:
    """Hash of the weight files; of their names, sizes, index and revision where reading them all would take long."""
    files = [source.path] if source.is_gguf else sorted(source.path.glob("*.safetensors"))
    if sum(path.stat().st_size for path in files) <= _HASHED_IN_FULL_BYTES:
        return digest([sha256_file(path) for path in files])
    index = source.path / "model.safetensors.index.json"
    return digest(
        {
            "files": [[path.name, path.stat().st_size] for path in files],
            "index": sha256_file(index) if index.is_file() else "",
            "revision": source.revision,
        }
    )


def resolve_device(device: str) -> str:
    """The device that `auto` means here; any other as it is. UserError for one that is unknown or not there."""
    if device == "auto":
        if torch.cuda.is_available():
            # Each of torchrun's processes has a GPU of its own.
            local = os.environ.get("LOCAL_RANK", "")
            return f"cuda:{local}" if local.isdecimal() and int(local) < torch.cuda.device_count() else "cuda"
        # Apple GPUs have no float64, which translating a doctor of another tokenizer needs; taken only when asked for.
        return "cpu"
    if device == "balanced":
        if not torch.cuda.is_available():
            raise UserError("Device 'balanced' spreads a model over GPUs, and torch sees none here; use 'auto'.")
        return device
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"Unknown device {device!r}; expected auto, cpu, cuda, cuda:N, mps or balanced.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"Device {device!r} is not available: torch sees {torch.cuda.device_count()} GPUs here.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("Device 'mps' is not available: torch sees no Apple GPU here.")
    return device


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """The dtype of that name; what `auto` means on the device. UserError for an unknown one."""
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise UserError(f"Unknown dtype {dtype!r}; expected auto, {', '.join(DTYPES)}.")
    if device == "cpu":
        return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32
    if device == "mps":
        return torch.float32
    # Emulated bfloat16, which is what older GPUs have, is slower than float32.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def need_one_gpu(model: Any, count: int | None = None) -> None:
    """UserError where a model that is to be trained lies on several GPUs, or this process would use several.

    The latter cuts each batch between the GPUs, which would part chosen and rejected responses.

    Args:
        model: what is to be trained.
        count: GPUs that this process will use; as transformers' trainer would have it if None.
    """
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise UserError("what is trained must lie on one device, and is spread over several: give one, such as cuda:0")
    if count is None:
        count = torch.cuda.device_count() if model.device.type == "cuda" and "LOCAL_RANK" not in os.environ else 1
    if count > 1:
        raise UserError(
            f"{count} GPUs in one process are not supported: start one process a GPU with torchrun "
            "(--nproc-per-node 1 trains on the first alone), or show this one a single GPU with CUDA_VISIBLE_DEVICES=0"
        )


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 (AMX or AVX512_BF16).

    With them decoding and training are several times faster than in float32.
    """
    # Private probes, the only ones there are in every version: where one is absent, its answer is no.
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in probes)


def _locate(spec: str, revision: str | None) -> _Source:
    path = Path(spec).expanduser()
    is_local = spec.startswith((BUILTIN_PREFIX, ".", "~")) or path.is_absolute() or path.exists()
    is_gguf = path.suffix.lower() == ".gguf"
    if revision is not None and (is_local or is_gguf):
        raise UserError(f"A revision belongs to a hub id, and {spec} is not one.")
    if spec.startswith(BUILTIN_PREFIX):
        return _Source(_builtin_folder(spec.removeprefix(BUILTIN_PREFIX)))
    if is_gguf:
        if not path.is_file():
            raise UserError(f"There is no file {spec}.")
        return _Source(path)
    if path.is_dir():
        _check_folder(spec, path)
        return _Source(path)
    if path.is_file():
        raise UserError(f"{spec} is a file; expected a folder, a .gguf file, a hub id or {BUILTIN_PREFIX}NAME.")
    if is_local:
        raise UserError(f"There is no folder {spec}.")
    name, revision = split_revision(spec) if revision is None else (spec, revision)
    snapshot = hub_folder(
        name, "model", revision=revision, files=_HUB_FILES, but=_HUB_DUPLICATES,
        instead=f"a folder, a .gguf file or {BUILTIN_PREFIX}smollm2",
    )  # fmt: skip
    _check_folder(spec, snapshot)
    return _Source(snapshot, revision=snapshot.name)


def _from_anywhere(spec: str) -> str:
    """`spec` as it names the same model whatever the current folder."""
    path = Path(spec).expanduser()
    return spec if spec.startswith(BUILTIN_PREFIX) or not path.exists() else os.path.abspath(path)


def _builtin_folder(name: str) -> Path:
    if builtin.is_cached(builtin.get_builtin(name)):
        return builtin.fetch(name)
    with builtin.terminal_progress() as progress:
        return builtin.fetch(name, progress=progress)


def _check_folder(spec: str, folder: Path) -> None:
    """Refuse a folder that does not hold a whole model in safetensors."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            hint = "it is an adapter (a doctor, perhaps), not a model"
        elif ggufs := sorted(folder.glob("*.gguf")):
            hint = f"it has GGUF files: name one of them, such as {ggufs[0].name}"
        else:
            hint = "a model's folder has one"
        raise UserError(f"{spec} has no config.json; {hint}.")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    found = f"only {', '.join(pickles)}" if pickles else "none"
    raise UserError(
        f"{spec} has no weights in safetensors ({found}). Pickled weights can run code when they are opened and are "
        "never loaded; save the model again with save_pretrained."
    )


def _load_gguf(
    spec: str, path: Path, dtype: torch.dtype, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if device == "balanced":
        raise UserError(f"{spec}: a GGUF file is loaded on one device; 'balanced' needs a folder or a hub id.")
    try:
        model, tokenizer = builtin.read_gguf(path, dtype)
    except _LOAD_FAILURES as error:
        raise UserError(f"{spec} could not be read as a GGUF language model: {first_line(error)}") from error
    return model.to(device), tokenizer


def _load_folder(spec: str, folder: Path, dtype: torch.dtype, device: str, trust_remote_code: bool) -> PreTrainedModel:
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except _LOAD_FAILURES as error:
        raise UserError(_unreadable_config(spec, error)) from error
    _check_causal(spec, config)
    config = builtin.without_dropout(config)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            device_map="auto" if device == "balanced" else {"": device},
            **options,
        )
    except _LOAD_FAILURES as error:
        raise UserError(f"{spec} could not be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{spec} lacks {len(missing)} of its weights ({', '.join(missing[:3])}{', …' if missing[3:] else ''}), "
            "which would be random numbers: the files are not all there, or are not those of a causal language model."
        )
    return model


def _unreadable_config(spec: str, error: BaseException) -> str:
    message = str(error)
    if "trust_remote_code" in message:
        return f"{spec} comes with code of its own; read that code, then pass --trust-remote-code to run it."
    if named := re.search(r"model type `([^`]*)`", message):
        return (
            f"{spec} is of architecture {named[1]!r}, which this version of transformers does not know; "
            "a newer one may: pip install --upgrade transformers"
        )
    return f"{spec} has a config.json that transformers cannot use: {first_line(error)}"


def _check_causal(spec: str, config: Any) -> None:
    architectures = getattr(config, "architectures", None) or []
    # BERT and its kin load as causal models too, but every token of theirs sees the ones after it.
    headless = bool(architectures) and not any(head in name for name in architectures for head in _CAUSAL_HEADS)
    if getattr(config, "is_encoder_decoder", False) or headless:
        raise UserError(
            f"{spec} is not a causal (decoder-only) language model: its config.json says "
            f"{', '.join(architectures) or config.model_type}."
        )


def _load_tokenizer(spec: str, folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _LOAD_FAILURES as error:
        raise UserError(
            f"{spec} has no tokenizer that can be loaded ({first_line(error)}); expected a tokenizer.json."
        ) from error


def _prepare_tokenizer(spec: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Set left padding and a padding token that is in the vocabulary already."""
    rows = model.get_input_embeddings().weight.shape[0]
    if not 0 < len(tokenizer) <= rows:
        raise UserError(f"{spec}: a tokenizer of {len(tokenizer)} tokens does not fit a model of {rows} embeddings.")
    if tokenizer.eos_token is None:
        raise UserError(f"{spec}: the tokenizer names no end-of-sequence token, so no text would ever end.")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
