"""Two sets of tensors, compared by name: what only one has, what has another shape, and how far apart the values are.

It compares anything that gives tensors by name (`TensorSource`), box by box, so that two
boxes are in memory and no whole tensor needs to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from megatron_ledom.log import Progress

if TYPE_CHECKING:
    import torch

_QUIET_BYTES = 2**30


class TensorSource(Protocol):
    """Tensors by name, readable in boxes."""

    def tensor_names(self) -> list[str]:
        """Every name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""

    def boxes(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """How the tensor is cut in the files: (offsets, sizes) of each part."""

    def read_box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """The part of the tensor that begins at `offsets`."""


@dataclass
class TensorsDiff:
    """How two sources differ.

    Attributes:
        only_first: names that the second lacks.
        only_second: names that the first lacks.
        shapes: name -> both shapes, where they differ.
        dtypes: name -> both dtypes, where they differ.
        values: name -> largest absolute difference, Frobenius norm of the difference over the first's, and whether
            every bit is equal; of each tensor with the same shape in both.
    """

    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    shapes: dict[str, list[list[int]]] = field(default_factory=dict)
    dtypes: dict[str, list[str]] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same names with the same bits."""
        has_other_form = self.only_first or self.only_second or self.shapes or self.dtypes
        return not has_other_form and all(value["bitwise_equal"] for value in self.values.values())


def diff_tensors(first: TensorSource, second: TensorSource) -> TensorsDiff:
    """Compare every tensor of two sources.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    names, others = first.tensor_names(), set(second.tensor_names())
    diff = TensorsDiff(sorted(set(names) - others), sorted(others - set(names)))
    common = [name for name in names if name in others]
    total = sum(math.prod(first.shape(name)) * first.dtype(name).itemsize for name in common)
    progress = Progress("compare", total / 1e6, "MB") if total >= _QUIET_BYTES else None
    for name in common:
        if first.shape(name) != second.shape(name):
            diff.shapes[name] = [list(first.shape(name)), list(second.shape(name))]
            continue
        if first.dtype(name) != second.dtype(name):
            diff.dtypes[name] = [str(s.dtype(name)).removeprefix("torch.") for s in (first, second)]
        diff.values[name] = _distance(first, second, name, progress)
    if progress:
        progress.close()
    return diff


def diff_values(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[Any]]:
    """Return key -> both values, for the keys whose values differ; a key that is not there counts as None."""
    keys = sorted({*first, *second})
    return {key: [first.get(key), second.get(key)] for key in keys if first.get(key) != second.get(key)}


def _distance(first: TensorSource, second: TensorSource, name: str, progress: Progress | None) -> dict[str, Any]:
    largest, squares, norm, is_equal = 0.0, 0.0, 0.0, True
    for offsets, sizes in first.boxes(name):
        one, other = first.read_box(name, offsets, sizes), second.read_box(name, offsets, sizes)
        has_same_bits = _has_same_bits(one, other)
        is_equal = is_equal and has_same_bits
        if one.numel():
            wide = _wide(one)
            norm += float(wide.norm()) ** 2
        if one.numel() and not has_same_bits:  # equal bits differ by 0, also where they are NaN
            difference = wide.sub_(_wide(other))
            squares += float(difference.norm()) ** 2
            largest = _larger(largest, float(difference.abs_().max()))
        if progress:
            progress.update(one.nbytes / 1e6)
    relative = 0.0 if squares == 0 else math.inf if norm == 0 else math.sqrt(squares / norm)
    return {"max_abs_difference": largest, "relative_frobenius": relative, "bitwise_equal": is_equal}


def _larger(a: float, b: float) -> float:
    """The larger of two; NaN, once met, stays."""
    return a if math.isnan(a) or a > b else b


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in fp32 or wider, in which a difference of two 16-bit numbers is exact to rounding."""
    import torch

    return tensor.to(torch.float32 if tensor.is_floating_point() and tensor.itemsize < 8 else torch.float64, copy=True)


def _has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    if one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))
