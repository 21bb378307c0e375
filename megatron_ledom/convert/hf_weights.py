"""The weights of a Hugging Face folder: one safetensors file, or the shards that an index names.

It owns which files a folder's weights are and that they agree with each other; what one
file may look like is `safetensors_reader`. Pickled weights are refused: reading them
would run whatever they hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ledom.convert.safetensors_file import INDEX_NAME
from megatron_ledom.convert.safetensors_reader import MAX_HEADER_BYTES, Entry, parse_json, read_header, read_tensor
from megatron_ledom.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class HfWeights:
    """The tensors of a folder, open for reading one at a time.

    Attributes:
        folder: the folder.
        files: tensor name to the file that holds it.
        entries: tensor name to dtype, shape and place.
    """

    folder: Path
    files: dict[str, Path]
    entries: dict[str, Entry]

    @classmethod
    def open(cls, folder: str | Path) -> HfWeights:
        """Read the headers of every file of `folder`.

        Raises:
            CheckpointError: no safetensors there, a file that is absent, damaged or outside the folder, an index that
                disagrees with the files, or a tensor that is in two of them.
        """
        folder = Path(folder)
        index = _read_index(folder)
        names = sorted(set(index.values())) if index is not None else [SINGLE_NAME]
        files: dict[str, Path] = {}
        entries: dict[str, Entry] = {}
        for path in (_inside(folder, name) for name in names):
            for name, entry in read_header(path).items():
                if name in files:
                    raise CheckpointError(f"{folder}: {name} is in {files[name].name} and in {path.name}")
                files[name], entries[name] = path, entry
        if index is not None:
            _check_index(folder, index, files)
        return cls(folder, files, entries)

    def names(self) -> list[str]:
        """Every tensor's name, file by file."""
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `name`."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of `name`."""
        import torch

        dtype: torch.dtype = getattr(torch, self._entry(name).dtype)
        return dtype

    def read(self, name: str) -> torch.Tensor:
        """Read `name` into memory of its own, on the CPU.

        Raises:
            CheckpointError: there is none of that name, or its file has changed.
        """
        entry = self._entry(name)
        return read_tensor(self.files[name], name, entry)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def _entry(self, name: str) -> Entry:
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no tensor {name}") from None


def _read_index(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to file; None where one file holds everything."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give one with config.json and safetensors files")
    path = folder / INDEX_NAME
    if not path.exists():
        if not (folder / SINGLE_NAME).exists():
            raise CheckpointError(_why_none(folder))
        return None
    if (folder / SINGLE_NAME).exists():
        raise CheckpointError(f"{folder} holds {SINGLE_NAME} and {INDEX_NAME}: which of them counts is not clear")
    try:
        if not path.is_file() or path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is refused: no file, or too large for an index")
        weight_map = parse_json(path, path.read_bytes())["weight_map"]
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: it should hold a weight_map ({error!r})") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} is damaged: its weight_map should give a file for every tensor")
    if not weight_map:
        raise CheckpointError(f"{path} names no tensor")
    return weight_map


def _why_none(folder: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    if shards:
        return (
            f"{folder} holds {', '.join(shards[:3])} but neither {SINGLE_NAME} nor {INDEX_NAME}: the index is missing"
        )
    if pickles:
        return (
            f"{folder} holds {', '.join(pickles[:3])}: pickled weights are not read, because reading them runs what "
            "they hold. Save them as safetensors first (transformers: save_pretrained)"
        )
    return f"{folder} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME}"


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, which must not lie elsewhere (see `check_inside`)."""
    if Path(name).name != name or name in {"", ".", ".."} or not name.endswith(".safetensors"):
        raise CheckpointError(f"{folder / INDEX_NAME} is refused: it names the file {name[:200]!r}, outside the folder")
    path = folder / name
    try:
        if not path.exists():
            raise CheckpointError(f"{path} is missing: the folder was not copied whole")
        check_inside(path)
    except OSError as error:  # a name that no file system takes
        raise CheckpointError(f"{folder / INDEX_NAME} is refused: it names {name[:80]!r} ({error.strerror})") from error
    return path


def check_inside(path: Path) -> None:
    """Refuse a file whose content lies outside its folder.

    A link to a file's content elsewhere is how download caches lay out a folder: it is followed if
    the folder itself is in that cache, that is, if both have a parent of the name `models--*` in common.

    Raises:
        CheckpointError: it is a link that leaves the folder, or no file.
        OSError: the file system refuses the name.
    """
    real, home = path.resolve(), path.parent.resolve()
    roots = [home, *(parent for parent in home.parents if parent.name.startswith("models--"))]
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{path} is refused: it leads to {real}, outside the folder")
    if not real.is_file():
        raise CheckpointError(f"{path} is refused: it is no file")


def _check_index(folder: Path, index: dict[str, str], files: dict[str, Path]) -> None:
    wrong = [
        f"{name} should be in {index.get(name, 'no file')}, is in {files[name].name if name in files else 'no file'}"
        for name in sorted(index.keys() | files.keys())
        if name not in files or index.get(name) != files[name].name
    ]
    if wrong:
        raise CheckpointError(f"{folder / INDEX_NAME} disagrees with the files: {'; '.join(wrong[:4])}")
