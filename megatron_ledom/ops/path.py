"""Which path an attention call takes, and why: one function decides, `choose_path`.

cpu     the fused kernels of csrc/ for this processor
cuda    the fused kernels of csrc/ for this GPU, once they are verified on it (`trust`)
torch   flip (for a reversed-causal mask) and scaled_dot_product_attention; an explicit mask for all other masks

"auto" takes the best kernels that the build and the device have in common, and torch where there are none. One case is
torch's on the CPU although there are kernels: bf16 on a processor that multiplies bf16 matrices in hardware (AMX),
which the kernels do not use, with large heads and a mask that skips no tiles (benchmarks/results/attention.json). On a
GPU "auto" takes no kernels that tools/verify_kernels.py has not passed on it; by name they can be had.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.ops.kernels import (
    REBUILD_WITH_CUDA,
    ROPE_KERNEL,
    Variant,
    cpu_paths,
    cuda_variants,
    load_kernels,
)
from megatron_ledom.ops.trust import Trust, Use, attention_uses, trust_of
from megatron_ledom.ops.verification import ROPE

AUTO, TORCH = "auto", "torch"
CPU_KERNELS = ("avx512", "avx2", "portable")
CUDA_KERNELS = ("sm90a", "sm80")
PATHS = (*CPU_KERNELS, *CUDA_KERNELS, TORCH)
LEAST_SCALE = 2.0**-150
"""What is not larger than this is 0 in the fp32 that kernels take."""
AMX_HEAD_DIM = 128
"""From this head size on, torch's bf16 is faster than the kernels where there is AMX: 1.5 to 2.3 times at 128."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES, CUDA_HEAD_DIMS = (torch.bfloat16,), (64, 128, 192)
"""What the CUDA attention kernels compute."""
MAX_GRID_Y = 65_535
"""Batch rows or heads that one launch of CUDA's takes: `kMaxGridY` of csrc/reversed_attention/cuda/launch.h."""
GAPLESS = ("causal", "reversed")
"""Kinds of masks that skip no tiles, and that torch can say without writing them out."""
FASTER_TRAINING_BY_TORCH = (90,)
"""Capabilities of GPUs on which torch, flips included, was faster for gapless masks with the backward pass."""


@dataclass(frozen=True)
class Path:
    """The path of a call.

    Attributes:
        name: one of `PATHS`.
        reason: why, in words.
    """

    name: str
    reason: str


def choose_path(
    device: torch.device,
    dtype: torch.dtype,
    wish: str = AUTO,
    *,
    head_dim: int = 0,
    kind: str = "window",
    needs_grad: bool = False,
    fault: str | None = None,
) -> Path:
    """Decide which path an attention call takes.

    Args:
        device: of the tensors.
        dtype: of the tensors.
        wish: "auto", or one of `PATHS`.
        head_dim: D.
        kind: of the mask, one of `conformance.KINDS`.
        needs_grad: whether the backward pass will be wanted.
        fault: why no kernel takes the call, whatever its path (`fault_of_attention`); None where some may.

    Raises:
        UsageError: `wish` names a path that cannot serve this call.
    """
    _check_wish(wish)
    if wish == TORCH:
        return Path(TORCH, "asked for")
    if fault:
        return _torch_or_error(wish, fault)
    if device.type == "cuda":
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        if wish == AUTO and trains_faster_by_torch(_capability(_index_of(device)), kind, needs_grad, is_deterministic):
            return Path(
                TORCH, "torch is faster on this GPU with a backward pass and a mask without gaps, flips included"
            )
        return _path_on_gpu(_index_of(device), dtype, wish, head_dim, kind)
    fault = _fault_of_cpu_kernels(device, dtype)
    if wish == AUTO:
        has_faster_torch = kind in GAPLESS and head_dim >= AMX_HEAD_DIM and dtype == torch.bfloat16
        if not fault and has_faster_torch and torch.cpu._is_amx_tile_supported():
            fault = f"torch multiplies bf16 by AMX, which is faster for head size {head_dim} and a mask without gaps"
        return Path(TORCH, fault) if fault else Path(cpu_paths()[0], "the best of this build on this processor")
    return _asked_for(wish, fault)


def fault_of_attention(q_BSHD: torch.Tensor, scale: float) -> str | None:
    """Why the sizes of an attention call, or its scale, are none that kernels take; None where they may."""
    batch, _, heads, _ = q_BSHD.shape
    if not q_BSHD.numel():
        return _fault_of_empty(q_BSHD)
    if q_BSHD.device.type != "cuda":
        return None
    if batch > MAX_GRID_Y or heads > MAX_GRID_Y:
        return f"the CUDA kernels take at most {MAX_GRID_Y:,} batch rows and heads, not {batch:,} and {heads:,}"
    return None if scale > LEAST_SCALE else f"the CUDA kernels need a positive scale, not {scale}"


def fault_of_rope(x_BSHD: torch.Tensor, cosines_PR: torch.Tensor) -> str | None:
    """The same of a call for rotary positions; a table without a column turns nothing, and no kernel takes it."""
    if not x_BSHD.numel():
        return _fault_of_empty(x_BSHD)
    if not cosines_PR.numel():
        return f"rotary tables {list(cosines_PR.shape)} are empty: there is nothing to turn"
    if x_BSHD.device.type == "cuda" and len(x_BSHD) > MAX_GRID_Y:
        return f"the CUDA kernel takes at most {MAX_GRID_Y:,} batch rows, not {len(x_BSHD):,}"
    return None


def _fault_of_empty(x: torch.Tensor) -> str:
    return f"a tensor {list(x.shape)} is empty: there is nothing to compute"


def choose_rope_path(device: torch.device, dtype: torch.dtype, wish: str = AUTO, *, fault: str | None = None) -> Path:
    """Decide which path rotary positions take; arguments (`fault`: `fault_of_rope`) and errors as for `choose_path`."""
    _check_wish(wish)
    if wish == TORCH:
        return Path(TORCH, "asked for")
    if fault:
        return _torch_or_error(wish, fault)
    if device.type == "cuda":
        return _rope_path_on_gpu(_index_of(device), dtype, wish)
    fault = _fault_of_cpu_kernels(device, dtype)
    if wish == AUTO:
        return Path(TORCH, fault) if fault else Path(cpu_paths()[0], "the best of this build on this processor")
    return _asked_for(wish, fault)


def trains_faster_by_torch(capability: int, kind: str, needs_grad: bool, is_deterministic: bool) -> bool:
    """Whether "auto" leaves a call on a GPU to torch although kernels serve it (docs/kernels-cuda.md has the rates).

    Our backward pass gives the same bits every time, which torch's faster one does not: where torch is told to be
    deterministic, ours is taken.
    """
    return needs_grad and kind in GAPLESS and capability in FASTER_TRAINING_BY_TORCH and not is_deterministic


@functools.cache
def prepare_paths(index: int, dtype: torch.dtype, head_dim: int) -> Path:
    """Find out, together with all ranks of a run, which kernels of a GPU serve a model; later calls take those.

    Collective, once for the same arguments: all ranks call it before the first forward pass.

    Args:
        index: of this rank's GPU.
        dtype: of the model.
        head_dim: D.

    Returns:
        The best of the kernels that serve, or why none does.
    """
    is_served = dtype in CUDA_DTYPES and head_dim in CUDA_HEAD_DIMS
    trust_of(index).agree(attention_uses(CUDA_KERNELS if is_served else (), dtype, head_dim))
    return choose_path(torch.device("cuda", index), dtype, head_dim=head_dim, kind="reversed")


def choose_among(
    variants: Sequence[Variant], uses: Sequence[Use], capability: int, trust: Trust, wish: str = AUTO
) -> Path:
    """Take the first variant that runs on a GPU, is verified (or asked for by name), and is right at its first use.

    Args:
        variants: of the build, best first.
        uses: what each would be used for.
        capability: of the GPU, 10 * major + minor.
        trust: what is known of them on it.
        wish: "auto", or the name of a variant, which then need not be verified.

    Raises:
        UsageError: the variant asked for does not serve.
    """
    faults: list[str] = []
    for variant, use in zip(variants, uses, strict=True):
        if wish not in (AUTO, variant.name):
            continue
        fault = variant.fault_on(capability)
        unverified = None if fault else trust.unverified(use.part)
        if wish == AUTO:
            fault = fault or unverified
        elif unverified and not fault:
            trust.say(f"kernels {use.part}: used because path {wish!r} was asked for, although {unverified}")
        fault = fault or trust.failed(use)
        if fault is None:
            reason = "the best of this build on this GPU" if wish == AUTO else "asked for"
            return Path(variant.name, "; ".join([reason, *faults]))
        faults.append(f"{variant.name}: {fault}")
    if wish != AUTO:
        raise UsageError(f"path {wish!r} cannot serve this call: {'; '.join(faults)}")
    return Path(TORCH, "; ".join(faults))


@functools.cache
def _path_on_gpu(index: int, dtype: torch.dtype, wish: str, head_dim: int, kind: str) -> Path:
    fault = _fault_of_cuda_kernels(wish)
    if fault is None and dtype not in CUDA_DTYPES:
        fault = f"the CUDA attention kernels compute bfloat16, and the tensors are {dtype}"
    if fault is None and head_dim not in CUDA_HEAD_DIMS:
        fault = f"the CUDA attention kernels have head sizes {', '.join(map(str, CUDA_HEAD_DIMS))}, not {head_dim}"
    if fault:
        return _torch_or_error(wish, fault)
    uses = [Use(variant.name, dtype, head_dim, kind) for variant in cuda_variants()]
    return choose_among(cuda_variants(), uses, _capability(index), trust_of(index), wish)


@functools.cache
def _rope_path_on_gpu(index: int, dtype: torch.dtype, wish: str) -> Path:
    fault = _fault_of_cuda_kernels(wish)
    if fault is None and dtype not in KERNEL_DTYPES:
        fault = f"there is no kernel for {dtype}"
    if fault:
        return _torch_or_error(wish, fault)
    wish = AUTO if wish == AUTO else ROPE_KERNEL.name
    return choose_among([ROPE_KERNEL], [Use(ROPE, dtype)], _capability(index), trust_of(index), wish)


def _fault_of_cuda_kernels(wish: str) -> str | None:
    """Why no CUDA kernels can serve a call; None where some may."""
    found = load_kernels()
    if isinstance(found, str):
        return found
    names = [variant.name for variant in cuda_variants()]
    if not names:
        return f"this build has no CUDA kernels: {REBUILD_WITH_CUDA}"
    if wish not in (AUTO, *names):
        return f"for tensors on a GPU this build has {', '.join(names)}"
    return None


def _torch_or_error(wish: str, fault: str) -> Path:
    if wish == AUTO:
        return Path(TORCH, fault)
    raise UsageError(f"path {wish!r} cannot serve this call: {fault}")


def _asked_for(wish: str, fault: str | None) -> Path:
    if fault is None and wish not in cpu_paths():
        fault = f"this build has {', '.join(cpu_paths())} on this processor"
    if fault:
        raise UsageError(f"path {wish!r} cannot serve this call: {fault}")
    return Path(wish, "asked for")


def _check_wish(wish: str) -> None:
    if wish not in (AUTO, *PATHS):
        raise UsageError(f"path {wish!r}: known are auto, {', '.join(PATHS)}")


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _fault_of_cpu_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels for processors cannot serve a call; None where they can."""
    if device.type != "cpu":
        return f"tensors are on {device.type}, and there are kernels for cpu and cuda"
    if dtype not in KERNEL_DTYPES:
        return f"there is no kernel for {dtype}"
    found = load_kernels()
    return found if isinstance(found, str) else None
