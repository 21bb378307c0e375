"""One finished `torch_dist` checkpoint: its arguments, and its tensors one at a time.

Megatron writes *global* tensors: whatever the tensor, pipeline and data parallel sizes,
a name stands for one whole tensor, cut into chunks that lie in the data files of the
ranks. Layers that are alike are stacked on a leading axis:

    decoder.layers.mlp.linear_fc2.weight [L, hidden, ffn], written by TP 2 x PP 2

                 columns 0..f/2     columns f/2..f
    layer 0      __0_0.distcp       __1_0.distcp       stage 0
    layer 1      __0_0.distcp       __1_0.distcp
    layer 2      __2_0.distcp       __3_0.distcp       stage 1
    layer 3      __2_0.distcp       __3_0.distcp

so that `read_slice(name, 2)` opens two files and holds one layer. No process group, no
GPU and no model is needed, and nothing in a checkpoint is executed (`unpickle`).
It does not know what the tensors mean: that is `convert.names`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from megatron_ledom.checkpoint.locate import INDEX, find_checkpoint
from megatron_ledom.checkpoint.unpickle import load_index, load_object
from megatron_ledom.direction import Direction
from megatron_ledom.errors import CheckpointError

if TYPE_CHECKING:
    import torch

COMMON_STATE = "common_state/shard_0_1"
"""The name of the object that holds the arguments and the iteration."""
CHECKPOINT_VERSION = 3.0
"""Megatron's number for the meaning of its keys; later ones are refused."""


@dataclass(frozen=True)
class StoredBytes:
    """A stretch of a data file: one chunk of a tensor, or one object."""

    file_name: str
    start: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: `offsets` and `sizes` per axis, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: StoredBytes


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor as the checkpoint knows it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass
class Checkpoint:
    """A finished checkpoint, open for reading.

    Attributes:
        folder: the `iter_NNNNNNN` folder.
        args: Megatron's arguments of the run that saved it, with ours among them; values of
            Megatron's own classes are `SavedValue` notes.
        iteration: optimizer steps taken.
        tensors: every tensor, optimizer state included, by name.
        objects: the names of everything that is not a tensor (random states, extra states, ...).
    """

    folder: Path
    args: argparse.Namespace
    iteration: int
    tensors: dict[str, StoredTensor] = field(repr=False)
    objects: frozenset[str] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, step: int | None = None) -> Checkpoint:
        """Open the last finished checkpoint under `path`, or the one of `step`.

        Args:
            path: Megatron's `--save` folder, or an `iter_NNNNNNN` folder.
            step: an iteration, or None for the last finished one.

        Raises:
            CheckpointError: none is there, or it is unfinished, damaged or of another kind.
        """
        folder = find_checkpoint(Path(path), step)
        index = load_index(folder / INDEX)
        try:
            stored, tensors, objects = _read_index(index, folder)
        except CheckpointError:
            raise
        except Exception as error:  # its records may hold anything in place of their numbers
            raise CheckpointError(f"{folder / INDEX} is damaged ({type(error).__name__}: {error})") from error
        common = _load_common(folder, stored)
        return cls(folder, common["args"], int(common["iteration"]), tensors, frozenset(objects))

    @property
    def direction(self) -> Direction:
        """The direction in which its model reads.

        Raises:
            CheckpointError: the checkpoint does not say.
        """
        written = getattr(self.args, "direction", None)
        if written is None:
            raise CheckpointError(
                f"{self.folder} does not say in which direction its model reads (no argument 'direction'): "
                "it was not written by tools/pretrain.py"
            )
        return Direction.parse(written, where=f"{self.folder}, argument 'direction'")

    def tensor_names(self) -> list[str]:
        """The names of all tensors, optimizer state included, in the order of the index."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor `name`."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which `name` is stored."""
        return self._stored(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """Read the whole tensor `name`.

        Raises:
            CheckpointError: there is none of that name, or its chunks do not fit.
        """
        tensor = self._stored(name)
        return self._read_box(tensor, (0,) * len(tensor.shape), tensor.shape)

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """Read `name[index]`: one layer of a stack, without touching the others.

        Raises:
            CheckpointError: there is none of that name, no such index, or its chunks do not fit.
        """
        tensor = self._stored(name)
        if not tensor.shape or not 0 <= index < tensor.shape[0]:
            raise CheckpointError(f"{self.folder}: {name} has shape {list(tensor.shape)}, slice {index} was asked for")
        rest = tensor.shape[1:]
        return self._read_box(tensor, (index, *(0 for _ in rest)), (1, *rest))[0]

    def boxes(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """How `name` is cut in the files: (offsets, sizes) of each part, which `read_box` reads one at a time.

        Raises:
            CheckpointError: there is none of that name, or the parts do not fill it exactly once.
        """
        self.check_chunks(name)
        return [(chunk.offsets, chunk.sizes) for chunk in self._stored(name).chunks]

    def check_chunks(self, name: str) -> None:
        """Refuse a tensor whose chunks overlap or leave a part of it out; nothing is read.

        Raises:
            CheckpointError: there is none of that name, or its chunks do not fit.
        """
        tensor = self._stored(name)
        self._parts(tensor, (0,) * len(tensor.shape), tensor.shape)

    def read_box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a box of `name`; only the chunks that overlap it are opened.

        Args:
            name: of a tensor.
            offsets: where the box begins, an element for each axis.
            sizes: of the box.

        Raises:
            CheckpointError: there is none of that name, or the chunks do not hold the box.
        """
        return self._read_box(self._stored(name), tuple(offsets), tuple(sizes))

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no tensor {name}") from None

    def _read_box(self, tensor: StoredTensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Put together the box of `tensor` that starts at `offsets`, from the chunks that overlap it."""
        import torch

        parts = self._parts(tensor, offsets, sizes)  # before anything is allocated: the index may claim any shape
        if len(parts) == 1 and parts[0][0].sizes == sizes:
            return self._read_chunk(tensor, parts[0][0])  # the usual case at TP 1: no copy
        box = torch.empty(sizes, dtype=tensor.dtype)
        for chunk, common in parts:
            source = tuple(slice(lo - o, hi - o) for (lo, hi), o in zip(common, chunk.offsets, strict=True))
            target = tuple(slice(lo - o, hi - o) for (lo, hi), o in zip(common, offsets, strict=True))
            box[target] = self._read_chunk(tensor, chunk)[source]
        return box

    def _parts(
        self, tensor: StoredTensor, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> list[tuple[Chunk, list[tuple[int, int]]]]:
        """The chunks that the box needs, each with what it shares with it; refused unless they fill it once."""
        if len(offsets) != len(sizes) or len(sizes) != len(tensor.shape):
            raise CheckpointError(
                f"{self.folder}: {tensor.name} has shape {list(tensor.shape)}, a box {list(sizes)} at {list(offsets)} "
                "was asked for"
            )
        overlaps = ((chunk, _overlap(chunk, offsets, sizes)) for chunk in tensor.chunks)
        parts = [(chunk, common) for chunk, common in overlaps if common is not None]
        for (one, _), (other, _) in itertools.combinations(parts, 2):
            if _overlap(one, other.offsets, other.sizes) is not None:
                raise CheckpointError(
                    f"{self.folder}: two chunks of {tensor.name} overlap, at {list(one.offsets)} and "
                    f"{list(other.offsets)}"
                )
        num_stored = sum(math.prod(hi - lo for lo, hi in common) for _, common in parts)
        if num_stored != math.prod(sizes):
            raise CheckpointError(
                f"{self.folder}: the chunks of {tensor.name} hold {num_stored} of the {math.prod(sizes)} elements "
                f"of the box {list(sizes)} at {list(offsets)}"
            )
        return parts

    def _read_chunk(self, tensor: StoredTensor, chunk: Chunk) -> torch.Tensor:
        import torch

        stored = chunk.stored
        where = f"{self.folder / stored.file_name}: {tensor.name} at byte {stored.start}"
        with _FileSlice(self.folder / stored.file_name, stored.start, stored.length) as file:
            try:
                _check_archive(file, math.prod(chunk.sizes) * tensor.dtype.itemsize)
                file.seek(0)
                values = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file raises nearly anything
                raise CheckpointError(f"{where} is damaged ({type(error).__name__}: {error})") from error
        if not isinstance(values, torch.Tensor) or tuple(values.shape) != chunk.sizes or values.dtype != tensor.dtype:
            found = f"{values.dtype} {list(values.shape)}" if isinstance(values, torch.Tensor) else type(values)
            raise CheckpointError(f"{where}: the index says {tensor.dtype} {list(chunk.sizes)}, the file holds {found}")
        return values


class _FileSlice(io.RawIOBase):
    """A stretch of a file as a seekable read-only file, so that no chunk is held as bytes and as a tensor.

    Args:
        path: the file.
        start: first byte.
        length: number of bytes.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, path: Path, start: int, length: int) -> None:
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        self._start, self._length, self._position = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(min(len(view), self._length - self._position), 0)
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view[:wanted])
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _check_archive(file: io.RawIOBase, num_bytes: int) -> None:
    """Refuse a chunk whose archive holds fewer bytes than its tensor: torch believes the pickled number of elements."""
    with zipfile.ZipFile(cast("IO[bytes]", file)) as archive:
        records = [record for record in archive.infolist() if Path(record.filename).parent.name == "data"]
        if len(records) != 1 or records[0].compress_type != zipfile.ZIP_STORED or records[0].file_size < num_bytes:
            found = ", ".join(f"{record.filename} of {record.file_size} bytes" for record in records[:3])
            raise ValueError(f"{num_bytes} bytes should be in one record, found {found or 'none'}")


def _read_index(index: Any, folder: Path) -> tuple[dict[Any, StoredBytes], dict[str, StoredTensor], set[str]]:
    """Turn torch's records into ours: places, tensors and the names of objects."""
    stored = {(key.fqn, _axes(key.offset)): _stored_bytes(info, folder) for key, info in index.storage_data.items()}
    _check_files(folder, list(stored.values()))
    tensors: dict[str, StoredTensor] = {}
    objects: set[str] = set()
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(name, str) or not name.isprintable():  # it goes to terminals, and is sorted with others
            raise CheckpointError(f"{folder / INDEX} is refused: {name!r:.200} is no name")
        if hasattr(entry, "chunks"):
            tensors[name] = _stored_tensor(name, entry, stored, folder)
        else:
            objects.add(name)
    return stored, tensors, objects


def _axes(size: Any) -> tuple[int, ...] | None:
    return None if size is None else tuple(int(n) for n in size)


def _stored_bytes(info: Any, folder: Path) -> StoredBytes:
    name = str(info.relative_path)
    if Path(name).name != name or name in {"", ".", ".."}:
        raise CheckpointError(f"{folder / INDEX} is refused: it names the file {name!r}, outside the checkpoint")
    if info.transform_descriptors:
        raise CheckpointError(f"{folder}: {name} was written through {info.transform_descriptors}, which is not read")
    return StoredBytes(name, int(info.offset), int(info.length))


def _check_files(folder: Path, stored: list[StoredBytes]) -> None:
    """Refuse a checkpoint whose data files are missing or too short."""
    needed: dict[str, int] = {}
    for part in stored:
        if part.start < 0 or part.length < 0:
            raise CheckpointError(f"{folder / INDEX} is damaged: {part}")
        needed[part.file_name] = max(needed.get(part.file_name, 0), part.start + part.length)
    home = folder.resolve()
    for name, num_bytes in sorted(needed.items()):
        path = folder / name
        if path.is_symlink() and path.resolve().parent != home:
            raise CheckpointError(f"{path} is refused: it leads to {path.resolve()}, outside the checkpoint")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint was not copied whole, or not saved whole")
        found = path.stat().st_size
        if found < num_bytes:
            raise CheckpointError(f"{path} is truncated: {found} bytes, the index needs {num_bytes}")


def _stored_tensor(name: str, entry: Any, stored: dict[Any, StoredBytes], folder: Path) -> StoredTensor:
    import torch

    shape = tuple(int(n) for n in entry.size)
    dtype = entry.properties.dtype
    if min(shape, default=0) < 0 or not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{folder / INDEX} is damaged: {name} has shape {list(shape)} and dtype {dtype!r}")
    chunks = []
    for box in entry.chunks:
        offsets, sizes = tuple(map(int, box.offsets)), tuple(map(int, box.sizes))
        place = stored.get((name, offsets))
        fits = len(offsets) == len(sizes) == len(shape) and all(
            o >= 0 <= n and o + n <= total for o, n, total in zip(offsets, sizes, shape, strict=True)
        )
        if place is None or not fits or math.prod(sizes) * dtype.itemsize > place.length:
            raise CheckpointError(f"{folder / INDEX} is damaged: {name} {list(shape)} has a chunk at {list(offsets)}")
        chunks.append(Chunk(offsets, sizes, place))
    return StoredTensor(name, shape, dtype, tuple(chunks))


def _overlap(chunk: Chunk, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """The box that `chunk` and the box at `offsets` share, as (low, high) per axis; None if they share nothing."""
    box = []
    for chunk_low, chunk_size, low, size in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True):
        common = max(chunk_low, low), min(chunk_low + chunk_size, low + size)
        if common[0] >= common[1]:
            return None
        box.append(common)
    return box


def _load_common(folder: Path, stored: dict[Any, StoredBytes]) -> dict[str, Any]:
    """Read the arguments and the iteration."""
    place = stored.get((COMMON_STATE, None))
    if place is None:
        raise CheckpointError(
            f"{folder} holds no {COMMON_STATE}: it was not written by megatron-core 0.19's training loop"
        )
    where = f"{folder / place.file_name}: {COMMON_STATE}"
    with _FileSlice(folder / place.file_name, place.start, place.length) as file:
        saved = load_object(file, where=where)
    common = saved[0] if isinstance(saved, list) and saved else saved
    if not isinstance(common, dict) or not isinstance(common.get("args"), argparse.Namespace):
        raise CheckpointError(f"{where} holds no arguments of a run")
    version = common.get("checkpoint_version", CHECKPOINT_VERSION)
    if not isinstance(version, int | float) or version > CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{where} has checkpoint_version {version!r}, this version of megatron_ledom reads up to "
            f"{CHECKPOINT_VERSION}"
        )
    if not isinstance(common.get("iteration"), int):
        raise CheckpointError(f"{where} holds no iteration")
    return common
