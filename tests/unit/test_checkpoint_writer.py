"""What the streaming writer makes is a `torch_dist` checkpoint: torch's loader and ours read it back bit by bit."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.checkpoint.locate import INDEX, SEAL, find_checkpoint
from megatron_ledom.checkpoint.writer import CheckpointWriter
from megatron_ledom.errors import CheckpointError, OutputError

STACK = torch.arange(2 * 6 * 4, dtype=torch.float32).reshape(2, 6, 4)
TABLE = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).bfloat16()


def write(folder: Path, *, max_file_bytes: int = 10**9) -> dict[str, str]:
    """A stack of two layers, each in two chunks; a table, out of a larger one; an object; arguments."""
    folder.mkdir()
    with CheckpointWriter(folder, max_file_bytes=max_file_bytes) as writer:
        for layer in range(2):
            for row in (0, 3):
                chunk = STACK[layer : layer + 1, row : row + 3]
                writer.write_chunk("stack", chunk, shape=STACK.shape, offsets=(layer, row, 0))
        wider = torch.cat([TABLE, TABLE], dim=1)
        writer.write_chunk("table", wider[:, :4], shape=TABLE.shape, offsets=(0, 0))
        writer.write_object("state/shard_0_1", None)
        writer.write_common(argparse.Namespace(direction="reverse", num_layers=2), iteration=0)
    return writer.hashes


@pytest.mark.parametrize("max_file_bytes", [1, 10**9])
def test_torch_and_the_reader_read_it_back(tmp_path: Path, max_file_bytes: int) -> None:
    folder = tmp_path / "release"
    hashes = write(folder, max_file_bytes=max_file_bytes)
    assert hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert len(hashes) == (7 + 2 if max_file_bytes == 1 else 1 + 2)
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.iteration, str(checkpoint.direction)) == (0, "reverse")
    assert checkpoint.read("stack").equal(STACK) and checkpoint.read_slice("stack", 1).equal(STACK[1])
    assert checkpoint.read("table").equal(TABLE) and "state/shard_0_1" in checkpoint.objects
    loaded = {"stack": torch.empty_like(STACK), "table": torch.empty_like(TABLE)}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert loaded["stack"].equal(STACK) and loaded["table"].equal(TABLE)


def test_a_view_is_stored_without_what_is_around_it(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    with CheckpointWriter(tmp_path / "release") as writer:
        writer.write_chunk("row", torch.zeros(1000, 1000)[:1], shape=(1, 1000), offsets=(0, 0))
    assert (tmp_path / "release" / "__0_0.distcp").stat().st_size < 10_000


@pytest.mark.parametrize(
    ("shape", "offsets", "dtype"),
    [
        ((6, 4), (4, 0), torch.float32),
        ((6, 4), (-1, 0), torch.float32),
        ((6, 4), (0,), torch.float32),
        ((6, 5), (3, 0), torch.float32),
        ((6, 4), (3, 0), torch.bfloat16),
        ((6, 4), (0, 0), torch.float32),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused(
    tmp_path: Path, shape: tuple[int, ...], offsets: tuple[int, ...], dtype: torch.dtype
) -> None:
    with pytest.raises(CheckpointError, match=r"weight \[6, 4\]"), CheckpointWriter(tmp_path) as writer:
        writer.write_chunk("weight", torch.zeros(3, 4), shape=(6, 4), offsets=(0, 0))
        writer.write_chunk("weight", torch.zeros(3, 4, dtype=dtype), shape=shape, offsets=offsets)
    assert not (tmp_path / INDEX).exists() and not (tmp_path / SEAL).exists()


def test_an_incomplete_tensor_is_not_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="12 of 24 elements"), CheckpointWriter(folder) as writer:
        writer.write_chunk("weight", torch.zeros(3, 4), shape=(6, 4), offsets=(0, 0))
    assert [path.name for path in folder.iterdir()] == ["__0_0.distcp"]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(folder)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(OutputError, match=r"__0_0\.distcp.*File exists"), CheckpointWriter(tmp_path) as writer:
        writer.write_chunk("weight", torch.zeros(3), shape=(3,), offsets=(0,))
