"""A linear layer's products by oneDNN, on processors where torch's own are slower; fp32 on the CPU.

torch gives fp32 products to MKL. On an AMD EPYC with AVX-512, MKL takes its generic kernels (`MKL_VERBOSE=1` names no
instruction set), while oneDNN, which torch holds for other types, uses AVX-512: docs/kernels.md has the rates. The
gradient of the weight stays torch's: oneDNN would copy its transposed operand first.

Legend: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def is_onednn_faster() -> bool:
    """Whether this processor's fp32 products are oneDNN's: AVX-512, and not of the maker that MKL is tuned for."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not _has_operator():
        return False
    vendors = [line for line in CPUINFO.read_text(encoding="utf-8").splitlines() if line.startswith("vendor_id")]
    return bool(vendors) and "GenuineIntel" not in vendors[0]


def linear(x: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
    """Compute x w^T; it and its gradient of x by oneDNN.

    Args:
        x: fp32 on the CPU, [..., K].
        w_NK: the weight, fp32 on the CPU.

    Returns:
        [..., N], fp32. It differs from torch's by the order of the sums.
    """
    result: torch.Tensor = _Linear.apply(x, w_NK)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w_NK)
        return _multiply(x, w_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients that are wanted: of x by oneDNN, of the weight by torch."""
        (dy,) = grads
        x, w_NK = ctx.saved_tensors
        dx = dw_NK = None
        if ctx.needs_input_grad[0]:
            dx = _multiply(dy, w_NK.t())
        if ctx.needs_input_grad[1]:
            dy_MN, x_MK = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            dw_NK = dy_MN.t() @ x_MK
        return dx, dw_NK


def _multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Multiply x [..., K] by the transpose of w [N, K], by the operator that Inductor calls for oneDNN's product."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return product


def _has_operator() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
