"""What the row-wise operations share: which kernels take a call, and its arguments for the C interface.

They are SwiGLU, RMSNorm and cross entropy (`csrc/layers`). A row is the last axis of a tensor; its other axes are
counted together.
"""

from __future__ import annotations

import math

import torch

from megatron_ledom.ops.kernels import dtype_code
from megatron_ledom.ops.path import CPU_KERNELS, choose_path


def row_kernels(x: torch.Tensor, wish: str) -> str | None:
    """The path of the kernels that take a call with `x`; None where torch computes it, an empty tensor included.

    Raises:
        UsageError: `wish` names a path that cannot serve it.
    """
    name = choose_path(x.device, x.dtype, wish).name
    return name if name in CPU_KERNELS and x.numel() else None


def row_shape(x: torch.Tensor, width: int) -> list[int]:
    """dtype, number of threads, rows and width of a row, as the C interface wants them.

    Args:
        x: contiguous, [..., its last axis].
        width: what the kernel calls the width of a row; not always the last axis.
    """
    assert x.is_contiguous(), x.stride()
    return [dtype_code(x.dtype), torch.get_num_threads(), math.prod(x.shape[:-1]), width]
