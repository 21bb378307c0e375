"""The layer specification: Transformer Engine's modules on GPUs, Megatron's local ones elsewhere.

Both give the same checkpoint keys (Megatron maps the local names to Transformer
Engine's), so a checkpoint written on the CPU loads on a GPU and the other way round.
It owns the choice and one module, `RMSNorm`; the rest is Megatron's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig


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


def build_layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """Return the specification of this pipeline stage's layers.

    Megatron's own choice stands for Transformer Engine, experts, latent attention and
    whatever else its flags ask for. Ours takes its place in one case: dense local layers
    with RMSNorm.

    Args:
        config: Megatron's model configuration.
        vp_stage: the virtual pipeline stage, with interleaving.

    Returns:
        A `ModuleSpec` or `TransformerBlockSubmodules`, as Megatron's `GPTModel` takes them.

    Source: `megatron.training.models.gpt.default_layer_spec`.
    """
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from megatron.training.models.gpt import default_layer_spec

    layer = default_layer_spec(config, vp_stage)
    transformer = config.transformer
    is_plain_layer = getattr(layer, "module", None) is TransformerLayer
    is_dense = transformer.num_moe_experts is None and not transformer.multi_latent_attention
    is_local_rms = transformer.transformer_impl == "local" and transformer.normalization == "RMSNorm"
    if not (is_plain_layer and is_dense and is_local_rms):
        return layer
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(transformer, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
