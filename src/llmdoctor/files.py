"""Files that appear whole or not at all, and the fingerprints written beside them."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmdoctor.errors import FingerprintMismatch, Settings

_MARKER = "fingerprint.json"


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it is synced and renamed over it, else removed."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        # mkstemp makes private files; what we write is as readable as the user's umask says.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success it replaces `target` as a whole, else it is removed."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _restore(target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            target.replace(retired / "was")
            try:
                temporary.replace(target)
            except OSError:
                (retired / "was").replace(target)
                raise
            finally:
                shutil.rmtree(retired, ignore_errors=True)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _restore(target: Path) -> None:
    """Put back what `atomic_folder` had set aside when it was killed before the new folder had its name."""
    for retired in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
        if not target.exists() and (retired / "was").is_dir():
            (retired / "was").replace(target)
            retired.rmdir()


def discard(folder: Path) -> None:
    """Remove a folder, first away as a whole: what a cut leaves half removed would pass for somebody's."""
    if folder.exists():
        retired = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        folder.replace(retired)
        shutil.rmtree(retired, ignore_errors=True)


def fill_folder(target: Path, save: Callable[[Path], None], last: str, gone: Sequence[str] = ()) -> None:
    """Put what `save` writes into a folder among what is there already.

    Args:
        target: the folder.
        save: writes everything into the folder that it is given, which it makes.
        last: the file that makes `target` what it is; it goes first and comes last, so that a cut leaves nothing that
            looks finished.
        gone: folders that are removed where `save` writes none of that name: what was there before is another one's.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / last).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        made = Path(scratch) / "made"
        save(made)
        for name in gone:
            if not (made / name).exists():
                shutil.rmtree(target / name, ignore_errors=True)
        for path in sorted(made.iterdir(), key=lambda path: path.name == last):
            place = target / path.name
            if place.is_dir():
                shutil.rmtree(place)
            path.replace(place)


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def claim(folder: Path, fingerprint: dict[str, str], fix: str, settings: Settings) -> None:
    """Write down what the unfinished work in `folder` is.

    Args:
        folder: of the work.
        fingerprint: what it is made from.
        fix: what to do where the folder is another one's.
        settings: what stands behind fingerprints, by their names.

    Raises:
        FingerprintMismatch: what is there is another one's.
    """
    check_claim(folder, fingerprint, fix, settings)
    marker = folder / _MARKER
    if not marker.is_file():
        write_json(marker, {**fingerprint, "settings": settings})


def check_claim(folder: Path, fingerprint: dict[str, str], fix: str, settings: Settings) -> None:
    """FingerprintMismatch as `claim`, by those fingerprints that are known; writes nothing."""
    marker = folder / _MARKER
    if not marker.is_file():
        return
    stored = json.loads(marker.read_text(encoding="utf-8"))
    before = {name: value for name, value in stored.items() if name in fingerprint}
    if before != fingerprint:
        raise FingerprintMismatch(str(folder), before, fingerprint, fix, stored.get("settings"), settings)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Short stable fingerprint (16 hex digits) of any JSON-serialisable value."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]
