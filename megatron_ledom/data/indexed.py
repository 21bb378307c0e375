"""The `.bin`/`.idx` pair: a writer whose bytes equal Megatron's, and a reader of the index header.

The reader of whole datasets is Megatron's `IndexedDataset`. What is written here does not
need megatron, because importing it takes longer than preprocessing a small corpus.
The layout, to the byte, is drawn in docs/data_format.md. A document is one sequence.

Source: `megatron.core.datasets.indexed_dataset` (`IndexedDatasetBuilder`, `_IndexWriter`, `DType`).
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from megatron_ledom.data.files import HashedFile, WrittenFile
from megatron_ledom.errors import InputError

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")
DTYPE_CODES = {name: code for code, name in enumerate(DTYPES, start=1)}
_BLOCK = 1 << 20  # index entries written at a time


def optimal_dtype(vocab_size: int) -> np.dtype:
    """Return the type of the ids in a `.bin` file: uint16 where the vocabulary fits, else int32.

    Source: `DType.optimal_dtype`, whose limit is 65,500 and not 65,536.
    """
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class DatasetWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`; both appear under their names only through `publish`.

    A context manager: whatever was not published is removed on leaving. Memory: 4 bytes a document.

    Args:
        prefix: the path without suffix.
        dtype: the type of the ids, see `optimal_dtype`.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.num_tokens = 0
        self._lengths = array("i")
        assert self._lengths.itemsize == 4, self._lengths.itemsize
        self._bin = HashedFile(Path(f"{prefix}.bin"))
        try:
            self._idx = HashedFile(Path(f"{prefix}.idx"))
        except BaseException:
            self._bin.discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.discard()
        self._idx.discard()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            ids: the ids of the documents one after the other, as they shall stand in the file; [sum(lengths)].
            lengths: ids per document, each at least 1; int32 [documents].
        """
        assert ids.dtype == self.dtype and lengths.dtype == np.int32, (ids.dtype, self.dtype, lengths.dtype)
        assert len(ids) == lengths.sum(dtype=np.int64), (len(ids), lengths.sum(dtype=np.int64))
        self._bin.write(ids.tobytes())
        self._lengths.frombytes(lengths.tobytes())
        self.num_tokens += len(ids)

    def finish(self) -> dict[str, WrittenFile]:
        """Write the index, force both files to disk and return what they are: {"bin": ..., "idx": ...}."""
        lengths = np.array(self._lengths, dtype=np.int32)
        count = len(lengths)
        code = DTYPE_CODES[self.dtype.name]
        self._idx.write(HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, count, count + 1))
        self._idx.write(lengths.tobytes())
        offset = 0
        for start in range(0, count, _BLOCK):
            sizes = lengths[start : start + _BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            self._idx.write((ends - sizes).tobytes())
            offset = int(ends[-1])
        for start in range(0, count + 1, _BLOCK):
            self._idx.write(np.arange(start, min(start + _BLOCK, count + 1), dtype=np.int64).tobytes())
        return {"bin": self._bin.close(), "idx": self._idx.close()}

    def publish(self) -> None:
        """Give both files their final names; call after `finish`."""
        self._bin.publish()
        self._idx.publish()


@dataclass(frozen=True)
class IndexHeader:
    """The first 34 bytes of an `.idx` file."""

    dtype: str
    num_sequences: int
    num_boundaries: int


def read_index_header(path: Path) -> IndexHeader:
    """Read the header of an `.idx` file.

    Raises:
        InputError: the file is too short, no Megatron index, or of an unknown version or dtype.
    """
    with path.open("rb") as file:
        data = file.read(HEADER.size)
    if len(data) < HEADER.size:
        raise InputError(f"{path} is truncated: {len(data)} bytes, an index has at least {HEADER.size}")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(data)
    if magic != INDEX_MAGIC:
        raise InputError(f"{path} is no Megatron index: it starts with {magic!r}, not {INDEX_MAGIC!r}")
    if version != INDEX_VERSION or not 1 <= code <= len(DTYPES):
        raise InputError(f"{path} has index version {version} and dtype code {code}, which this version cannot read")
    return IndexHeader(DTYPES[code - 1], num_sequences, num_boundaries)
