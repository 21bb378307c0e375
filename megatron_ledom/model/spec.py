"""The layer specification: Transformer Engine's modules on GPUs, Megatron's local ones elsewhere.

Both give the same checkpoint keys (Megatron maps the local names to Transformer
Engine's), so a checkpoint written on the CPU loads on a GPU and the other way round.
It owns the choice and one module, `RMSNorm`; our core attention is in `attention`, what the fused kernels compute
beside it in `layers`, and the rest is Megatron's.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_ledom.model.attention import AttentionPlan
    from megatron_ledom.model.layers import LayerPlan
    from megatron_ledom.model.precision import Emulation


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm whose weight knows about sequence parallelism.

    Megatron's wrapper around torch's norm refuses `--sequence-parallel`: under it each
    tensor-parallel rank norms a slice of the sequence, so the weight's gradients must
    be summed over those ranks. Megatron does that for parameters with the attribute
    `sequence_parallel`, which this class sets.

    Args:
        config: a `TransformerConfig`; its `normalization` must be RMSNorm.
        hidden_size: size of the normed axis.
        eps: added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        assert config.normalization == "RMSNorm", f"built for RMSNorm, asked for {config.normalization}"
        assert not config.layernorm_zero_centered_gamma, "zero-centred gamma needs Transformer Engine"
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def layer_spec_builder(
    plan: AttentionPlan, layers: LayerPlan, emulation: Emulation | None = None
) -> Callable[..., Any]:
    """Return `build_layer_spec` for a run whose layers are planned, in the form that Megatron calls."""

    def build(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
        return build_layer_spec(config, vp_stage, plan, layers, emulation)

    return build


def build_layer_spec(
    config: GPTModelConfig,
    vp_stage: int | None = None,
    plan: AttentionPlan | None = None,
    layers: LayerPlan | None = None,
    emulation: Emulation | None = None,
) -> Any:
    """Return the specification of this pipeline stage's layers.

    Megatron's own choice stands for Transformer Engine, experts, latent attention and
    whatever else its flags ask for. Ours takes its place in one case: dense local layers
    with RMSNorm.

    Args:
        config: Megatron's model configuration.
        vp_stage: the virtual pipeline stage, with interleaving.
        plan: what computes attention; None for Megatron's own.
        layers: what computes norms and SwiGLU; None for Megatron's own.
        emulation: the FP8 recipe that linear layers emulate; None for none. Dense local layers only.

    Returns:
        A `ModuleSpec` or `TransformerBlockSubmodules`, as Megatron's `GPTModel` takes them.

    Source: `megatron.training.models.gpt.default_layer_spec`.
    """
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
    from megatron.training.models.gpt import default_layer_spec

    layer = default_layer_spec(config, vp_stage)
    transformer = config.transformer
    is_plain_layer = getattr(layer, "module", None) is TransformerLayer
    is_dense = transformer.num_moe_experts is None and not transformer.multi_latent_attention
    if plan is not None and plan.is_ours:
        assert is_plain_layer and is_dense, "planned for dense layers"
        _put_attention(layer, plan, transformer)
    has_kernels = layers is not None and layers.is_ours
    if has_kernels:
        assert is_plain_layer and is_dense, "planned for dense layers"
        _put_feed_forward(layer)
        _put_products(layer)
    is_local_rms = transformer.transformer_impl == "local" and transformer.normalization == "RMSNorm"
    if not (is_plain_layer and is_dense and is_local_rms):
        assert emulation is None, "FP8 is emulated in dense local layers with RMSNorm only"
        return layer
    norm = _norm(has_kernels)
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    num_layers = get_num_layers_to_build(transformer, vp_stage)
    specs = [layer] * num_layers
    if emulation is not None:
        rounded = _with_emulation(layer, emulation)
        offset = get_transformer_layer_offset(transformer, vp_stage)
        is_rounded = [emulation.applies_to(offset + i, transformer.num_layers) for i in range(num_layers)]
        specs = [rounded if is_so else layer for is_so in is_rounded]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _with_emulation(layer: Any, emulation: Emulation) -> Any:
    """A copy of a dense layer's specification whose four linear layers emulate an FP8 recipe."""
    from megatron_ledom.model.precision import EmulatedColumnParallelLinear, EmulatedRowParallelLinear

    rounded = copy.copy(layer)
    rounded.submodules = copy.copy(layer.submodules)
    _put_linear_layers(
        rounded.submodules,
        partial(EmulatedColumnParallelLinear, emulation=emulation),
        partial(EmulatedRowParallelLinear, emulation=emulation),
    )
    return rounded


def _put_linear_layers(submodules: Any, column: Any, row: Any) -> None:
    """Put other linear layers into a dense layer's parts; objects that other specifications share are copied."""
    attention, mlp = copy.copy(submodules.self_attention), submodules.mlp
    attention.submodules = dataclasses.replace(attention.submodules, linear_qkv=column, linear_proj=row)
    parts = dataclasses.replace(mlp.keywords["submodules"], linear_fc1=column, linear_fc2=row)
    submodules.self_attention, submodules.mlp = attention, partial(mlp.func, submodules=parts)


def _put_products(layer: Any) -> None:
    """Put the linear layers whose products are oneDNN's into a layer's specification, where that is faster."""
    from megatron_ledom.ops.products import is_onednn_faster

    if is_onednn_faster():
        from megatron_ledom.model.layers import FasterColumnParallelLinear, FasterRowParallelLinear

        _put_linear_layers(layer.submodules, FasterColumnParallelLinear, FasterRowParallelLinear)


def _norm(has_kernels: bool) -> type[RMSNorm]:
    if not has_kernels:
        return RMSNorm
    from megatron_ledom.model.layers import FusedRMSNorm

    return FusedRMSNorm


def _put_feed_forward(layer: Any) -> None:
    """Put our feed-forward layer, made of the same parts, into the specification of a layer."""
    from megatron_ledom.model.layers import FusedMLP

    given = layer.submodules.mlp
    assert given.func.__func__ is FusedMLP.as_mlp_submodule.__func__, given
    layer.submodules.mlp = partial(FusedMLP.as_mlp_submodule, *given.args, **given.keywords)


def _put_attention(layer: Any, plan: AttentionPlan, config: Any) -> None:
    """Put our core attention, and the self-attention that feeds it, into the specification of a layer.

    All ranks build a specification, also those without a layer: here they agree on the kernels.
    """
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_ledom.model.attention import CoreAttention, SelfAttentionWithAngles, agree_on_kernels

    agree_on_kernels(plan, config)
    part = layer.submodules.self_attention
    assert part.module is SelfAttention, part.module
    part.module = SelfAttentionWithAngles
    part.submodules.core_attention = ModuleSpec(module=CoreAttention, params={"plan": plan})
