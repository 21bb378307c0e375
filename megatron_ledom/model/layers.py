"""What `ops` computes of a layer beside attention: norm, SwiGLU and loss by fused kernels, products where it is faster.

Each takes the place of Megatron's own and computes the same up to rounding: parameters, checkpoints and parallelism do
not change, and a run may change `--layer-kernels` at a resume. Our attention is planned apart (`model/attention.py`).

Legend: S sequence, B batch, H hidden size, F size of the feed-forward layer on this rank.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP

from megatron_ledom.errors import UsageError
from megatron_ledom.model.spec import RMSNorm
from megatron_ledom.ops import products
from megatron_ledom.ops.kernels import load_kernels
from megatron_ledom.ops.rms_norm import rms_norm
from megatron_ledom.ops.swiglu import swiglu

MEGATRON, LEDOM = "megatron", "ledom"


@dataclass(frozen=True)
class LayerPlan:
    """What computes norms, SwiGLU and the loss in a run.

    Attributes:
        kind: `MEGATRON` or `LEDOM`.
        reason: why this kind, in words.
    """

    kind: str
    reason: str

    @property
    def is_ours(self) -> bool:
        """Whether the kernels compute them."""
        return self.kind == LEDOM


def plan_layers(args: argparse.Namespace, device: str) -> LayerPlan:
    """Decide what computes norms, SwiGLU and the loss, from `--layer-kernels` and the model's flags.

    Args:
        args: Megatron's namespace with ours.
        device: "cpu" or "cuda".

    Raises:
        UsageError: `--layer-kernels ledom` where the kernels cannot serve.
    """
    if args.layer_kernels == MEGATRON:
        return LayerPlan(MEGATRON, "asked for")
    found = load_kernels()
    faults = {
        "--num-experts: its layers are Megatron's": args.num_experts is not None,
        "--multi-latent-attention: its layers are Megatron's": args.multi_latent_attention,
        "--spec: its layers are another's": args.spec is not None,
        "--fp16: the kernels have fp32 and bf16": args.fp16,
        f"--transformer-impl {args.transformer_impl}: its layers are another's": args.transformer_impl != "local",
        "these kernels run on the CPU": device != "cpu",
        str(found): isinstance(found, str),
    }
    fault = next((fault for fault, is_so in faults.items() if is_so), None)
    if fault is None:
        return LayerPlan(LEDOM, "asked for" if args.layer_kernels == LEDOM else "the default on the CPU")
    if args.layer_kernels == LEDOM:
        raise UsageError(f"--layer-kernels ledom: {fault}. Change that, or use --layer-kernels auto")
    return LayerPlan(MEGATRON, fault)


class FusedRMSNorm(RMSNorm):
    """The same norm, computed by `ops.rms_norm`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm [S, B, H]."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class FusedMLP(MLP):
    """Megatron's feed-forward layer, whose SwiGLU is computed by `ops.swiglu`.

    Any other activation, biases and scales of experts are left to Megatron.
    """

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the layer.

        Args:
            hidden_states: [S, B, H].
            per_token_scale: of experts; not used here.
            **kwargs: Megatron's.

        Returns:
            [S, B, H], and a bias for Megatron to add, here None.

        Source: `megatron.core.transformer.mlp.MLP.forward`.
        """
        if per_token_scale is not None or not is_plain_swiglu(self.config):
            result: tuple[torch.Tensor, torch.Tensor | None] = super().forward(hidden_states, per_token_scale, **kwargs)
            return result
        gate_and_up, bias = self.linear_fc1(hidden_states)
        assert bias is None, "planned for layers without biases"
        output: tuple[torch.Tensor, torch.Tensor | None] = self.linear_fc2(swiglu(gate_and_up))
        return output


class _FasterProducts:
    """The product of a linear layer by `ops.products`; a mixin before Megatron's class."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Megatron's hook for the product. What communicates, or keeps gradients elsewhere, stays Megatron's."""
        wants_more = any(kwargs.get(name) is not None for name in ("bias", "grad_output_buffer"))
        wants_more |= any(kwargs.get(name) for name in ("sequence_parallel", "allreduce_dgrad"))
        wants_more |= kwargs.get("gradient_accumulation_fusion", False) or kwargs.get("gtp_remat_size", 1) > 1
        if wants_more or input.dtype != torch.float32 or weight.dtype != torch.float32:
            product: torch.Tensor = super()._forward_impl(input, weight, **kwargs)  # type: ignore[misc]
            return product
        return products.linear(input, weight)


class FasterColumnParallelLinear(_FasterProducts, ColumnParallelLinear):
    """Megatron's layer whose output is cut over the tensor-parallel ranks."""


class FasterRowParallelLinear(_FasterProducts, RowParallelLinear):
    """Megatron's layer whose input is cut over the tensor-parallel ranks."""


def is_plain_swiglu(config: Any) -> bool:
    """Whether a `TransformerConfig` asks for silu(gate) * up and nothing more."""
    return bool(
        config.gated_linear_unit
        and config.activation_func is torch.nn.functional.silu
        and not config.add_bias_linear
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0.0
        and not config.use_te_activation_func
    )
