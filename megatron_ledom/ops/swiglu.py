"""SwiGLU in one pass over memory: silu(gate) * up, the last axis being [gate, up] as Megatron's `linear_fc1` gives it.

    swiglu(x)               the face: chooses a path
    ledom::swiglu           the custom op behind it, with fake tensors and autograd
    ledom::swiglu_backward  its backward, which computes the sigmoid again: only x is kept

Legend: F the size of gate and up, each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.ops.kernels import kernels
from megatron_ledom.ops.rows import row_kernels, row_shape


def swiglu(x: torch.Tensor, path: str = "auto") -> torch.Tensor:
    """Compute silu(gate) * up.

    Args:
        x: [..., 2 F].
        path: "auto", or one of `path.PATHS`.

    Returns:
        [..., F] in the dtype of x. The kernels compute in fp32 and round once.

    Raises:
        UsageError: an odd last axis, or a path that cannot serve.
    """
    if x.ndim == 0 or x.shape[-1] % 2:
        raise UsageError(f"swiglu: the last axis of {list(x.shape)} is no gate beside an up of the same size")
    chosen = row_kernels(x, path)
    if chosen is None:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    result: torch.Tensor = swiglu_op()(x, chosen)
    return result


@functools.cache
def swiglu_op() -> Any:
    """Register `ledom::swiglu` and its backward at first use; returns the former, of x [..., 2 F] and a path."""
    backward_op = swiglu_backward_op()

    @torch.library.custom_op("ledom::swiglu", mutates_args=(), device_types="cpu")
    def forward(x: torch.Tensor, path: str) -> torch.Tensor:
        x, y = x.contiguous(), _empty_result(x)
        kernels().swiglu_forward_cpu(row_shape(x, y.shape[-1]), x.data_ptr(), y.data_ptr(), path)
        return y

    @forward.register_fake
    def fake(x: Any, path: Any) -> Any:
        return _empty_result(x)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.path = inputs
        ctx.save_for_backward(x)

    def differentiate(ctx: Any, d_y: Any) -> Any:
        return backward_op(d_y, *ctx.saved_tensors, ctx.path), None

    forward.register_autograd(differentiate, setup_context=keep)
    return forward


@functools.cache
def swiglu_backward_op() -> Any:
    """Register `ledom::swiglu_backward` at first use and return it: the gradient of x."""

    @torch.library.custom_op("ledom::swiglu_backward", mutates_args=(), device_types="cpu")
    def backward(d_y: torch.Tensor, x: torch.Tensor, path: str) -> torch.Tensor:
        d_y, x = d_y.contiguous(), x.contiguous()
        d_x = torch.empty_like(x)
        shape = row_shape(x, d_y.shape[-1])
        kernels().swiglu_backward_cpu(shape, x.data_ptr(), d_y.data_ptr(), d_x.data_ptr(), path)
        return d_x

    @backward.register_fake
    def fake(d_y: Any, x: Any, path: Any) -> Any:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return backward


def _empty_result(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
