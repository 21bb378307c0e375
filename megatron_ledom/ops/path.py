"""Which path an attention call takes, and why: one function decides.

cpu     the fused kernels of csrc/ for this processor
torch   flip (for a reversed-causal mask) and scaled_dot_product_attention; an explicit mask for all other masks

"auto" takes the best kernels that the build and the processor have in common, and torch where there are none. One case
is torch's although there are kernels: bf16 on a processor that multiplies bf16 matrices in hardware (AMX), which the
kernels do not use, with large heads and a mask that skips no tiles (benchmarks/results/attention.json).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.ops.kernels import cpu_paths, load_kernels

TORCH = "torch"
CPU_KERNELS = ("avx512", "avx2", "portable")
PATHS = (*CPU_KERNELS, TORCH)
AMX_HEAD_DIM = 128
"""From this head size on, torch's bf16 is faster than the kernels where there is AMX: 1.5 to 2.3 times at 128."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


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
    device: torch.device, dtype: torch.dtype, wish: str = "auto", *, head_dim: int = 0, is_plain: bool = False
) -> Path:
    """Decide which path an attention call takes.

    Args:
        device: of the tensors.
        dtype: of the tensors.
        wish: "auto", or one of `PATHS`.
        head_dim: D.
        is_plain: whether the mask is causal or reversed-causal over whole sequences.

    Raises:
        UsageError: `wish` names a path that cannot serve this call.
    """
    if wish not in ("auto", *PATHS):
        raise UsageError(f"attention path {wish!r}: known are auto, {', '.join(PATHS)}")
    if wish == TORCH:
        return Path(TORCH, "asked for")
    fault = _fault_of_kernels(device, dtype)
    if wish == "auto":
        has_faster_torch = is_plain and head_dim >= AMX_HEAD_DIM and dtype == torch.bfloat16
        if not fault and has_faster_torch and torch.cpu._is_amx_tile_supported():
            fault = f"torch multiplies bf16 by AMX, which is faster for head size {head_dim} and a mask without gaps"
        return Path(TORCH, fault) if fault else Path(cpu_paths()[0], "the best of this build on this processor")
    if fault is None and wish not in cpu_paths():
        fault = f"this build has {', '.join(cpu_paths())} on this processor"
    if fault:
        raise UsageError(f"attention path {wish!r} cannot serve this call: {fault}")
    return Path(wish, "asked for")


def _fault_of_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve a call; None where they can."""
    if device.type != "cpu":
        return f"tensors are on {device.type}, and the kernels of this build run on the CPU"
    if dtype not in KERNEL_DTYPES:
        return f"there is no kernel for {dtype}"
    found = load_kernels()
    return found if isinstance(found, str) else None
