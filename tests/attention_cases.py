"""Masks, and the measure of an error, for every test that compares attention kernels with float64."""

from __future__ import annotations

import torch

from megatron_ledom.direction import Direction
from megatron_ledom.ops.mask import AttentionMask, Documents, documents_from_lengths, model_order_mask
from megatron_ledom.ops.mask import natural_order_mask as reversed_mask

REVERSE = Direction.REVERSE


def documents(batch: int, seq: int) -> Documents:
    """Documents of several lengths, with padding at both ends."""
    total = batch * seq
    bounds = sorted({min(total - 1, 1), total // 5, total // 2, total // 2 + 1, max(total - 3, 1)})
    return documents_from_lengths(torch.tensor(bounds if len(bounds) > 1 else [0, total]), batch, seq)


def masks(batch: int, seq: int) -> dict[str, AttentionMask]:
    docs = documents(batch, seq)
    return {
        "causal": model_order_mask(),
        "causal, window 37": model_order_mask(window=37),
        "reversed": reversed_mask(REVERSE),
        "reversed, window 1": reversed_mask(REVERSE, window=1),
        "reversed, window 37": reversed_mask(REVERSE, window=37),
        "causal, documents": model_order_mask(documents=docs),
        "reversed, documents": reversed_mask(REVERSE, documents=docs),
        "reversed, window 20, documents": reversed_mask(REVERSE, window=20, documents=docs),
        "both sides": AttentionMask(30, None),
    }


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error, relative to the largest element of the exact one, or to 1/2 where that is smaller.

    Inputs are standard normal. With a single key the exact d_q and d_k are 0 and all that is left is rounding. NaN in
    `found` gives NaN, which no limit allows.
    """
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=0.5))
