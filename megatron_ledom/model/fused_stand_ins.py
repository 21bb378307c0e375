"""Stand-ins for CUDA's fused modules, to be laid out in fake tensors: they keep for backward what the fused ones keep.

On a CPU torch composes RMSNorm from small operations that each keep a fp32 copy, and which attention kernel runs
depends on the processor. A plan for CUDA must not. These two make the tensors that Transformer Engine's (or torch's
CUDA) kernels make and keep, and compute nothing: they are never part of a model that trains.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_ledom.model.attention import CoreAttention
from megatron_ledom.model.spec import RMSNorm
from megatron_ledom.ops.attention import attention_op
from megatron_ledom.ops.mask import model_order_mask
from megatron_ledom.ops.rope import rope_op


class FusedAttention(CoreAttention):
    """Rotary positions and causal attention: keeps turned queries and keys, values, output and the rows' logarithms."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """[S, B, H, D], [S, B, G, D], [S, B, G, D] -> [S, B, H * D]."""
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if self.angles is not None:
            half = self.angles[:, 0, 0, : self.angles.shape[-1] // 2].float()
            q, k = (rope_op()(x, half, half, None, None, False, self.is_interleaved, False) for x in (q, k))
        left, right = model_order_mask(self.window, None).reach(q.shape[1])
        scale = 1 / math.sqrt(q.shape[3]) if self.scale is None else self.scale
        output, _ = attention_op()(q, k, v, None, None, left, right, scale, "portable")
        return output.transpose(0, 1).reshape(*query.shape[:2], -1)


class FusedRMSNorm(RMSNorm):
    """Root-mean-square norm in one kernel: keeps its input and one fp32 number a row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> the same."""
        return _Norm.apply(x, self.weight)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *d_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def put_fused(model: torch.nn.Module) -> None:
    """Turn every norm and core attention of ours below `model` into its stand-in."""
    for module in model.modules():
        if type(module) is CoreAttention:
            module.__class__ = FusedAttention
        elif type(module) is RMSNorm:
            module.__class__ = FusedRMSNorm
