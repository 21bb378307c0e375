"""From Megatron's arguments to a Hugging Face `LlamaConfig`, or a refusal that names the argument.

Everything in which a Megatron GPT can differ from a Llama is in `REQUIREMENTS`; what is
not there has no influence on the function that the weights compute (parallel layout,
recomputation, fused kernels, optimizer).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from megatron_ledom.errors import CheckpointError

CONFIG_NAME = "config.json"
LEDOM_FORMAT_VERSION = 1
"""Of the entry `ledom` in config.json."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Megatron's `--use-rope-scaling` fixes these (`RotaryEmbedding._apply_scaling`)."""

REQUIREMENTS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    # argument, the values that a Llama has, what it would be otherwise
    ("normalization", ("RMSNorm",), "a Llama norms by the root mean square"),
    ("swiglu", (True,), "a Llama's feed-forward is SwiGLU"),
    ("add_bias_linear", (False,), "a Llama's linear layers have no bias"),
    ("add_qkv_bias", (False,), "a Llama's attention has no bias"),
    ("position_embedding_type", ("rope",), "a Llama has rotary positions"),
    ("rotary_percent", (1.0,), "a Llama rotates whole heads"),
    ("rotary_interleaved", (False,), "a Llama rotates halves, not pairs"),
    ("layernorm_zero_centered_gamma", (False,), "a Llama multiplies by the norm's weight, not by 1 + weight"),
    ("qk_layernorm", (False,), "a Llama does not norm queries and keys"),
    ("qk_l2_norm", (False,), "a Llama does not norm queries and keys"),
    ("apply_residual_connection_post_layernorm", (False,), "a Llama's residual goes around the norm"),
    ("attention_output_gate", (False,), "a Llama's attention has no output gate"),
    ("softmax_type", ("vanilla",), "a Llama's attention has no sink"),
    ("window_size", (None,), "a Llama attends to the whole past"),
    ("no_rope_freq", (None,), "a Llama rotates in every layer"),
    ("activation_func_clamp_value", (None,), "a Llama's activation is not clamped"),
    ("glu_linear_offset", (0.0,), "a Llama's gate has no offset"),
    ("multi_latent_attention", (False,), "a Llama has ordinary attention"),
    ("experimental_attention_variant", (None,), "a Llama has ordinary attention"),
    ("linear_attention_freq", (None,), "a Llama has ordinary attention"),
    ("num_experts", (None,), "a Llama is dense"),
    ("mtp_num_layers", (None,), "a Llama predicts one token"),
    ("use_mup", (False,), "a Llama has no width multipliers"),
    ("is_hybrid_model", (False,), "a Llama consists of Transformer layers"),
    ("heterogeneous_layers_config_path", (None,), "a Llama's layers are alike"),
    ("spec", (None,), "a layer of one's own cannot be judged"),
)


REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
SIZES = (*REQUIRED, "padded_vocab_size", "seq_length", "kv_channels", "num_query_groups")
NUMBERS = (
    *("layernorm_epsilon", "rotary_base", "init_method_std", "rope_scaling_factor"),
    "rotary_seq_len_interpolation_factor",
)
OPTIONAL = ("kv_channels", "num_query_groups", "rope_scaling_factor", "rotary_seq_len_interpolation_factor")
"""Of the two lists above, what may be None."""


@dataclass(frozen=True)
class AttentionShape:
    """H, G and D of a model, as `tensors.split_qkv` wants them."""

    num_heads: int
    num_query_groups: int
    head_dim: int


def check_is_llama(args: argparse.Namespace, *, where: str) -> None:
    """Refuse a model that a Llama cannot express.

    Args:
        args: Megatron's arguments; one that is absent belongs to another version and has no say.
        where: names the checkpoint in messages.

    Raises:
        CheckpointError: naming every argument that stands in the way, or is no number where one is needed.
    """
    problems = _number_problems(args)
    if problems:
        raise CheckpointError(f"{where} has damaged arguments: {'; '.join(problems)}")
    problems = [
        f"{name}={getattr(args, name)!r} ({reason})"
        for name, accepted, reason in REQUIREMENTS
        if hasattr(args, name) and getattr(args, name) not in accepted
    ]
    if args.hidden_size % args.num_attention_heads:
        problems.append(
            f"hidden_size={args.hidden_size} with num_attention_heads={args.num_attention_heads} "
            "(transformers wants a multiple)"
        )
    if getattr(args, "rotary_seq_len_interpolation_factor", None) and args.use_rope_scaling:
        problems.append("rotary_seq_len_interpolation_factor with use_rope_scaling (a Llama has one or the other)")
    if problems:
        raise CheckpointError(f"{where} cannot be a Llama: {'; '.join(problems)}")


def is_positive(value: Any) -> bool:
    """Whether it is a number above zero; True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _number_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    for name in (*SIZES, *NUMBERS):
        value = getattr(args, name, None)
        if value is None and (name in OPTIONAL or not hasattr(args, name)):
            continue
        is_right = is_positive(value) if name in NUMBERS else type(value) is int and 0 < value < 2**31
        if not is_right:
            problems.append(
                f"{name} is {str(value)[:80]!r}, expected a positive {'number' if name in NUMBERS else 'size'}"
            )
    problems += [f"{name} is missing" for name in REQUIRED if not hasattr(args, name)]
    origin = getattr(args, "hf_origin", None)
    if origin is not None and not (isinstance(origin, dict) and isinstance(origin.get("vocab_size"), int | None)):
        problems.append(f"hf_origin is {str(origin)[:80]!r}, expected what an import wrote")
    return problems


def attention_shape(args: argparse.Namespace) -> AttentionShape:
    """Return heads, groups and head size.

    Megatron's `num_query_groups` is 1 in a saved namespace without grouped attention; it
    counts only beside `group_query_attention`.
    """
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    head_dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    return AttentionShape(args.num_attention_heads, groups, head_dim)


def is_tied(args: argparse.Namespace) -> bool:
    """Whether the output layer shares the embedding's weight."""
    return not args.untie_embeddings_and_output_weights


def llama_config(
    args: argparse.Namespace, *, vocab_size: int, bos_token_id: int | None, eos_token_id: int | list[int], dtype: str
) -> dict[str, Any]:
    """Build the content of `config.json`.

    Args:
        args: Megatron's arguments, checked by `check_is_llama`.
        vocab_size: rows of the exported tables: the tokenizer's ids, without padding.
        bos_token_id: of the tokenizer, or None where it has none.
        eos_token_id: the end-of-document id, which the model writes where a document begins
            (reverse) or ends (forward).
        dtype: "float32", "bfloat16" or "float16".

    Returns:
        What transformers 5 writes; `rope_theta`, `rope_scaling` and `torch_dtype` are there once more
        under the names that older readers look for: one that finds no `rope_scaling` leaves it out in silence.
    """
    shape = attention_shape(args)
    rope = rope_parameters(args)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "initializer_range": args.init_method_std,
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        **({} if rope["rope_type"] == "default" else {"rope_scaling": scaling}),
        "attention_bias": False,
        "attention_dropout": args.attention_dropout,
        "mlp_bias": False,
        "tie_word_embeddings": is_tied(args),
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def rope_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return the rotary embedding as transformers 5 writes it: base, and scaling where there is one."""
    rope: dict[str, Any] = {"rope_theta": float(args.rotary_base), "rope_type": "default"}
    if getattr(args, "use_rope_scaling", False):
        return rope | LLAMA3_ROPE | {"rope_type": "llama3", "factor": float(args.rope_scaling_factor)}
    factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if factor:
        return rope | {"rope_type": "linear", "factor": float(factor)}
    return rope
