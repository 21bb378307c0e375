"""RMSNorm in one pass over memory: x / sqrt(mean of x^2 + eps) * weight.

    rms_norm(x, weight, eps)  the face: chooses a path
    ledom::rms_norm           the custom op behind it, with fake tensors and autograd
    ledom::rms_norm_backward  its backward; the weight's gradient does not depend on the number of threads

Legend: H the size of the normed axis.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.ops.kernels import kernels
from megatron_ledom.ops.rows import row_kernels, row_shape


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, path: str = "auto") -> torch.Tensor:
    """Norm the last axis.

    Args:
        x: [..., H].
        weight: [H]; the kernels serve it in the dtype of x only.
        eps: added to the mean square.
        path: "auto", or one of `path.PATHS`.

    Returns:
        [..., H] in the dtype of x. The kernels compute in fp32 and round once.

    Raises:
        UsageError: a weight of another size, or a path that cannot serve.
    """
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise UsageError(f"rms_norm: a weight {list(weight.shape)} does not fit the last axis of {list(x.shape)}")
    chosen = row_kernels(x, path) if weight.dtype == x.dtype else None
    if chosen is None:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    result: torch.Tensor = rms_norm_op()(x, weight, eps, chosen)[0]
    return result


@functools.cache
def rms_norm_op() -> Any:
    """Register `ledom::rms_norm` and its backward at first use; returns the former.

    Its arguments: x [..., H], weight [H], eps, path. It returns the normed rows and fp32 [...], each row's factor
    1 / sqrt(mean square + eps), which takes no gradient.
    """
    backward_op = rms_norm_backward_op()

    @torch.library.custom_op("ledom::rms_norm", mutates_args=(), device_types="cpu")
    def forward(x: torch.Tensor, weight: torch.Tensor, eps: float, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = x.contiguous(), weight.contiguous()
        y, scale = _empty_results(x)
        kernels().rms_norm_forward_cpu(
            row_shape(x, x.shape[-1]), eps, x.data_ptr(), weight.data_ptr(), y.data_ptr(), scale.data_ptr(), path
        )
        return y, scale

    @forward.register_fake
    def fake(x: Any, weight: Any, eps: Any, path: Any) -> Any:
        return _empty_results(x)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.path = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, d_y: Any, _d_scale: Any) -> Any:
        return *backward_op(d_y, *ctx.saved_tensors, ctx.path), None, None

    forward.register_autograd(differentiate, setup_context=keep)
    return forward


@functools.cache
def rms_norm_backward_op() -> Any:
    """Register `ledom::rms_norm_backward` at first use and return it: the gradients of x and weight."""

    @torch.library.custom_op("ledom::rms_norm_backward", mutates_args=(), device_types="cpu")
    def backward(
        d_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, path: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of x and weight."""
        d_y, x, weight = d_y.contiguous(), x.contiguous(), weight.contiguous()
        gradients = torch.empty_like(x), torch.empty_like(weight)
        kernels().rms_norm_backward_cpu(
            row_shape(x, x.shape[-1]),
            [tensor.data_ptr() for tensor in (x, weight, scale, d_y)],
            [tensor.data_ptr() for tensor in gradients],
            path,
        )
        return gradients

    @backward.register_fake
    def fake(d_y: Any, x: Any, weight: Any, scale: Any, path: Any) -> Any:
        return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))

    return backward


def _empty_results(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
