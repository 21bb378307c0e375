"""A transformers model on this project's kernels, where it computes in float32 on a CPU: attention and linear layers.

Both compute what transformers' own do, up to the order of sums. Attention goes through the registry that transformers
has for it, and takes what a scorer asks for: whole sequences under a causal mask. All else (a cache, a mask that is
written out, windows, soft caps) is left to the function that would have been called.

Legend: B batch, H query heads, G key heads, S sequence, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_ledom.ops import products
from megatron_ledom.ops.attention import attention
from megatron_ledom.ops.kernels import cpu_paths
from megatron_ledom.ops.mask import model_order_mask

NAME = "ledom_cpu"
REPLACED = "sdpa"
# What transformers passes to every attention function and what changes nothing in it.
_HARMLESS = {"position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict"}
# A product of fewer rows is no faster by oneDNN.
LEAST_ROWS = 16


def use_cpu_kernels(model: Any) -> None:
    """Let a loaded causal LM compute by the kernels where they serve it; others are left as they are.

    Args:
        model: a `transformers` model in evaluation mode.
    """
    if model.device.type != "cpu" or model.dtype is not torch.float32:
        return
    if products.is_onednn_faster():
        for module in model.modules():
            if type(module) is torch.nn.Linear and module.bias is None:
                module.__class__ = FasterLinear
    # A model that scales, caps or lays out its attention in a way of its own says so by not taking the registry's.
    if cpu_paths() and model.config._attn_implementation == REPLACED and model._can_set_attn_implementation():
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


class FasterLinear(torch.nn.Linear):
    """A linear layer without bias whose product is oneDNN's, where no gradient is wanted."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute input [..., K] times the transpose of the weight [N, K]."""
        if torch.is_grad_enabled() or input.dtype is not torch.float32 or input.numel() < LEAST_ROWS * self.in_features:
            return super().forward(input)
        return products.linear(input, self.weight)


def attend(
    module: torch.nn.Module,
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `transformers.integrations.sdpa_attention.sdpa_attention_forward` does.

    Returns:
        [B, S, H, D] and None, for the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_whole = query_BHSD.shape[2] == key_BGSD.shape[2] and key_BGSD.shape[-1] == value_BGSD.shape[-1]
    is_unknown = any(more[name] is not None and more[name] is not False for name in more.keys() - _HARMLESS)
    if attention_mask is not None or dropout or is_unknown or not (is_causal and is_whole):
        return sdpa_attention_forward(
            module, query_BHSD, key_BGSD, value_BGSD, attention_mask, dropout, scaling, is_causal, **more
        )
    queries, keys, values = (x.transpose(1, 2) for x in (query_BHSD, key_BGSD, value_BGSD))
    return attention(queries, keys, values, model_order_mask(), scale=scaling), None
