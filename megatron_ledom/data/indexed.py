"""The `.idx` file: written in parts, with bytes equal to Megatron's, and the reader of its header.

The reader of whole datasets is Megatron's `IndexedDataset`. What is written here does not
need megatron, because importing it takes longer than preprocessing a small corpus.
The layout, to the byte, is drawn in docs/data_format.md. A document is one sequence.

Source: `megatron.core.datasets.indexed_dataset` (`IndexedDatasetBuilder`, `_IndexWriter`, `DType`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ledom.data.files import write_at
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


def index_bytes(num_documents: int) -> int:
    """Return the size of an `.idx` file."""
    return HEADER.size + 4 * num_documents + 8 * num_documents + 8 * (num_documents + 1)


def write_index_header(descriptor: int, dtype: np.dtype, num_documents: int) -> None:
    """Write the first 34 bytes of an `.idx` file."""
    code = DTYPE_CODES[dtype.name]
    write_at(descriptor, HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, num_documents, num_documents + 1), 0)


def write_index_part(
    descriptor: int, lengths: np.ndarray, *, first: int, num_documents: int, offset_bytes: int, itemsize: int
) -> None:
    """Write what an `.idx` file says of consecutive documents; several processes may write parts at once.

    Args:
        descriptor: the file, open for writing.
        lengths: ids per document, each at least 1; int32 [documents of this part].
        first: number of the first of them, counted from 0.
        num_documents: of the whole dataset.
        offset_bytes: where the first of them stands in the `.bin` file.
        itemsize: bytes of an id.
    """
    assert lengths.dtype == np.int32, lengths.dtype
    at_lengths, at_offsets = HEADER.size + 4 * first, HEADER.size + 4 * num_documents + 8 * first
    at_boundaries = HEADER.size + 12 * num_documents + 8 * first
    last = first + len(lengths)
    write_at(descriptor, lengths, at_lengths)
    for start in range(0, len(lengths), _BLOCK):
        sizes = lengths[start : start + _BLOCK].astype(np.int64) * itemsize
        ends = offset_bytes + np.cumsum(sizes)
        at_offsets = write_at(descriptor, ends - sizes, at_offsets)
        offset_bytes = int(ends[-1])
    for start in range(first, last + (last == num_documents), _BLOCK):
        stop = min(start + _BLOCK, last + (last == num_documents))
        at_boundaries = write_at(descriptor, np.arange(start, stop, dtype=np.int64), at_boundaries)


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
