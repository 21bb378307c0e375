"""The compiled kernels of `csrc/`: whether they are here, what they hold, and tensors turned into their arguments.

It owns the border between torch and the C interface. Which path a call takes is decided in `path`.
"""

from __future__ import annotations

import functools
import importlib
import platform
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron_ledom.ops.mask import Documents

ABI_VERSION = 2
"""`LEDOM_ABI_VERSION` of csrc/reversed_attention/params.h."""

FUNCTIONS = (
    *("abi_version", "compiler", "cpu_paths", "cuda_compiler", "cuda_source_hash", "cuda_variants", "cuda_versions"),
    *("Call", "attention_forward", "attention_backward", "rope"),
    *("swiglu_forward_cpu", "swiglu_backward_cpu", "rms_norm_forward_cpu", "rms_norm_backward_cpu"),
    *("cross_entropy_forward_cpu", "cross_entropy_backward_cpu"),
)
"""What this package calls of the extension. A build from before one of them has the same interface number: that counts
the layouts of structures, and grew no further when functions came."""

REBUILD = "build it with `python setup.py build_ext --inplace` (it needs a C++17 compiler with OpenMP)"
REBUILD_WITH_CUDA = "build it with `LEDOM_CUDA=required python setup.py build_ext --inplace` (it needs nvcc)"
COPY_BYTES = 16
"""What the CUDA attention kernels move at once, and so the alignment of their rows."""


@dataclass(frozen=True)
class Variant:
    """A set of CUDA attention kernels; a capability is 10 * major + minor, both ends are included."""

    name: str
    least_capability: int
    most_capability: int

    def fault_on(self, capability: int) -> str | None:
        """Why a GPU of this capability cannot run it; None where it can."""
        if self.least_capability <= capability <= self.most_capability:
            return None
        ends = (self.least_capability, self.most_capability)
        wanted = " to ".join(sorted({f"{end // 10}.{end % 10}" for end in ends}, key=float))
        return f"{self.name} is for capability {wanted}, and this GPU has {capability // 10}.{capability % 10}"


ROPE_KERNEL = Variant("sm80", 80, 129)
"""Rotary positions have one CUDA kernel, which every GPU runs that the sm_80 attention kernels run on."""


@functools.cache
def load_kernels() -> ModuleType | str:
    """Return the extension, or why there is none."""
    try:
        module = importlib.import_module("megatron_ledom.ops._kernels")
    except ImportError as error:
        return f"the extension megatron_ledom.ops._kernels cannot be imported ({error}): {REBUILD}"
    if module.abi_version() != ABI_VERSION:
        return f"the extension has interface {module.abi_version()}, this package needs {ABI_VERSION}: {REBUILD}"
    if missing := [name for name in FUNCTIONS if not hasattr(module, name)]:
        return f"the extension is of an older source, it has no {', '.join(missing)}: {REBUILD}"
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


@functools.cache
def cuda_variants() -> tuple[Variant, ...]:
    """The CUDA attention kernels that the extension holds, fastest first; () where it was built without CUDA."""
    found = load_kernels()
    return () if isinstance(found, str) else tuple(Variant(*each) for each in found.cuda_variants())


def describe_kernels() -> str:
    """What the installed extension holds and what of it this machine can run, for people."""
    found = load_kernels()
    if isinstance(found, str):
        return f"kernels: none; {found}"
    return (
        f"kernels: interface {found.abi_version()}, compiled by {found.compiler()} for {platform.machine()}; "
        f"on this processor: {', '.join(cpu_paths())}; {describe_cuda()}"
    )


def describe_cuda() -> str:
    """The CUDA part of the extension, for people."""
    if not cuda_variants():
        return f"CUDA kernels: not in this build; {REBUILD_WITH_CUDA}"
    found = kernels()
    runtime, driver = (f"{v // 1000}.{v % 1000 // 10}" for v in found.cuda_versions())
    serves = f"this machine's driver serves CUDA {driver}" if driver != "0.0" else "this machine has no CUDA driver"
    names = ", ".join(variant.name for variant in cuda_variants())
    return (
        f"CUDA kernels: {names} and rope, of source {found.cuda_source_hash()[:12]} by {found.cuda_compiler()} with "
        f"runtime {runtime}; {serves}"
    )


def as_argument(x_BSHD: torch.Tensor) -> list[int]:
    """A tensor [B, S, H, D] for the C interface: its address and the strides of B, S and H, in elements."""
    assert x_BSHD.ndim == 4 and (x_BSHD.stride(3) == 1 or x_BSHD.shape[3] == 1), (x_BSHD.shape, x_BSHD.stride())
    # An axis of one element is never stepped along, and torch gives it any stride.
    strides = [stride if size > 1 else 0 for stride, size in zip(x_BSHD.stride()[:3], x_BSHD.shape[:3], strict=True)]
    return [x_BSHD.data_ptr(), *strides]


def as_documents(documents: Documents | None) -> list[int]:
    """The addresses of the two document arrays; zeros without documents."""
    if documents is None:
        return [0, 0]
    for bounds in (documents.first, documents.last):
        assert bounds.is_contiguous() and bounds.element_size() == 4, (bounds.dtype, bounds.stride())
    return [documents.first.data_ptr(), documents.last.data_ptr()]


def dtype_code(dtype: torch.dtype) -> int:
    """The number of a dtype in `enum ledom_dtype` of csrc/reversed_attention/params.h."""
    import torch

    return {torch.float32: 0, torch.bfloat16: 1}[dtype]


def as_call(x_BSHD: torch.Tensor, kv_heads: int, reach: list[int], documents: Documents | None, scale: float) -> Any:
    """What a call is about, for the C interface: sizes, mask, scale, and where it runs.

    On CUDA that is torch's current stream of the tensor's device.
    """
    import torch

    batch, seq, heads, head_dim = x_BSHD.shape
    device, stream = 0, 0
    if x_BSHD.is_cuda:
        device, stream = x_BSHD.device.index, torch.cuda.current_stream(x_BSHD.device).cuda_stream
    code = dtype_code(x_BSHD.dtype)
    sizes = [batch, seq, heads, kv_heads, head_dim]
    threads = torch.get_num_threads()
    return kernels().Call(code, sizes, reach, as_documents(documents), scale, threads, device, stream)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where its last axis is contiguous, a copy elsewhere: all that the kernels ask of strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_like_rows(x_BSHD: torch.Tensor) -> torch.Tensor:
    """An empty tensor like `x`, its axes in memory in the order of x's (so that Megatron's [S, B, H, D] stays one)."""
    import torch

    if x_BSHD.stride(0) < x_BSHD.stride(1):
        return torch.empty_like(x_BSHD.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1)
    return torch.empty_like(x_BSHD, memory_format=torch.contiguous_format)


def rows_aligned(x_BSHD: torch.Tensor) -> torch.Tensor:
    """`x` itself where the kernels of its device can read its rows, a copy with its axes in the same order elsewhere.

    On the CPU any strides will do; the CUDA attention kernels copy 16 bytes at a time.
    """
    x = rows_contiguous(x_BSHD)
    if not x.is_cuda:
        return x
    strides = [stride * x.element_size() for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    # A stride of 0, an expanded axis, is none that a tensor map of Hopper's can have.
    if x.data_ptr() % COPY_BYTES == 0 and all(stride > 0 and stride % COPY_BYTES == 0 for stride in strides):
        return x
    return empty_like_rows(x).copy_(x)
