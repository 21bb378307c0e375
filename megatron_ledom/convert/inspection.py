"""Inspecting either kind of weights: a Megatron checkpoint or a Hugging Face folder, described, verified, compared.

    path -> is it a folder with config.json?  yes: safetensors, and SHA256SUMS if there
                                              no:  torch_dist, and checksums.json if there

Nothing in either is executed: no model is built, no tokenizer is loaded, no pickle is
read but by `checkpoint.unpickle`. It returns plain values; `inspection_text` words them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.checkpoint import Checkpoint, describe
from megatron_ledom.checkpoint.diff import TensorSource, diff_tensors, diff_values
from megatron_ledom.checkpoint.integrity import find_faults
from megatron_ledom.checkpoint.locate import find_checkpoint
from megatron_ledom.convert.export_folder import SUMS_NAME
from megatron_ledom.convert.hf_weights import HfWeights
from megatron_ledom.convert.llama_arguments import read_config
from megatron_ledom.convert.llama_config import CONFIG_NAME, REQUIREMENTS
from megatron_ledom.errors import CheckpointError, UsageError
from megatron_ledom.files import hash_file

if TYPE_CHECKING:
    import torch


class HfSource:
    """A Hugging Face folder's tensors, whole, in the form that `checkpoint.diff` compares."""

    def __init__(self, weights: HfWeights) -> None:
        self.weights = weights

    def tensor_names(self) -> list[str]:
        """Every tensor's name."""
        return self.weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `name`."""
        return self.weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of `name`."""
        return self.weights.dtype(name)

    def boxes(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """One box: the tensor."""
        shape = self.shape(name)
        return [((0,) * len(shape), shape)]

    def read_box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read the part of `name` that begins at `offsets`."""
        return self.weights.read(name)[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


class Inspected:
    """One checkpoint or folder, open; `source` gives its tensors.

    Args:
        path: a Hugging Face folder, Megatron's `--save` folder, or a step folder.
        step: an iteration of a `--save` folder, or None for the last finished one.

    Raises:
        CheckpointError: it is neither, or damaged.
        UsageError: `step` for a Hugging Face folder, which has none.
    """

    def __init__(self, path: Path, step: int | None = None) -> None:
        self.checkpoint: Checkpoint | None = None
        self.source: TensorSource
        if (path / CONFIG_NAME).is_file():
            if step is not None:
                raise UsageError(f"--step {step}: {path} is a Hugging Face folder, which holds one step")
            self.folder = path
            self.config = read_config(path)
            self.source = HfSource(HfWeights.open(path))
        else:
            self.checkpoint = Checkpoint.open(path, step)
            self.folder, self.source = self.checkpoint.folder, self.checkpoint

    def describe(self) -> dict[str, Any]:
        """What it holds, in plain values."""
        if self.checkpoint is not None:
            return describe.describe_checkpoint(self.checkpoint)
        rows = self.tensors()
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        ledom = self.config.get("ledom")
        ledom = ledom if isinstance(ledom, dict) else {}
        dtypes = sorted({row["dtype"] for row in rows})
        elements, num_bytes = sum(math.prod(row["shape"]) for row in rows), sum(row["bytes"] for row in rows)
        return {
            "kind": "Hugging Face folder",
            "folder": str(self.folder),
            "step": ledom.get("iteration"),
            "direction": ledom.get("direction"),
            "tokenizer": {"fingerprint": ledom.get("tokenizer_fingerprint")},
            "model": {name: value for name, value in self.config.items() if name != "ledom"},
            "dtype": self.config.get("dtype", self.config.get("torch_dtype")),
            "num_parameters": elements,
            "groups": {
                "weights": {"tensors": len(rows), "elements": elements, "bytes": num_bytes, "dtypes": dtypes},
            },
            "num_files": len(files),
            "bytes_on_disk": sum(path.stat().st_size for path in files),
            "checksums": None if (sums := read_sums(self.folder)) is None else len(sums),
        }

    def tensors(self) -> list[dict[str, Any]]:
        """Name, group, shape, dtype and bytes of every tensor."""
        if self.checkpoint is not None:
            return describe.tensor_table(self.checkpoint)
        return [
            {
                "name": name,
                "group": "weights",
                "shape": list(self.source.shape(name)),
                "dtype": str(self.source.dtype(name)).removeprefix("torch."),
                "bytes": math.prod(self.source.shape(name)) * self.source.dtype(name).itemsize,
                "chunks": 1,
            }
            for name in self.source.tensor_names()
        ]

    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments, or config.json."""
        return self.config if self.checkpoint is None else describe.saved_arguments(self.checkpoint.args)

    def unreadable(self) -> list[str]:
        """Read every tensor; return what cannot be read, one line each."""
        if self.checkpoint is not None:
            return describe.unreadable_tensors(self.checkpoint)
        faults = []
        for name in self.source.tensor_names():
            try:
                self.source.read_box(name, *self.source.boxes(name)[0])
            except CheckpointError as error:
                faults.append(str(error))
        return faults


def inspect(
    path: Path, step: int | None = None, *, tensors: bool = False, verify: bool = False, other: Path | None = None
) -> dict[str, Any]:
    """Describe what is at `path`, and check or compare it.

    Args:
        path: a Hugging Face folder, Megatron's `--save` folder, or a step folder.
        step: an iteration, or None for the last finished one.
        tensors: list every tensor.
        verify: compare every file with its checksum, then read every tensor.
        other: what to compare with.

    Returns:
        The description; with `tensors` (a list), `verify` ({"has_checksums", "faults"}) and `diff`
        (see `compare`) where asked for.

    Raises:
        CheckpointError: it cannot be opened; a damaged file is a fault of `verify` where that was asked for.
    """
    faults: list[str] | None = None
    if verify:
        faults = _file_faults(path, step)
    try:
        inspected = Inspected(path, step)
    except CheckpointError as error:
        if not faults:
            raise
        return {"folder": str(path), "verify": {"has_checksums": True, "faults": [*faults, str(error)]}}
    found = inspected.describe()
    if tensors:
        found["tensors"] = inspected.tensors()
    if verify:
        found["verify"] = {"has_checksums": faults is not None, "faults": [*(faults or []), *inspected.unreadable()]}
    if other is not None:
        found["diff"] = compare(inspected, Inspected(other))
    return found


def inspection_json(found: dict[str, Any]) -> str:
    """A result of `inspect` as JSON; what is not finite becomes "inf" or "nan", for which JSON has no number."""
    return json.dumps(describe.plain(found, max_values=10**7), indent=2)


def compare(first: Inspected, second: Inspected) -> dict[str, Any]:
    """Compare arguments and tensors of two checkpoints, or of two folders.

    Returns:
        Every difference, and `is_equal`: the same tensors bit for bit, and the same meaning (of a checkpoint's
        arguments those that `meaning_differs` looks at; paths and dates of a run may differ. Of a folder all of
        config.json).

    Raises:
        UsageError: one is a checkpoint and the other is not, so that no names are comparable.
        CheckpointError: one is damaged.
    """
    if (first.checkpoint is None) != (second.checkpoint is None):
        raise UsageError(
            f"{first.folder} and {second.folder}: one is a Megatron checkpoint and one a Hugging Face folder, whose "
            "tensors are packed and named differently. Convert one of them (tools/convert_to_hf.py compares on its own)"
        )
    tensors = diff_tensors(first.source, second.source)
    arguments = diff_values(first.arguments(), second.arguments())
    is_folder = first.checkpoint is None
    has_other_meaning = bool(arguments) if is_folder else meaning_differs(first.arguments(), second.arguments())
    is_equal = tensors.is_equal and not has_other_meaning
    return {"other": str(second.folder), "is_equal": is_equal, "arguments": arguments, **asdict(tensors)}


def meaning_differs(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether the same weights compute different functions, or on other ids, under two sets of Megatron's arguments.

    An argument of `REQUIREMENTS` that one side lacks has there the value of a Llama: Megatron did that before it had
    the argument. What is in `describe.BESIDE` counts only where one side sets the argument that it belongs to.
    """
    llama = {name: values[0] for name, values, _ in REQUIREMENTS}
    differing = diff_values(llama | first, llama | second)
    without_say = {name for name, owner in describe.BESIDE.items() if not first.get(owner) and not second.get(owner)}
    return not differing.keys().isdisjoint({*describe.MEANING, *llama} - without_say)


def read_sums(folder: Path) -> dict[str, str] | None:
    """Return file name to SHA-256 from SHA256SUMS; None where there is none.

    Raises:
        CheckpointError: it is damaged, or names a file outside the folder.
    """
    path = folder / SUMS_NAME
    if not path.is_file():
        return None
    sums = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    for number, line in enumerate(lines, 1):
        sha256, separator, name = line.partition(" ")
        name = name[1:] if name[:1] in {" ", "*"} else name
        if not separator or len(sha256) != 64 or not name or "\0" in name:
            raise CheckpointError(f"{path}:{number}: not a line of sha256sum: {line[:80]!r}")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path}:{number} is refused: it names {name!r}, outside the folder")
        sums[name] = sha256.lower()
    return sums


def _file_faults(path: Path, step: int | None) -> list[str] | None:
    """What the checksums say; None where there are none."""
    if not (path / CONFIG_NAME).is_file():
        return find_faults(find_checkpoint(path, step))
    sums = read_sums(path)
    if sums is None:
        return None
    faults = []
    for name, sha256 in sums.items():
        try:
            if (path / name).exists() and not (path / name).is_file():  # reading a pipe would never end
                faults.append(f"{path / name} is no file")
            elif hash_file(path / name) != sha256:
                faults.append(f"{path / name} has changed since it was written: another SHA-256")
        except OSError as error:
            faults.append(f"{path / name} cannot be read: {error.strerror}")
    added = sorted(file.name for file in path.glob("*.safetensors") if file.name not in sums)
    return faults + [f"{path / name} was not there when the folder was written" for name in added]
