"""The .bin/.idx writer against Megatron's own builder and reader, and files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_ledom.data import indexed
from megatron_ledom.data.files import HashedFile, StagedFile, is_of_dead_process, process_mark
from megatron_ledom.data.indexed import (
    DTYPE_CODES,
    index_bytes,
    optimal_dtype,
    read_index_header,
    write_index_header,
    write_index_part,
)
from megatron_ledom.errors import InputError, OutputError
from megatron_ledom.files import hash_file


def random_documents(count: int, dtype: np.dtype) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    high = min(int(np.iinfo(dtype).max), 120_000)
    return [rng.integers(0, high, size=rng.integers(1, 60)).astype(dtype) for _ in range(count)]


def write(prefix: Path, documents: list[np.ndarray], dtype: np.dtype, batch: int) -> dict[str, str]:
    """Write `.bin` from front to back, and the parts of `.idx` in an order of chance."""
    sizes = np.array([len(d) for d in documents], dtype=np.int32)
    with StagedFile(Path(f"{prefix}.idx")) as idx, HashedFile(Path(f"{prefix}.bin")) as data:
        idx.reserve(index_bytes(len(documents)))
        with idx.partial.open("r+b", buffering=0) as file:
            for start in random.Random(1).sample(range(0, len(documents), batch), k=-(-len(documents) // batch)):
                write_index_part(
                    file.fileno(),
                    sizes[start : start + batch],
                    first=start,
                    num_documents=len(documents),
                    offset_bytes=int(sizes[:start].sum()) * dtype.itemsize,
                    itemsize=dtype.itemsize,
                )
            write_index_header(file.fileno(), dtype, len(documents))
        data.write(np.concatenate(documents))
        hashes = {"bin": data.close().sha256, "idx": hash_file(idx.partial)}
        data.publish()
        idx.publish()
    return hashes


@pytest.mark.parametrize("dtype", [np.dtype(np.uint16), np.dtype(np.int32)])
@pytest.mark.parametrize("block", [1 << 20, 7])
def test_the_bytes_are_those_of_megatrons_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: np.dtype, block: int
) -> None:
    monkeypatch.setattr(indexed, "_BLOCK", block)  # index written in many pieces
    documents = random_documents(100, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in documents:
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    hashes = write(tmp_path / "ours", documents, dtype, batch=9)
    for suffix in ("bin", "idx"):
        content = (tmp_path / f"ours.{suffix}").read_bytes()
        assert content == (tmp_path / f"theirs.{suffix}").read_bytes()
        assert hashes[suffix] == hashlib.sha256(content).hexdigest()
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert all(np.array_equal(dataset[i], documents[i]) for i in range(100))
    header = read_index_header(tmp_path / "ours.idx")
    assert (header.dtype, header.num_sequences, header.num_boundaries) == (dtype.name, 100, 101)


def test_dtypes_and_their_codes_are_megatrons() -> None:
    assert {d.name: d.value for d in DType} == DTYPE_CODES
    for vocab_size in (1, 65_499, 65_500, 65_536, 151_669):
        assert optimal_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    for content, message in [
        (b"MMIDIDX\x00\x00", "truncated: 9 bytes"),
        (b"x" * 40, "no Megatron index"),
        (b"MMIDIDX\x00\x00" + bytes(40), "index version 0 and dtype code 0"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_index_header(path)


def test_nothing_is_left_when_a_writer_is_abandoned(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="midway"), HashedFile(tmp_path / "a.bin") as file:
        file.write(np.array([1, 2], dtype=np.int32))
        assert [p.name for p in tmp_path.iterdir()] == [file.partial.name]
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_output_share_no_file(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "a.bin") as first:
        first.write(b"old")
        with HashedFile(tmp_path / "a.bin") as second:
            second.write(b"new")
            second.sync()
            assert first.close().bytes == 3
            first.publish()
            assert (tmp_path / "a.bin").read_bytes() == b"old"
            second.publish()
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_only_a_dead_process_of_this_node_is_known_to_be_dead() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    alive, dead = process_mark(), process_mark().replace(f"-{os.getpid()}", f"-{process.pid}")
    assert is_of_dead_process(f"a.b.bin.{dead}.3.partial") and is_of_dead_process(f"000000.0.bin.{dead}.tmp")
    for name in (f"a.bin.{alive}.3.partial", f"a.bin.other{dead}.3.partial", f"a.bin.{dead}.json", "a.bin.partial"):
        assert not is_of_dead_process(name)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*file/a.bin .*choose another --output-prefix"):
        HashedFile(tmp_path / "file" / "a.bin")
