"""The slow twins of the kernels: plain torch, in float64 unless told otherwise, differentiable.

Legend: B batch, S sequence, H query heads, G key heads (groups), D head dim.
"""

from __future__ import annotations

import math

import torch

from megatron_ledom.ops.mask import AttentionMask, Documents, dense_mask


def reference_attention(
    q_BSHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGD: torch.Tensor,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with every score written out.

    Args:
        q_BSHD: queries.
        k_BSGD: keys; G divides H, and query head h reads key head h // (H / G).
        v_BSGD: values.
        mask: which keys a row attends.
        scale: of the scores; None for 1 / sqrt(D).
        dtype: what is computed in, and the result's.

    Returns:
        The output [B, S, H, D] and the natural logarithm of each row's sum of exponentials [B, H, S]. A row that
        attends nothing has output 0 and logarithm -inf, and takes no part in any gradient.
    """
    batch, seq, heads, head_dim = q_BSHD.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    group = heads // k_BSGD.shape[2]
    q = q_BSHD.to(dtype).transpose(1, 2)
    k, v = (x.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1) for x in (k_BSGD, v_BSGD))
    allowed = dense_mask(mask, batch, seq, q.device)[:, None]
    is_empty = ~allowed.any(dim=-1, keepdim=True)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -math.inf)
    lse = torch.logsumexp(scores.masked_fill(is_empty, 0.0), dim=-1, keepdim=True)
    weights = torch.exp(scores - lse)  # exp(-inf) is 0 where a key is not allowed, and its gradient too
    lse = lse.masked_fill(is_empty, -math.inf)
    return (weights @ v).transpose(1, 2), lse.squeeze(-1)


def positions(
    documents: Documents | None, batch: int, seq: int, *, from_end: bool, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The position of every token in its document, counted from its end or its beginning; int64 [B, S], padding 0."""
    token = torch.arange(seq, device=device).expand(batch, seq)
    if documents is None:
        return (seq - 1 - token) if from_end else token
    at = documents.last - token if from_end else token - documents.first
    return at.clamp(min=0).to(torch.int64)


def reference_rope(
    x_BSHD: torch.Tensor,
    position_BS: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Rotary positions: each pair of elements turned by position times its frequency.

    Args:
        x_BSHD: queries or keys.
        position_BS: the position of each token.
        inverse_frequencies: [R / 2] radians a position; the first R of the D elements are turned, the rest copied.
        interleaved: pairs are (2d, 2d + 1) instead of (d, d + R / 2).
        inverse: turn back.
        dtype: what is computed in, and the result's.

    Source: RoFormer (arXiv 2104.09864), section 3.2.2; the two pairings are those of
    `megatron.core.models.common.embeddings.rope_utils`.
    """
    x = x_BSHD.to(dtype)
    half = len(inverse_frequencies)
    angle = position_BS[..., None, None].to(dtype) * inverse_frequencies.to(dtype)
    cosine, sine = torch.cos(angle), torch.sin(angle) * (-1 if inverse else 1)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        pairs = torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)
    return torch.cat([pairs, rest], dim=-1)


def rope_tables(inverse_frequencies: torch.Tensor, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position's angles, fp32 [P, R / 2], computed in float64.

    Args:
        inverse_frequencies: [R / 2], radians a position.
        num_positions: P, at least the longest document.
    """
    position = torch.arange(num_positions, dtype=torch.float64, device=inverse_frequencies.device)
    angle = torch.outer(position, inverse_frequencies.double())
    return torch.cos(angle).float(), torch.sin(angle).float()


def reference_swiglu(x: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """SwiGLU: silu(gate) * up, of x [..., 2 F] = [gate, up].

    Source: GLU Variants Improve Transformer (arXiv 2002.05202), section 2.
    """
    gate, up = x.to(dtype).chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def reference_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """RMSNorm: x / sqrt(mean of x^2 over the last axis + eps) * weight.

    Source: Root Mean Square Layer Normalization (arXiv 1910.07467), section 4.
    """
    x = x.to(dtype)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.to(dtype)


def reference_cross_entropy(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Each row's loss: the logarithm of its sum of exponentials, less its target's logit; [N]."""
    logits = logits_NV.to(dtype)
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets_N[:, None]).squeeze(-1)
