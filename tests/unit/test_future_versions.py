"""Files of a later format: each refusal says what was found and what this version reads.

The record in config.json is in `test_convert_llama_arguments`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ledom.checkpoint import Checkpoint, writer
from megatron_ledom.checkpoint.integrity import LIST_NAME, verify_checksums, write_checksums
from megatron_ledom.errors import CheckpointError


def write(folder: Path) -> Path:
    """A small checkpoint with checksums, as this version writes it."""
    folder.mkdir()
    with writer.CheckpointWriter(folder) as checkpoint:
        checkpoint.write_chunk("weight", torch.ones(2), shape=(2,), offsets=(0,))
        checkpoint.write_common(argparse.Namespace(direction="reverse"), iteration=5)
    write_checksums(folder)
    return folder


def read(folder: Path) -> None:
    assert Checkpoint.open(folder).iteration == 5
    assert verify_checksums(folder)


def edit(name: str, key: str) -> Callable[[Path, pytest.MonkeyPatch, object], None]:
    def change(folder: Path, _: pytest.MonkeyPatch, version: object) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: version}))

    return change


def save_again(folder: Path, monkeypatch: pytest.MonkeyPatch, version: object) -> None:
    monkeypatch.setattr(writer, "CHECKPOINT_VERSION", version)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    write(folder)


seal, common, checksums = (
    edit("metadata.json", "sharded_backend_version"),
    save_again,
    edit(LIST_NAME, "format_version"),
)
SAYS = "this version of megatron_ledom reads"


@pytest.mark.parametrize(
    ("change", "version", "words"),
    [
        (seal, 2, rf"metadata\.json says torch_dist version 2, {SAYS} 1$"),
        (seal, "2", rf"metadata\.json says torch_dist version '2', {SAYS} 1$"),
        (common, 4.0, rf"common_state/shard_0_1 has checkpoint_version 4\.0, {SAYS} up to 3\.0$"),
        (common, "4", rf"common_state/shard_0_1 has checkpoint_version '4', {SAYS} up to 3\.0$"),
        (checksums, 2, rf"checksums\.json has format 2, {SAYS} 1$"),
    ],
)
def test_a_later_format_is_refused_with_both_versions(
    change: Callable[[Path, pytest.MonkeyPatch, object], None],
    version: object,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write(tmp_path / "iter_0000005")
    read(folder)
    change(folder, monkeypatch, version)
    with pytest.raises(CheckpointError, match=words):
        read(folder)


@pytest.mark.parametrize("version", [None, 2.0, 3.0])
def test_earlier_meanings_of_the_arguments_are_read(
    version: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "iter_0000005")
    if version is not None:
        save_again(folder, monkeypatch, version)
    seal_without_version = {"sharded_backend": "torch_dist"}
    (folder / "metadata.json").write_text(json.dumps(seal_without_version))
    assert Checkpoint.open(folder).iteration == 5
