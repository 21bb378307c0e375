"""Attention and rotary positions by torch alone: where no kernel of ours serves, and to compare ours with.

Legend: B batch, S sequence, H query heads, G key heads (groups), D head dim.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_ledom.ops.mask import AttentionMask, dense_mask


def torch_attention(
    q_BSHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGD: torch.Tensor, mask: AttentionMask, scale: float
) -> torch.Tensor:
    """Attention with `scaled_dot_product_attention`, differentiable.

    Causal over a whole sequence needs no mask, and reversed-causal is causal on flipped sequences. Every other mask is
    written out, S x S: torch has no way to say it.

    Returns:
        The output [B, S, H, D]; 0 for rows that attend nothing.
    """
    batch, seq = q_BSHD.shape[:2]
    if mask.is_plain(seq):
        if mask.reach(seq)[0]:
            return attend(q_BSHD, k_BSGD, v_BSGD, scale)
        return attend(q_BSHD.flip(1), k_BSGD.flip(1), v_BSGD.flip(1), scale).flip(1)
    allowed = dense_mask(mask, batch, seq, q_BSHD.device)
    is_empty = ~allowed.any(dim=-1)
    allowed |= is_empty[..., None]  # torch's own answer for such rows has changed between its versions
    return attend(q_BSHD, k_BSGD, v_BSGD, scale, allowed[:, None]).masked_fill(is_empty[..., None, None], 0.0)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """Call torch on [B, S, H, D] and [B, S, G, D]; causal without `allowed`, a bool mask [B, 1, S, S]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    # On the CPU torch 2.14's own `enable_gqa` writes the scores out once a gradient is wanted: 3.5 times slower. On
    # GPUs its fused kernels take grouped heads as they are, but not together with a mask.
    has_groups = group > 1 and q.is_cuda and allowed is None
    if group > 1 and not has_groups:
        k, v = (x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    output: torch.Tensor = scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale, enable_gqa=has_groups
    )
    return output.transpose(1, 2)


def torch_rope(
    x: torch.Tensor, cosines_BSR: torch.Tensor, sines_BSR: torch.Tensor, *, interleaved: bool, inverse: bool
) -> torch.Tensor:
    """Rotary positions with torch's operations, differentiable.

    Args:
        x: [B, S, H, D].
        cosines_BSR: of each token's position, fp32 [B, S, R / 2].
        sines_BSR: the same.
        interleaved: pairs are (2d, 2d + 1) instead of (d, d + R / 2).
        inverse: turn back.
    """
    half = cosines_BSR.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    cosine, sine = cosines_BSR[:, :, None], sines_BSR[:, :, None] * (-1 if inverse else 1)
    pair = a * cosine - b * sine, b * cosine + a * sine
    joined = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([joined.to(x.dtype), rest], dim=-1)
