"""The list of checksums: what it holds, what it finds, and what a list may not say."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.checkpoint import integrity
from megatron_ledom.checkpoint.integrity import (
    LIST_NAME,
    find_faults,
    read_checksums,
    verify_checksums,
    write_checksums,
)
from megatron_ledom.errors import CheckpointError, OutputError

CONTENTS = {"__0_0.distcp": b"weights" * 999, "__1_0.distcp": b"more weights", ".metadata": b"index", "empty": b""}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of files without a list; a folder in it is none of the list's business."""
    folder = tmp_path / "iter_0000001"
    (folder / "sub").mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def listed(bare: Path) -> Path:
    write_checksums(bare)
    return bare


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_list_holds_size_and_hash_of_every_file_but_itself(listed: Path) -> None:
    expected = {name: {"bytes": len(content), "sha256": sha256(content)} for name, content in CONTENTS.items()}
    assert read_checksums(listed) == expected
    write_checksums(listed)
    assert read_checksums(listed) == expected  # the old list is not in the new one
    assert json.loads((listed / LIST_NAME).read_text())["format_version"] == 1
    assert names(listed) == {*CONTENTS, "sub", LIST_NAME}


def test_a_file_whose_hash_is_known_is_not_read_again(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    hash_file = integrity.hash_file
    monkeypatch.setattr(integrity, "hash_file", lambda path, **kw: read.append(path.name) or hash_file(path, **kw))
    write_checksums(bare, {"__0_0.distcp": "ab" * 32, "not_there": "cd" * 32})
    assert sorted(read) == sorted({*CONTENTS} - {"__0_0.distcp"})
    found = read_checksums(bare)
    assert found is not None and set(found) == set(CONTENTS)
    assert found["__0_0.distcp"] == {"bytes": len(CONTENTS["__0_0.distcp"]), "sha256": "ab" * 32}


def refuse(self: Any, *_: Any) -> None:
    raise OutputError("cannot write: no space left")


@pytest.mark.parametrize("step", ["write", "finish"])
def test_a_list_that_cannot_be_written_leaves_the_old_one(
    step: str, listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (listed / LIST_NAME).read_bytes()
    (listed / "empty").write_bytes(b"no longer")
    monkeypatch.setattr(integrity.HashingFile, step, refuse)
    with pytest.raises(OutputError, match="no space left"):
        write_checksums(listed)
    assert (listed / LIST_NAME).read_bytes() == before
    assert names(listed) == {*CONTENTS, "sub", LIST_NAME}


def test_what_a_killed_write_left_is_no_obstacle(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial lists, one of them by a process of the same id: neither is listed as a file of the checkpoint."""
    monkeypatch.setattr(integrity.os, "getpid", lambda: 4242)
    for process in (4242, 4243):
        (bare / f".{LIST_NAME}.{process}.partial").write_bytes(b'{"format_ver')
    write_checksums(bare)
    assert set(read_checksums(bare) or ()) == set(CONTENTS)
    assert f".{LIST_NAME}.4242.partial" not in names(bare)
    assert verify_checksums(bare)


def test_a_file_that_vanishes_meanwhile_is_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(path: Path, **_: Any) -> str:
        path.unlink()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(integrity, "hash_file", vanish)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read for its checksum"):
        write_checksums(bare)
    assert LIST_NAME not in names(bare)


ENTRY = '{"bytes": 1, "sha256": "00"}'
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"format_version": 1, "files": {"a": {"byt',
    "not text": b"\xff\xfe",
    "a list": b"[]",
    "without version": b'{"files": {}}',
    "without files": b'{"format_version": 1}',
    "files in a list": b'{"format_version": 1, "files": ["a"]}',
    "a number for an entry": b'{"format_version": 1, "files": {"a": 3}}',
    "words for a size": b'{"format_version": 1, "files": {"a": {"bytes": "many", "sha256": ""}}}',
    "infinite size": b'{"format_version": 1, "files": {"a": {"bytes": Infinity, "sha256": ""}}}',
    "without hash": b'{"format_version": 1, "files": {"a": {"bytes": 1}}}',
    "nested": b"[" * 200_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_list_is_refused_and_not_taken_for_none(content: bytes, listed: Path) -> None:
    (listed / LIST_NAME).write_bytes(content)
    for reader in (read_checksums, find_faults, verify_checksums):
        with pytest.raises(CheckpointError, match=rf"{LIST_NAME} is damaged"):
            reader(listed)


def test_a_folder_in_place_of_the_list_is_refused(bare: Path) -> None:
    (bare / LIST_NAME).mkdir()
    with pytest.raises(CheckpointError, match=rf"{LIST_NAME} is damaged"):
        read_checksums(bare)


@pytest.mark.parametrize("version", ["99", '"1"', "1.5", "null", "[1]"])
def test_a_list_of_another_version_is_refused(version: str, bare: Path) -> None:
    (bare / LIST_NAME).write_text(f'{{"format_version": {version}, "files": {{}}}}')
    found = re.escape(repr(json.loads(version)))
    with pytest.raises(CheckpointError, match=rf"has format {found}, this version of megatron_ledom reads 1"):
        read_checksums(bare)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/x", "..", ".", ""])
def test_a_list_that_names_a_path_outside_is_refused(name: str, listed: Path) -> None:
    (listed.parent / "x").write_bytes(b"secret")
    (listed / LIST_NAME).write_text(f'{{"format_version": 1, "files": {{"empty": {ENTRY}, "{name}": {ENTRY}}}}}')
    with pytest.raises(CheckpointError, match="is refused: it names") as refusal:
        find_faults(listed)
    assert repr(name) in str(refusal.value) and "outside the folder" in str(refusal.value)


def flip(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(CONTENTS["__0_0.distcp"][:-1])


def lengthen(folder: Path) -> None:
    (folder / "empty").write_bytes(b"x")


def delete(folder: Path) -> None:
    (folder / ".metadata").unlink()


def replace_by_a_folder(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()
    (folder / "__1_0.distcp").mkdir()


def add(folder: Path) -> None:
    (folder / "__2_0.distcp").write_bytes(b"")


FAULTS: dict[Callable[[Path], None], str] = {
    flip: r"__0_0\.distcp has changed since it was saved: its SHA-256 is \w{12}\.\.\., was \w{12}\.\.\.",
    truncate: r"__0_0\.distcp has 6,992 bytes, it was saved with 6,993",
    lengthen: r"empty has 1 bytes, it was saved with 0",
    delete: r"\.metadata is missing",
    replace_by_a_folder: r"__1_0\.distcp is missing",
    add: r"__2_0\.distcp was not there when the checkpoint was saved",
}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_every_fault_is_named_with_its_file(damage: Callable[[Path], None], listed: Path) -> None:
    assert find_faults(listed) == []
    damage(listed)
    faults = find_faults(listed)
    assert faults is not None and len(faults) == 1
    assert re.fullmatch(re.escape(f"{listed}/") + FAULTS[damage], faults[0])
    with pytest.raises(CheckpointError, match=FAULTS[damage]):
        verify_checksums(listed)


def test_all_faults_are_found_at_once(listed: Path) -> None:
    for damage in (add, flip, lengthen, delete):
        damage(listed)
    with pytest.raises(CheckpointError) as refusal:
        verify_checksums(listed)
    for name in ("__2_0.distcp was not there", "__0_0.distcp has changed", "empty has 1", ".metadata is missing"):
        assert name in str(refusal.value)
    assert str(refusal.value).startswith(f"{listed} is damaged: ") and "take an earlier step" in str(refusal.value)


def test_a_file_that_cannot_be_read_is_a_fault(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, **_: Any) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(integrity, "hash_file", fail)
    faults = find_faults(listed)
    assert faults is not None and len(faults) == len(CONTENTS)
    assert all("cannot be read ([Errno 5] Input/output error)" in fault for fault in faults)


def test_a_folder_without_a_list_is_not_refused_and_not_called_sound(bare: Path) -> None:
    assert read_checksums(bare) is None and find_faults(bare) is None
    assert verify_checksums(bare) is False
    write_checksums(bare)
    assert verify_checksums(bare) is True


def test_many_bytes_are_counted_aloud(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checksums(bare)
    assert verify_checksums(bare) and capsys.readouterr().err == ""
    monkeypatch.setattr(integrity, "_QUIET_BYTES", 1)
    write_checksums(bare)
    assert re.search(r"^hash: 0 MB in ", capsys.readouterr().err, re.M)
    assert verify_checksums(bare)
    assert re.search(r"^verify: 0 MB in ", capsys.readouterr().err, re.M)
