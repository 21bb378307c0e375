"""Fused attention as a torch operation: registered, differentiable, traceable.

    attention(q, k, v, mask)      the face: chooses a path
    ledom::attention              the custom op behind it, with fake tensors and autograd
    ledom::attention_backward     its backward

Legend: B batch, S sequence, H query heads, G key heads (groups), D head dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.ops.conformance import mask_kind
from megatron_ledom.ops.fallback import torch_attention
from megatron_ledom.ops.kernels import empty_like_rows, rows_aligned, rows_contiguous
from megatron_ledom.ops.launch import launch_backward, launch_forward
from megatron_ledom.ops.mask import AttentionMask, Documents, check_documents
from megatron_ledom.ops.path import TORCH, choose_path, fault_of_attention


def attention(
    q_BSHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGD: torch.Tensor,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    path: str = "auto",
    needs_grad: bool | None = None,
) -> torch.Tensor:
    """Attend: softmax(scale * q k^T, where the mask allows) v.

    Args:
        q_BSHD: queries, any strides; the layout of the result is theirs.
        k_BSGD: keys; G divides H, and query head h reads key head h // (H / G).
        v_BSGD: values.
        mask: which keys a row attends.
        scale: of the scores; None for 1 / sqrt(D).
        path: "auto", or one of `path.PATHS`.
        needs_grad: whether a backward pass will be wanted, for "auto"; None: as the tensors say. A forward pass that is
            recomputed says it beforehand, so that both take one path.

    Returns:
        [B, S, H, D] in the dtype of q; 0 for a row that attends nothing. Sums are fp32, and the result does not depend
        on the number of threads.

    Raises:
        UsageError: shapes that do not fit, or a path that cannot serve.
    """
    _check_shapes(q_BSHD, k_BSGD, v_BSGD, mask)
    scale = 1 / math.sqrt(q_BSHD.shape[3]) if scale is None else scale
    kind = mask_kind(mask, q_BSHD.shape[1])
    if needs_grad is None:
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BSHD, k_BSGD, v_BSGD))
    head_dim = q_BSHD.shape[3]
    fault = fault_of_attention(q_BSHD, scale)
    about = {"head_dim": head_dim, "kind": kind, "needs_grad": needs_grad, "fault": fault}
    chosen = choose_path(q_BSHD.device, q_BSHD.dtype, path, **about)
    if chosen.name == TORCH:
        return torch_attention(q_BSHD, k_BSGD, v_BSGD, mask, scale)
    output, _ = attention_with_lse(q_BSHD, k_BSGD, v_BSGD, mask, scale, chosen.name)
    return output


def attention_with_lse(
    q_BSHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGD: torch.Tensor, mask: AttentionMask, scale: float, path: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' two results: the output, and the logarithm of each row's sum of exponentials, fp32 [B, H, S].

    `path` is one of `path.CPU_KERNELS` or `path.CUDA_KERNELS`; whether it is verified is not asked here. The
    logarithm is -inf for a row that attends nothing, and takes no gradient.
    """
    first, last = (None, None) if mask.documents is None else (mask.documents.first, mask.documents.last)
    left, right = mask.reach(q_BSHD.shape[1])
    output, lse = attention_op()(q_BSHD, k_BSGD, v_BSGD, first, last, left, right, scale, path)
    return output, lse


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask) -> None:
    batch, seq, heads, head_dim = q.shape
    groups = k.shape[2]
    if k.shape != v.shape or k.shape != (batch, seq, groups, head_dim) or heads % groups:
        raise UsageError(
            f"attention: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must be [B, S, H, D], [B, S, G, D] "
            "and [B, S, G, D], where G divides H"
        )
    if not q.device == k.device == v.device:
        raise UsageError(f"attention: q is on {q.device}, k on {k.device}, v on {v.device}")
    if not q.dtype == k.dtype == v.dtype:
        raise UsageError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; give all three one dtype")
    check_documents(mask.documents, batch, seq, q.device, "attention")


def _documents(first: torch.Tensor | None, last: torch.Tensor | None) -> Documents | None:
    assert (first is None) == (last is None)
    return None if first is None or last is None else Documents(first.contiguous(), last.contiguous())


@functools.cache
def attention_op() -> Any:
    """Register `ledom::attention` and its backward at first use; returns the former.

    Its arguments: q [B, S, H, D], k and v [B, S, G, D], the two document bounds (int32 [B, S], or None),
    left, right, scale, and the name of a kernel path. It returns the output and the rows' logarithms (fp32 [B, H, S]).
    """
    backward_op = attention_backward_op()

    @torch.library.custom_op("ledom::attention", mutates_args=(), device_types=("cpu", "cuda"))
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        first: torch.Tensor | None,
        last: torch.Tensor | None,
        left: int,
        right: int,
        scale: float,
        path: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the output and the rows' logarithms."""
        q, k, v = (rows_aligned(x) for x in (q, k, v))
        output, lse = empty_results(q)
        launch_forward((q, k, v), output, lse, _documents(first, last), [left, right], scale, path)
        return output, lse

    @forward.register_fake
    def fake(q: Any, k: Any, v: Any, first: Any, last: Any, left: Any, right: Any, scale: Any, path: Any) -> Any:
        return empty_results(rows_contiguous(q))

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, first, last, *ctx.rest = inputs
        ctx.save_for_backward(q, k, v, first, last, *output)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, d_output: Any, _d_lse: Any) -> Any:
        q, k, v, first, last, output, lse = ctx.saved_tensors
        d_q, d_k, d_v = backward_op(d_output, q, k, v, output, lse, first, last, *ctx.rest)
        return d_q, d_k, d_v, *[None] * 6

    forward.register_autograd(differentiate, setup_context=keep)
    return forward


@functools.cache
def attention_backward_op() -> Any:
    """Register `ledom::attention_backward` at first use and return it: d_q, d_k and d_v, laid out as q, k and v."""

    @torch.library.custom_op("ledom::attention_backward", mutates_args=(), device_types=("cpu", "cuda"))
    def backward(
        d_output: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        first: torch.Tensor | None,
        last: torch.Tensor | None,
        left: int,
        right: int,
        scale: float,
        path: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute d_q, d_k and d_v."""
        q, k, v, output, d_output = (rows_aligned(x) for x in (q, k, v, output, d_output))
        d_q, d_k, d_v = (empty_like_rows(x) for x in (q, k, v))
        launch_backward(
            *((q, k, v, output), lse, d_output, (d_q, d_k, d_v), torch.empty_like(lse)),
            *(_documents(first, last), [left, right], scale, path),
        )
        return d_q, d_k, d_v

    @backward.register_fake
    def fake(d_output: Any, q: Any, k: Any, v: Any, *_: Any) -> Any:
        return tuple(empty_like_rows(rows_contiguous(x)) for x in (q, k, v))

    return backward


def empty_results(q_BSHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty tensors for the output and the rows' logarithms."""
    batch, seq, heads, _ = q_BSHD.shape
    return empty_like_rows(q_BSHD), q_BSHD.new_empty((batch, heads, seq), dtype=torch.float32)
