"""The compiled kernels of `csrc/`: whether they are here, what they hold, and tensors turned into their arguments.

It owns the border between torch and the C interface. Which path a call takes is decided in `path`.
"""

from __future__ import annotations

import functools
import importlib
import platform
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megatron_ledom.ops.mask import Documents

ABI_VERSION = 2
"""`LEDOM_ABI_VERSION` of csrc/reversed_attention/params.h."""

REBUILD = "build it with `python setup.py build_ext --inplace` (it needs a C++17 compiler with OpenMP)"


@functools.cache
def load_kernels() -> ModuleType | str:
    """Return the extension, or why there is none."""
    try:
        module = importlib.import_module("megatron_ledom.ops._kernels")
    except ImportError as error:
        return f"the extension megatron_ledom.ops._kernels cannot be imported ({error}): {REBUILD}"
    if module.abi_version() != ABI_VERSION:
        return f"the extension has interface {module.abi_version()}, this package needs {ABI_VERSION}: {REBUILD}"
    return module


def kernels() -> ModuleType:
    """Return the extension.

    Raises:
        RuntimeError: it is not there; a caller has looked (`load_kernels`) before.
    """
    found = load_kernels()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@functools.cache
def cpu_paths() -> tuple[str, ...]:
    """The instruction sets that the extension and this processor have in common, best first; () without extension."""
    found = load_kernels()
    return () if isinstance(found, str) else tuple(found.cpu_paths().split(","))


def describe_kernels() -> str:
    """What the installed extension holds and what of it this machine can run, for people."""
    found = load_kernels()
    if isinstance(found, str):
        return f"kernels: none; {found}"
    return (
        f"kernels: interface {found.abi_version()}, compiled by {found.compiler()} for {platform.machine()}; "
        f"on this processor: {', '.join(cpu_paths())}"
    )


def as_argument(x_BSHD: torch.Tensor) -> list[int]:
    """A tensor [B, S, H, D] for the C interface: its address and the strides of B, S and H, in elements."""
    assert x_BSHD.ndim == 4 and (x_BSHD.stride(3) == 1 or x_BSHD.shape[3] == 1), (x_BSHD.shape, x_BSHD.stride())
    return [x_BSHD.data_ptr(), *x_BSHD.stride()[:3]]


def as_documents(documents: Documents | None) -> list[int]:
    """The addresses of the two document arrays; zeros without documents."""
    if documents is None:
        return [0, 0]
    for bounds in (documents.first, documents.last):
        assert bounds.is_contiguous() and bounds.element_size() == 4, (bounds.dtype, bounds.stride())
    return [documents.first.data_ptr(), documents.last.data_ptr()]


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where its last axis is contiguous, a copy elsewhere: all that the kernels ask of strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
