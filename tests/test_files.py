"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdoctor.files import atomic_folder, atomic_path, digest, sha256_file, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "file.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_bytes() == b"half"
    assert names(target.parent) == ["file.bin"]


@pytest.mark.parametrize("crash", [ValueError, KeyboardInterrupt])
def test_a_crash_leaves_the_old_file_and_no_trace(tmp_path: Path, crash: type[BaseException]) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("new, half writ")
            raise crash

    with pytest.raises(crash):
        write()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    script = (
        "import os, signal, sys; from pathlib import Path; from llmdoctor.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('new'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_a_failed_rename_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(OSError), atomic_path(target) as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == ["taken"]


def test_permissions_follow_the_users_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "x").touch()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "doctor"
    for number in (1, 2):
        with atomic_folder(target) as temporary:
            (temporary / f"{number}.txt").write_text(str(number))
            assert not (target / f"{number}.txt").exists()
        assert names(target) == [f"{number}.txt"]
    assert names(target.parent) == ["doctor"]


def test_a_crash_leaves_the_old_folder_and_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "doctor"
    target.mkdir()
    (target / "old.txt").touch()

    def write() -> None:
        with atomic_folder(target) as temporary:
            (temporary / "new.txt").touch()
            raise ValueError

    with pytest.raises(ValueError):
        write()
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["doctor"]


def test_a_folder_that_cannot_take_its_place_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "doctor"
    target.mkdir()
    (target / "old.txt").touch()
    replace = Path.replace

    def failing(self: Path, destination: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("no space")
        return replace(self, destination)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="no space"), atomic_folder(target) as temporary:
        (temporary / "new.txt").touch()
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["doctor"]


def test_a_kill_between_the_renames_loses_no_folder(tmp_path: Path) -> None:
    """Killed when the old folder was set aside and the new one had not its name yet: who writes next finds the old."""
    target = tmp_path / "[doctor]"
    target.mkdir()
    (target / "old.txt").touch()
    script = (
        "import os, signal, sys; from pathlib import Path; from llmdoctor.files import atomic_folder\n"
        "replace = Path.replace\n"
        "def killed(self, to):\n"
        "    replace(self, to)\n"
        "    if to.name == 'was': os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.replace = killed\n"
        "with atomic_folder(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'new.txt').touch()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(ValueError), atomic_folder(target):
        raise ValueError
    assert names(target) == ["old.txt"]
    with atomic_folder(target) as temporary:
        (temporary / "newer.txt").touch()
    assert names(target) == ["newer.txt"]
    assert not list(tmp_path.glob(".*.old"))


def test_json_is_readable_and_ends_its_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ü": [1, None]})
    text = (tmp_path / "x.json").read_text("utf-8")
    assert text.endswith("\n")
    assert "ü" in text
    assert json.loads(text) == {"ü": [1, None]}


def test_what_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", object())
    assert (tmp_path / "x.json").read_text() == "1\n"


def test_sha256_of_a_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_digest_by_hand() -> None:
    """16 hex digits of SHA-256 over compact JSON with sorted keys; it must not change between releases."""
    canonical = '{"a":[1,"ü"],"b":null}'
    assert digest({"b": None, "a": [1, "ü"]}) == hashlib.sha256(canonical.encode()).hexdigest()[:16]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(one=values, other=values)
def test_digests_are_equal_exactly_where_the_json_is(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest(one) == digest(other)) == same


@given(st.dictionaries(st.text("abc", max_size=2), st.integers(), min_size=1))
def test_digest_ignores_the_order_of_keys(value: dict[str, int]) -> None:
    assert digest(dict(reversed(value.items()))) == digest(value)
