"""Which device a run uses, CUDA where there is one, otherwise the CPU engine, and the defaults that it needs."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from megatron_ledom.errors import UsageError

Device = Literal["cpu", "cuda"]

CPU_DEFAULTS: dict[str, Any] = {
    # What the CPU engine needs: gloo, Megatron's local layers, none of the CUDA-only fused kernels.
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}

CUDA_LOCAL_DEFAULTS: dict[str, Any] = {
    # CUDA without Transformer Engine: Megatron's local layers, and none of the kernels that it or Apex brings.
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}


def resolve_device(asked: str) -> Device:
    """Turn `--device auto|cpu|cuda` into the device of this process.

    Raises:
        UsageError: CUDA was asked for and torch sees no CUDA device.
    """
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise UsageError(
            "--device cuda: torch sees no CUDA device "
            f"(torch {torch.__version__}, built for CUDA {torch.version.cuda}). "
            "Check the driver with nvidia-smi, or run with --device cpu"
        )
    return "cpu"


def device_defaults(device: Device, with_transformer_engine: bool, with_fused_gradients: bool) -> dict[str, Any]:
    """Return the defaults (Megatron argument to value) that a device and what is installed ask for."""
    if device == "cpu":
        return CPU_DEFAULTS
    if not with_transformer_engine:
        return CUDA_LOCAL_DEFAULTS
    # Megatron's output layer refuses to be built with the fusion that it asks for by default, whoever made the others.
    return {} if with_fused_gradients else {"gradient_accumulation_fusion": False}


def has_transformer_engine() -> bool:
    """Whether Megatron could import Transformer Engine; it decides by the same variable."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def has_fused_gradients() -> bool:
    """Whether Apex's kernel is there that adds a weight's gradient to those before it; Megatron imports it likewise."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
