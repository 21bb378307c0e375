"""Rotary positions counted from a document's end (a reverse model in natural order) or from its beginning.

    position   from the end        token   Once upon a  time        two documents   a b c | d e
                                             3    2   1   0                         2 1 0   1 0
               from the beginning            0    1   2   3                         0 1 2   0 1

Legend: B batch, S sequence, H heads, D head dim, R rotary dim, P positions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.ops.conformance import Rotation
from megatron_ledom.ops.fallback import torch_rope
from megatron_ledom.ops.kernels import empty_like_rows, rows_contiguous
from megatron_ledom.ops.launch import launch_rope
from megatron_ledom.ops.mask import Documents, check_documents
from megatron_ledom.ops.path import TORCH, choose_rope_path, fault_of_rope
from megatron_ledom.ops.reference import positions


def rope(
    x_BSHD: torch.Tensor,
    cosines_PR: torch.Tensor,
    sines_PR: torch.Tensor,
    *,
    from_end: bool,
    documents: Documents | None = None,
    interleaved: bool = False,
    inverse: bool = False,
    path: str = "auto",
) -> torch.Tensor:
    """Turn each pair of the first R elements by the angle of the token's position; copy the others.

    Args:
        x_BSHD: queries or keys, any strides.
        cosines_PR: fp32 [P, R / 2], as `reference.rope_tables` gives them.
        sines_PR: the same.
        from_end: count positions from the last token of a document instead of its first.
        documents: None: a sequence is one document.
        interleaved: pairs are (2d, 2d + 1) instead of (d, d + R / 2).
        inverse: turn back, which is also the gradient.
        path: "auto", or one of `path.PATHS`.

    Raises:
        UsageError: tables that are too short, too wide, not fp32, or on another device; documents of another shape,
            dtype or device; or a path that cannot serve.
    """
    batch, seq = x_BSHD.shape[:2]
    _check_tables(x_BSHD, cosines_PR, sines_PR)
    check_documents(documents, batch, seq, x_BSHD.device, "rotary positions")
    fault = fault_of_rope(x_BSHD, cosines_PR)
    if choose_rope_path(x_BSHD.device, x_BSHD.dtype, path, fault=fault).name == TORCH:
        at = positions(documents, batch, seq, from_end=from_end, device=x_BSHD.device)
        return torch_rope(x_BSHD, cosines_PR[at], sines_PR[at], interleaved=interleaved, inverse=inverse)
    first, last = (None, None) if documents is None else (documents.first, documents.last)
    turned: torch.Tensor = rope_op()(x_BSHD, cosines_PR, sines_PR, first, last, from_end, interleaved, inverse)
    return turned


def _check_tables(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
    _, seq, _, head_dim = x.shape
    is_fitting = cosines.ndim == 2 and len(cosines) >= seq and 2 * cosines.shape[1] <= head_dim
    if not is_fitting or cosines.shape != sines.shape:
        raise UsageError(
            f"rotary tables {list(cosines.shape)} and {list(sines.shape)} do not fit {seq} tokens of head size "
            f"{head_dim}: they are [positions, R / 2], at least {seq} x at most {head_dim // 2}"
        )
    if not cosines.dtype == sines.dtype == torch.float32:
        raise UsageError(f"rotary tables are {cosines.dtype} and {sines.dtype}: give float32, whatever the dtype of x")
    if not cosines.device == sines.device == x.device:
        raise UsageError(f"rotary tables are on {cosines.device} and {sines.device}, x on {x.device}")


@functools.cache
def rope_op() -> Any:
    """Register `ledom::rope` at first use and return it; its gradient is itself, turning the other way."""

    @torch.library.custom_op("ledom::rope", mutates_args=(), device_types=("cpu", "cuda"))
    def turn(
        x: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        first: torch.Tensor | None,
        last: torch.Tensor | None,
        from_end: bool,
        interleaved: bool,
        inverse: bool,
    ) -> torch.Tensor:
        """Turn x by its positions."""
        x, cosines, sines = rows_contiguous(x), cosines.contiguous(), sines.contiguous()
        turned = empty_like_rows(x)
        documents = None if first is None or last is None else Documents(first.contiguous(), last.contiguous())
        launch_rope(x, turned, Rotation(cosines, sines, documents, from_end, interleaved, inverse))
        return turned

    @turn.register_fake
    def fake(x: Any, *_: Any) -> Any:
        return empty_like_rows(rows_contiguous(x))

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        _, *tensors, ctx.from_end, ctx.interleaved, ctx.inverse = inputs
        ctx.save_for_backward(*tensors)

    def differentiate(ctx: Any, d_turned: Any) -> Any:
        d_x = turn(d_turned, *ctx.saved_tensors, ctx.from_end, ctx.interleaved, not ctx.inverse)
        return d_x, None, None, None, None, None, None, None

    turn.register_autograd(differentiate, setup_context=keep)
    return turn
