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
from megatron_ledom.ops.attention import DTYPE_CODES, empty_like_rows
from megatron_ledom.ops.kernels import as_argument, as_documents, kernels, rows_contiguous
from megatron_ledom.ops.mask import Documents
from megatron_ledom.ops.path import TORCH, choose_path
from megatron_ledom.ops.reference import positions


def rope_tables(inverse_frequencies: torch.Tensor, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position's angles, fp32 [P, R / 2], computed in float64.

    Args:
        inverse_frequencies: [R / 2], radians a position.
        num_positions: P, at least the longest document.
    """
    position = torch.arange(num_positions, dtype=torch.float64, device=inverse_frequencies.device)
    angle = torch.outer(position, inverse_frequencies.double())
    return torch.cos(angle).float(), torch.sin(angle).float()


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
        cosines_PR: fp32 [P, R / 2], as `rope_tables` gives them.
        sines_PR: the same.
        from_end: count positions from the last token of a document instead of its first.
        documents: None: a sequence is one document.
        interleaved: pairs are (2d, 2d + 1) instead of (d, d + R / 2).
        inverse: turn back, which is also the gradient.
        path: "auto", or one of `path.PATHS`.

    Raises:
        UsageError: tables that are too short or too wide.
    """
    batch, seq, _, head_dim = x_BSHD.shape
    if len(cosines_PR) < seq or 2 * cosines_PR.shape[1] > head_dim or cosines_PR.shape != sines_PR.shape:
        raise UsageError(
            f"rotary tables {list(cosines_PR.shape)} and {list(sines_PR.shape)} do not fit {seq} tokens of head size "
            f"{head_dim}: they are [positions, R / 2], at least {seq} x at most {head_dim // 2}"
        )
    if choose_path(x_BSHD.device, x_BSHD.dtype, path).name == TORCH:
        at = positions(documents, batch, seq, from_end=from_end, device=x_BSHD.device)
        return _torch_rope(x_BSHD, cosines_PR[at], sines_PR[at], interleaved=interleaved, inverse=inverse)
    first, last = (None, None) if documents is None else (documents.first, documents.last)
    turned: torch.Tensor = rope_op()(x_BSHD, cosines_PR, sines_PR, first, last, from_end, interleaved, inverse)
    return turned


def _torch_rope(
    x: torch.Tensor, cosines_BSR: torch.Tensor, sines_BSR: torch.Tensor, *, interleaved: bool, inverse: bool
) -> torch.Tensor:
    half = cosines_BSR.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    cosine, sine = cosines_BSR[:, :, None], sines_BSR[:, :, None] * (-1 if inverse else 1)
    pair = a * cosine - b * sine, b * cosine + a * sine
    joined = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([joined.to(x.dtype), rest], dim=-1)


@functools.cache
def rope_op() -> Any:
    """Register `ledom::rope` at first use and return it; its gradient is itself, turning the other way."""

    @torch.library.custom_op("ledom::rope", mutates_args=(), device_types="cpu")
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
        x, cosines, sines = rows_contiguous(x), cosines.contiguous(), sines.contiguous()
        turned = empty_like_rows(x)
        documents = None if first is None or last is None else Documents(first, last)
        batch, seq, heads, head_dim = x.shape
        sizes = [batch, seq, heads, heads, head_dim]
        call = kernels().Call(
            DTYPE_CODES[x.dtype], sizes, [0, 0], as_documents(documents), 1.0, torch.get_num_threads()
        )
        kernels().rope_cpu(
            call,
            *(as_argument(x), as_argument(turned), 2 * cosines.shape[1], interleaved, from_end, inverse),
            *([cosines.data_ptr(), sines.data_ptr()], len(cosines)),
        )
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
