"""Writing safetensors files tensor by tensor, hashed on the way: no more than one tensor is in memory.

`safetensors.torch.save_file` wants all tensors of a file at once. The format does not: a
header says where each tensor will lie, and the tensors follow in that order.

    8 bytes     length n of the header, little-endian
    n bytes     JSON {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets": [from, to]}}, padded with spaces
    the rest    the tensors, row-major, little-endian; offsets count from here

Since names and shapes are known before the first tensor is read, the shards, the index
and the space needed on disk are too (`plan_shards`).

Source: the format description of the safetensors project.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_ledom.errors import UsageError
from megatron_ledom.files import HashingFile

if TYPE_CHECKING:
    import torch

DTYPE_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
INDEX_NAME = "model.safetensors.index.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name, and the shape of each tensor in it, in order."""

    file_name: str
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ShardPlan:
    """All files of a model, in order; `dtype` is that of every tensor."""

    shards: tuple[Shard, ...]
    dtype: str

    @property
    def tensor_bytes(self) -> int:
        """The size of all tensors together, without headers."""
        return sum(_num_bytes(shape, self.dtype) for shard in self.shards for shape in shard.shapes.values())

    def num_bytes(self, names: Collection[str]) -> int:
        """The size of the tensors of these names together."""
        shapes = (shape for shard in self.shards for name, shape in shard.shapes.items() if name in names)
        return sum(_num_bytes(shape, self.dtype) for shape in shapes)

    def index(self) -> dict[str, Any] | None:
        """The content of `model.safetensors.index.json`; None for a single file, which needs none."""
        if len(self.shards) == 1:
            return None
        num_parameters = self.tensor_bytes // ITEM_BYTES[self.dtype]
        weight_map = {name: shard.file_name for shard in self.shards for name in shard.shapes}
        return {
            "metadata": {"total_parameters": num_parameters, "total_size": self.tensor_bytes},
            "weight_map": weight_map,
        }


def plan_shards(shapes: Mapping[str, tuple[int, ...]], *, dtype: str, max_shard_bytes: int) -> ShardPlan:
    """Share tensors out over files, in order, none larger than `max_shard_bytes` unless one tensor is.

    Args:
        shapes: name to shape, in the order in which the tensors will come.
        dtype: of all of them; a key of `DTYPE_CODES`.
        max_shard_bytes: counted without the header.
    """
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = _num_bytes(shape, dtype)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tuple(shape)
        filled += size
    if len(groups) == 1:
        return ShardPlan((Shard("model.safetensors", groups[0]),), dtype)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return ShardPlan(tuple(Shard(name, group) for name, group in zip(names, groups, strict=True)), dtype)


def parse_size(text: str) -> int:
    """Read a size such as `5GB`, `500MiB` or a number of bytes.

    >>> parse_size("2MiB")
    2097152

    Raises:
        UsageError: it is neither, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), flags=re.IGNORECASE)
    num_bytes = int(float(match.group(1)) * _UNITS[(match.group(2) or "").upper()]) if match else 0
    if num_bytes < 1:
        raise UsageError(f"--max-shard-size {text}: expected a size such as 5GB, 500MB or 2GiB")
    return num_bytes


class ShardWriter:
    """Writes the tensors of a `ShardPlan` one after the other; use it as a context manager.

    Args:
        folder: where the files go.
        plan: what will come.
        finished: files of the plan that are there already, and whose tensors will not come.
        on_finished: told the name and the SHA-256 in hexadecimal of every file that is complete and on disk.

    Attributes:
        expected: the names of the tensors that will come, in order.

    Raises:
        OutputError: from `write` and at the end, where the file system refuses.
    """

    def __init__(
        self,
        folder: Path,
        plan: ShardPlan,
        *,
        finished: Collection[str] = (),
        on_finished: Callable[[str, str], None] | None = None,
    ) -> None:
        self._folder, self._plan = folder, plan
        self._on_finished = on_finished
        self._queue = [(s, name) for s in plan.shards if s.file_name not in finished for name in s.shapes]
        self.expected = [name for _, name in self._queue]
        self._position = 0
        self._file: HashingFile | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._position == len(self._queue), f"{self.expected[self._position]} was not given"
                self._finish_file()
        finally:
            if self._file is not None:
                self._file.abandon()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor.

        Args:
            name: must be the next one of `expected`.
            tensor: of the plan's shape and dtype, on the CPU.
        """
        shard, expected = self._queue[self._position]
        assert name == expected, f"{name} was given, {expected} is next"
        found = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        assert found == (shard.shapes[name], self._plan.dtype), f"{name}: {found}, planned {shard.shapes[name]}"
        if name == next(iter(shard.shapes)):
            self._finish_file()
            self._file = HashingFile(self._folder / shard.file_name)
            self._file.write(header_bytes(shard, self._plan.dtype))
        assert self._file is not None
        self._file.write(_raw_bytes(tensor), owner=tensor)
        self._position += 1

    def _finish_file(self) -> None:
        if self._file is not None:
            sha256 = self._file.finish()
            if self._on_finished is not None:
                self._on_finished(self._file.path.name, sha256)
            self._file = None


def header_bytes(shard: Shard, dtype: str) -> bytes:
    """The head of a safetensors file, length included; the `format` entry is what transformers looks for."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.shapes.items():
        start, end = end, end + _num_bytes(shape, dtype)
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous."""
    import torch

    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
