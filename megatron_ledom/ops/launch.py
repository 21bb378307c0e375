"""Kernels called on tensors that are there already: no allocation, no choice of path, no autograd.

Legend: B batch, S sequence, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from megatron_ledom.ops.conformance import Problem, Results, Rotation
from megatron_ledom.ops.kernels import as_argument, as_call, cuda_variants, kernels
from megatron_ledom.ops.mask import Documents


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Make the GPU of a tensor torch's current one for a while; nothing on the CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def launch_forward(
    qkv: Sequence[torch.Tensor],
    o_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    documents: Documents | None,
    reach: list[int],
    scale: float,
    path: str,
) -> None:
    """Write the output and the rows' logarithms.

    Args:
        qkv: [B, S, H, D] and twice [B, S, G, D], aligned as the path asks (`kernels.rows_aligned`).
        o_BSHD: output.
        lse_BHS: fp32.
        documents: on the device of the others.
        reach: `AttentionMask.reach`.
        scale: of the scores.
        path: one of `path.CPU_KERNELS` or `path.CUDA_KERNELS`.

    Raises:
        ValueError: the kernel refuses them, or is for another device.
        RuntimeError: CUDA reports an error.
    """
    q, k, _ = qkv
    _check_place(q, path)
    with on_device_of(q):
        call = as_call(q, k.shape[2], reach, documents, scale)
        kernels().attention_forward(call, [as_argument(x) for x in (*qkv, o_BSHD)], lse_BHS.data_ptr(), path)


def launch_backward(
    qkvo: Sequence[torch.Tensor],
    lse_BHS: torch.Tensor,
    d_o_BSHD: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    delta_BHS: torch.Tensor,
    documents: Documents | None,
    reach: list[int],
    scale: float,
    path: str,
) -> None:
    """Write the gradients of q, k and v.

    Args:
        qkvo: what forward read and wrote.
        lse_BHS: the same.
        d_o_BSHD: gradient of the output.
        gradients: of q, k and v.
        delta_BHS: fp32 scratch.
        documents: as in forward.
        reach: as in forward.
        scale: as in forward.
        path: as in forward.

    Raises:
        ValueError: the kernel refuses them, or is for another device.
        RuntimeError: CUDA reports an error.
    """
    q, k = qkvo[:2]
    _check_place(q, path)
    with on_device_of(q):
        kernels().attention_backward(
            as_call(q, k.shape[2], reach, documents, scale),
            [as_argument(x) for x in qkvo],
            lse_BHS.data_ptr(),
            [as_argument(x) for x in (d_o_BSHD, *gradients)],
            delta_BHS.data_ptr(),
            path,
        )


def _check_place(x: torch.Tensor, path: str) -> None:
    """Keep the addresses of one device from the kernels of another."""
    wanted = "cuda" if path in {variant.name for variant in cuda_variants()} else "cpu"
    if x.device.type != wanted:
        raise ValueError(f"path {path!r} is for tensors on {wanted}, and these are on {x.device.type}")


def run_poisoned(problem: Problem, path: str) -> Results:
    """Forward and backward of a path into outputs that are NaN before; what stays NaN was not written."""
    q = problem.q
    batch, seq, heads, head_dim = q.shape
    mask, reach = problem.mask, list(problem.mask.reach(seq))
    scale = 1 / math.sqrt(head_dim)
    o, d_q, d_k, d_v = (torch.full_like(x, math.nan) for x in (q, *problem.inputs))
    # The kernels write fp32, whatever torch's default dtype.
    lse, delta = (torch.full((batch, heads, seq), math.nan, dtype=torch.float32, device=q.device) for _ in range(2))
    launch_forward(problem.inputs, o, lse, mask.documents, reach, scale, path)
    gradients = (d_q, d_k, d_v)
    launch_backward((*problem.inputs, o), lse, problem.d_o, gradients, delta, mask.documents, reach, scale, path)
    return o, lse, d_q, d_k, d_v


def launch_rope(x_BSHD: torch.Tensor, y_BSHD: torch.Tensor, rotation: Rotation) -> None:
    """Write `x` turned into `y`, which may be `x`.

    Raises:
        ValueError: the kernel refuses them, or is for another device.
        RuntimeError: CUDA reports an error.
    """
    cosines, sines = rotation.cosines, rotation.sines
    with on_device_of(x_BSHD):
        kernels().rope(
            as_call(x_BSHD, x_BSHD.shape[2], [0, 0], rotation.documents, 1.0),
            *(as_argument(x_BSHD), as_argument(y_BSHD), 2 * cosines.shape[1]),
            *(rotation.interleaved, rotation.from_end, rotation.inverse),
            *([cosines.data_ptr(), sines.data_ptr()], len(cosines), x_BSHD.is_cuda),
        )
