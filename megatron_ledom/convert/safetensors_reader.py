"""One safetensors file, read strictly: the header is judged before anything is believed, and nothing is mapped.

    8 bytes           length of the header, little endian
    JSON              {name: {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__": {...}}
    data              the tensors, without gap or overlap, to the last byte of the file

Tensors are read with plain reads into memory of their own, so that what stays in memory
is what the caller keeps. `safetensors_file` is the writer.

Source: the format section of the safetensors documentation, whose rules are all checked.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100 * 10**6
"""The format's own limit. A 7B's header has 30 kB a shard."""
MAX_AXES = 16
"""More than any weight has; a bound on what a hostile header can have us multiply."""
_COUNT_LIMIT = 2**56  # of elements; times eight bytes it still fits into what torch counts with
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The format's word for a dtype -> torch's."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype as torch names it, its shape, and its bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check a file's header.

    Returns:
        Tensor name to entry, in the order of the file.

    Raises:
        CheckpointError: naming the file, and the tensor where there is one, for anything that the format forbids.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: {size:,} bytes, its header alone claims {length:,}"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is refused: its header claims {length:,} bytes, the format's limit is 1e8"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    data_start = 8 + length
    entries = {name: _entry(path, name, value, data_start) for name, value in _parse(path, text).items()}
    _check_layout(path, entries, data_start, size)
    return entries


def read_tensor(path: Path, name: str, entry: Entry) -> torch.Tensor:
    """Read one tensor into memory of its own.

    Raises:
        CheckpointError: the file has become shorter since its header was read.
    """
    import torch

    values = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    if not entry.num_bytes:
        return values
    target = memoryview(values.reshape(-1).view(torch.uint8).numpy())
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < entry.num_bytes:
                count = file.readinto(target[done:])
                if not count:
                    raise CheckpointError(
                        f"{path} is truncated: {name} ends at byte {entry.start + entry.num_bytes:,}, the file at "
                        f"{entry.start + done:,}"
                    )
                done += count
            _forget(file.fileno(), entry)
    except OSError as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
    return values


def _forget(descriptor: int, entry: Entry) -> None:
    """Tell the system that these pages will not be read again, so that they do not push out others."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, entry.start, entry.num_bytes, os.POSIX_FADV_DONTNEED)


def parse_json(path: Path, text: bytes) -> Any:
    """Read JSON that nobody vouches for.

    Raises:
        CheckpointError: it is no JSON, nested too deeply, or names something twice.
    """

    def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twin, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{path} is refused: it names {twin!r} twice")
        return found

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=refuse_twins)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or of another kind: this is not JSON ({error})") from error


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    header = parse_json(path, text)
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise CheckpointError(f"{path} is damaged: its header is {_brief(header)}, expected an object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise CheckpointError(f"{path} is damaged: __metadata__ should hold strings, found {_brief(notes)}")
    return header


def _entry(path: Path, name: str, value: Any, data_start: int) -> Entry:
    if not name.isprintable():
        raise CheckpointError(f"{path} is refused: {_brief(name)} is no name of a tensor")
    where = f"{path}: {name}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is damaged: expected dtype, shape and data_offsets, found {_brief(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {_brief(dtype)}, which is not read; known ones: {', '.join(DTYPES)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} is damaged: shape {_brief(shape)} at bytes {_brief(offsets)}")
    # An axis of no elements must not hide others that no machine can count.
    if len(shape) > MAX_AXES or math.prod(n for n in shape if n) >= _COUNT_LIMIT:
        raise CheckpointError(f"{where} is refused: shape {_brief(shape)}")
    import torch

    expected, given = math.prod(shape) * getattr(torch, DTYPES[dtype]).itemsize, offsets[1] - offsets[0]
    if expected != given:
        raise CheckpointError(
            f"{where} is damaged: {dtype} {shape} needs {expected:,} bytes, its offsets give {given:,}"
        )
    return Entry(DTYPES[dtype], tuple(shape), data_start + offsets[0], expected)


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return f"a nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < _COUNT_LIMIT for n in values)


def _check_layout(path: Path, entries: dict[str, Entry], data_start: int, size: int) -> None:
    """The tensors follow each other without gap or overlap, and end with the file."""
    end, previous = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start != end:
            fault = "overlaps" if entry.start < end else "leaves a gap after"
            raise CheckpointError(f"{path} is damaged: {name} {fault} {previous} ({entry.start - end:+,} bytes)")
        end, previous = entry.start + entry.num_bytes, name
    if end > size:
        raise CheckpointError(f"{path} is truncated: {previous} ends at byte {end:,}, the file at {size:,}")
    if end < size:
        raise CheckpointError(f"{path} is damaged: {size - end:,} bytes follow the last tensor")
