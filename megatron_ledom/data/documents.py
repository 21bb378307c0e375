"""Single documents of a dataset: their ids, their text, and where they came from.

It reads the files directly, front to back where it must, without megatron; whether they are
sound is `check.py`'s business.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_ledom.data.indexed import HEADER, index_bytes, read_index_header
from megatron_ledom.data.manifest import Manifest
from megatron_ledom.direction import Direction, flip_groups, natural_document
from megatron_ledom.errors import InputError, LedomError

BLOCK_DOCUMENTS = 1 << 16


@dataclass(frozen=True)
class ShownDocument:
    """One document: ids as stored and in reading order (no end-of-document id), and where it came from."""

    number: int
    stored: np.ndarray
    natural: np.ndarray
    origin: str


def read_document(prefix: str, manifest: Manifest, number: int) -> ShownDocument:
    """Read one document.

    Args:
        prefix: the path of the dataset without suffix.
        manifest: its manifest.
        number: of the document, counted from 0.

    Raises:
        InputError: there is none of that number, or the files do not hold what they must.
        DirectionError: it does not end with the end-of-document id.
    """
    header = read_index_header(Path(f"{prefix}.idx"))
    count, dtype = header.num_sequences, np.dtype(header.dtype)
    if not 0 <= number < count or Path(f"{prefix}.idx").stat().st_size != index_bytes(count):
        raise InputError(f"{prefix} has {manifest.counts.documents:,} documents, there is no document {number}")
    with open_raw(f"{prefix}.idx") as idx, open_raw(f"{prefix}.bin") as data:
        length = int(read_at(idx, HEADER.size + 4 * number, 1, "<i4")[0])
        offset = int(read_at(idx, HEADER.size + 4 * count + 8 * number, 1, "<i8")[0])
        if length < 0 or offset < 0 or offset + length * dtype.itemsize > os.fstat(data.fileno()).st_size:
            raise InputError(f"{prefix}.idx: document {number} is said to lie outside the .bin file")
        stored = read_at(data, offset, length, dtype.newbyteorder("<").str)
        if manifest.reverse_unit == "sentence":
            closed = natural_document(stored, Direction.FORWARD, manifest.eod_id)
            sizes = np.array(_sentence_sizes(prefix, idx, count, number, int(manifest.append_eod)))
            natural = flip_groups(closed, sizes)
        else:
            natural = natural_document(stored, manifest.direction, manifest.eod_id)
    return ShownDocument(number, stored, natural, describe_origin(prefix, manifest, number))


def _sentence_sizes(prefix: str, idx: BinaryIO, count: int, number: int, num_added: int) -> list[int]:
    """The sizes of the sentences of a document as they are stored; those before it are read over."""
    position = 0
    for first, lengths in read_lengths(idx, count):
        before = lengths[: max(0, number - first)] - num_added
        position += int(before.sum())
        if number < first + len(lengths):
            length = int(lengths[number - first]) - num_added
            break
    with open_raw(f"{prefix}.sentences") as file:
        held: deque[int] = deque()
        while position > 0:
            taken = take_sentences(file, held, None)
            if taken is None:
                break
            position -= taken[0]
        sizes = take_sentences(file, held, length)
    if sizes is None or position:
        raise InputError(f"{prefix}.sentences: the sentences do not add up to document {number}")
    return sizes


def open_raw(path: str) -> BinaryIO:
    """Open a file to be read in large pieces."""
    return Path(path).open("rb")


def read_lengths(idx: BinaryIO, num_documents: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the first, ids per document) for blocks of consecutive documents; int64 [block].

    Raises:
        InputError: the index ends too early.
    """
    for first in range(0, num_documents, BLOCK_DOCUMENTS):
        count = min(BLOCK_DOCUMENTS, num_documents - first)
        yield first, read_at(idx, HEADER.size + 4 * first, count, "<i4").astype(np.int64)


def read_at(file: BinaryIO, position: int, count: int, dtype: str) -> np.ndarray:
    """Read `count` numbers from a place of a file; raises InputError where it ends before."""
    file.seek(position)
    data = file.read(count * np.dtype(dtype).itemsize)
    if len(data) != count * np.dtype(dtype).itemsize:
        raise InputError(f"{file.name} ends at {position + len(data):,}, in the middle of what it must hold")
    return np.frombuffer(data, dtype=dtype)


def take_sentences(file: BinaryIO, held: deque[int], length: int | None) -> list[int] | None:
    """Take the sizes of the sentences of the next document; None where they do not add up to `length` ids.

    With None for `length` one sentence is taken.

    Args:
        file: the `.sentences` file, read on as needed.
        held: what was read and not used yet; changed.
        length: ids of the document without its end-of-document id.
    """
    sizes: list[int] = []
    left = 1 if length is None else length
    while left > 0:
        if not held:
            data = file.read(1 << 16)
            if not data or len(data) % 4:
                return None
            held.extend(np.frombuffer(data, dtype="<u4").tolist())
        sizes.append(held.popleft())
        if sizes[-1] == 0:
            return None
        left -= sizes[-1]
    return sizes if left == 0 or length is None else None


def read_skipped(path: str) -> Iterator[tuple[int, int]]:
    """Yield (source, row) of each line of a `.skipped.jsonl` file.

    Raises:
        InputError: a line is something else.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
                source, row = entry["source"], entry["row"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(f"{path}:{number} cannot be understood: {error!r}") from error
            if type(source) is not int or type(row) is not int:
                raise InputError(f"{path}:{number}: source and row must be numbers")
            yield source, row


def origin_of(prefix: str, manifest: Manifest, document: int) -> tuple[int, int]:
    """Return the source of a document, counted from 0, and its row there, counted from 1.

    Documents stand in the order of the rows; the rows without one are listed in `.skipped.jsonl`.

    Raises:
        InputError: there is no such document, or the list cannot be understood.
    """
    left = document
    for number, source in enumerate(manifest.sources):
        if left >= source.documents:
            left -= source.documents
            continue
        row = left + 1
        if "skipped.jsonl" in manifest.sidecars:
            for listed, skipped_row in read_skipped(f"{prefix}.skipped.jsonl"):
                if listed == number and skipped_row <= row:
                    row += 1
                elif listed > number or (listed == number and skipped_row > row):
                    break
        return number, row
    raise InputError(f"{prefix} has {manifest.counts.documents:,} documents, there is no document {document}")


def describe_origin(prefix: str, manifest: Manifest, document: int) -> str:
    """Say where a document came from, as far as the files tell."""
    with suppress(LedomError, OSError):
        source, row = origin_of(prefix, manifest, document)
        return f"{os.fspath(manifest.sources[source].path)}, row {row}"
    return "source unknown"
