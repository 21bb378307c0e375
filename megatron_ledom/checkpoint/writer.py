"""A `torch_dist` checkpoint, written one chunk at a time.

Megatron's own `dist_checkpointing.save` takes a model that is in memory. This writes the
same files from a stream, so that a conversion needs the memory of one tensor:

    release/
      __0_0.distcp, __0_1.distcp, ...   chunks and objects, one `torch.save` record after another
      .metadata                         pickled `torch.distributed.checkpoint.metadata.Metadata`
      metadata.json                     the seal: written last, names the format

It knows the format and nothing of names, models or directions. Reading is `reader`.

Source: `torch.distributed.checkpoint.filesystem.FileSystemWriter` and
`megatron.core.dist_checkpointing.strategies.torch`, whose readers load what is written here.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_ledom.checkpoint.locate import INDEX, SEAL
from megatron_ledom.checkpoint.reader import COMMON_STATE
from megatron_ledom.errors import CheckpointError
from megatron_ledom.files import HashingFile, sync_folder

if TYPE_CHECKING:
    import torch

CHECKPOINT_VERSION = 3.0
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
MAX_FILE_BYTES = 5 * 10**9


@dataclass
class _Tensor:
    """A tensor under construction: its chunks, and how many of its elements they hold."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def num_written(self) -> int:
        return sum(math.prod(sizes) for _, sizes in self.chunks)


class _Owned:
    """A file to which torch writes the memory of `value`, which stays as it is."""

    def __init__(self, file: HashingFile, value: Any) -> None:
        self._file, self._value = file, value

    def write(self, data: Any) -> int:
        return self._file.write(data, owner=self._value)

    def flush(self) -> None:
        self._file.flush()


class CheckpointWriter:
    """Writes one checkpoint folder; used as a context manager, which seals the folder if its block succeeds.

    Args:
        folder: exists and is empty.
        max_file_bytes: a new data file is begun once one has grown to this size.

    Attributes:
        hashes: SHA-256 in hexadecimal of every finished data file, by name: nothing is read twice.
    """

    def __init__(self, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.folder = folder
        self.hashes: dict[str, str] = {}
        self._max_file_bytes = max_file_bytes
        self._tensors: dict[str, _Tensor] = {}
        self._places: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]] = {}
        self._file: HashingFile | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._seal()
        finally:
            if self._file is not None:
                self._file.abandon()

    def write_chunk(self, name: str, values: torch.Tensor, *, shape: Sequence[int], offsets: Sequence[int]) -> None:
        """Write a box of the tensor `name`.

        Args:
            name: the checkpoint's key.
            values: the box, on the CPU; its dtype is the tensor's.
            shape: of the whole tensor; as many axes as `values`.
            offsets: where the box begins in it.

        Raises:
            CheckpointError: the box leaves the tensor, or another shape or dtype was said before.
        """
        shape, offsets, sizes = tuple(shape), tuple(offsets), tuple(values.shape)
        tensor = self._tensors.setdefault(name, _Tensor(shape, values.dtype))
        fits = len(offsets) == len(sizes) == len(shape) and all(
            o >= 0 and o + n <= total for o, n, total in zip(offsets, sizes, shape, strict=True)
        )
        if (tensor.shape, tensor.dtype) != (shape, values.dtype) or not fits or (name, offsets) in self._places:
            raise CheckpointError(
                f"{name} {list(tensor.shape)} {tensor.dtype} cannot take {list(sizes)} {values.dtype} at "
                f"{list(offsets)} of {list(shape)}"
            )
        is_whole_storage = values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes
        # torch.save writes the storage: of a view it would write everything that is around it
        self._places[name, offsets] = self._save(values if is_whole_storage else values.clone())
        tensor.chunks.append((offsets, sizes))

    def write_object(self, name: str, value: Any) -> None:
        """Write something that is no tensor; plain values and Megatron's arguments can be read back."""
        if (name, None) in self._places:
            raise CheckpointError(f"{name} was written before")
        self._places[name, None] = self._save([value])

    def write_common(self, args: argparse.Namespace, *, iteration: int) -> None:
        """Write the arguments and the iteration, as Megatron's loop reads them."""
        common = {"args": args, "iteration": iteration, "checkpoint_version": CHECKPOINT_VERSION}
        self.write_object(COMMON_STATE, common)

    def _save(self, value: Any) -> tuple[str, int, int]:
        import torch

        if self._file is not None and self._file.tell() >= self._max_file_bytes:
            self._finish_file()
        if self._file is None:
            self._file = HashingFile(self.folder / f"__0_{len(self.hashes)}.distcp")
        start = self._file.tell()
        torch.save(value, _Owned(self._file, value))
        return self._file.path.name, start, self._file.tell() - start

    def _finish_file(self) -> None:
        if self._file is not None:
            self.hashes[self._file.path.name] = self._file.finish()
            self._file = None

    def _seal(self) -> None:
        for name, tensor in self._tensors.items():
            if tensor.num_written != math.prod(tensor.shape):
                raise CheckpointError(
                    f"{name} {list(tensor.shape)} is incomplete: {tensor.num_written:,} of "
                    f"{math.prod(tensor.shape):,} elements were written"
                )
        self._finish_file()
        for name, content in ((INDEX, pickle.dumps(self._index())), (SEAL, json.dumps(BACKEND).encode())):
            file = HashingFile(self.folder / name)
            file.write(content)
            self.hashes[name] = file.finish()
        sync_folder(self.folder)

    def _index(self) -> Any:
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )

        entries: dict[str, Any] = {name: BytesStorageMetadata() for name, offsets in self._places if offsets is None}
        for name, tensor in self._tensors.items():
            boxes = [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in tensor.chunks]
            entries[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), boxes)
        storage = {
            MetadataIndex(name, None if offsets is None else torch.Size(offsets)): _StorageInfo(*place)
            for (name, offsets), place in self._places.items()
        }
        meta = StorageMeta(checkpoint_id=None, save_id=str(uuid.uuid4()))
        return Metadata(entries, storage_data=storage, storage_meta=meta, version="1.0.0")
