"""From a Hugging Face `LlamaConfig` to Megatron's arguments, or a refusal that names the field.

The inverse of `llama_config`. Every field of config.json is known here: it decides the
network (and is mapped), must have one value (and is checked), or has no influence on what
the weights compute. A field that is none of these is named in a warning; the parity check
then has the last word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ledom.convert.llama_config import CONFIG_NAME, LEDOM_FORMAT_VERSION, LLAMA3_ROPE, is_positive
from megatron_ledom.direction import Direction
from megatron_ledom.errors import CheckpointError, DirectionError, UsageError
from megatron_ledom.log import get_logger

MAX_CONFIG_BYTES = 2**20

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

FIXED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    # field, the values that are supported (the first one is transformers' default), what stands in the way otherwise
    ("hidden_act", ("silu", "swish"), "Megatron's --swiglu gates with SiLU"),
    ("attention_bias", (False, None), "attention biases are not in the table of names"),
    ("mlp_bias", (False, None), "biases of the feed-forward are not in the table of names"),
    ("partial_rotary_factor", (1.0, 1, None), "a Llama rotates whole heads"),
    ("sliding_window", (None,), "a Llama attends to the whole past"),
    ("quantization_config", (None,), "quantised weights are not converted: import the original ones"),
    ("is_decoder", (True, False, None), ""),
    ("pretraining_tp", (1, None), "the weights are cut as for another tensor-parallel size"),
)

MAPPED = (
    *REQUIRED,
    *("model_type", "architectures", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    "attention_dropout",
    *("initializer_range", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "ledom"),
)
WITHOUT_INFLUENCE = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("name_or_path", "is_llama_config", "rope_interleaved", "unk_token_id", "sep_token_id"),
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type", "transformers.js_config", "tokenizer_class", "unsloth_version"),
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        CheckpointError: it is missing, no JSON object, absurdly large, or of a later version of this project.
    """
    path = folder / CONFIG_NAME
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a configuration has a few thousand")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a Hugging Face folder: it has no {CONFIG_NAME}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, expected a JSON object")
    record = config.get("ledom")
    if record is not None and (not isinstance(record, dict) or not isinstance(record.get("format_version"), int)):
        raise CheckpointError(f"{path}: its entry 'ledom' is damaged: {record!r}")
    if record and record["format_version"] > LEDOM_FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: its entry 'ledom' has format {record['format_version']}, this version of megatron_ledom reads up "
            f"to {LEDOM_FORMAT_VERSION}; update the package"
        )
    return config


def model_direction(config: dict[str, Any], asked: Direction | None, *, where: str) -> Direction:
    """Decide in which direction a folder's model reads: from its own record, or as the user says.

    Raises:
        UsageError: nobody says.
        DirectionError: the two contradict each other.
    """
    record = config.get("ledom")
    if record is None:
        if asked is None:
            raise UsageError(
                f"{where} does not say in which direction its model reads: give --direction reverse or forward "
                "(ordinary models are forward)"
            )
        return asked
    written = Direction.parse(record.get("direction"), where=where)
    if asked is not None and asked != written:
        raise DirectionError(f"--direction {asked} was given, {where} says that its model reads {written}")
    return written


def megatron_settings(config: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Build the Megatron arguments that decide the network.

    Args:
        config: content of a LlamaForCausalLM's config.json.
        where: names the file in messages.

    Returns:
        Argument name (`dest`) to value, complete: what transformers takes for an absent field is written out.

    Raises:
        CheckpointError: it is no Llama, or one that Megatron cannot express, naming every field in the way.
    """
    problems = [*_kind_problems(config), *_fixed_problems(config), *_size_problems(config)]
    if problems:
        raise CheckpointError(f"{where} cannot be imported: {'; '.join(problems)}")
    known = {*MAPPED, *WITHOUT_INFLUENCE, *(name for name, _, _ in FIXED)}
    unknown = sorted(name for name in set(config) - known if not name.startswith("_"))
    if unknown:
        get_logger(__name__).warning("%s: %s: not known here and not imported", where, ", ".join(unknown))
    dropout = config.get("attention_dropout") or 0.0
    if dropout:
        get_logger(__name__).warning(
            "%s: attention_dropout %s is kept: training drops out attention, with --attention-dropout 0 it does not",
            where,
            dropout,
        )
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    context = config.get("max_position_embeddings") or 2048
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups if groups != heads else 1,  # as Megatron saves plain multi-head attention
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": context,
        "seq_length": context,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "attention_dropout": float(dropout),
        "hidden_dropout": 0.0,
        "init_method_std": config.get("initializer_range", 0.02),
        **_rope_settings(config, where),
    }


def _kind_problems(config: dict[str, Any]) -> list[str]:
    problems = []
    if config.get("model_type") != "llama":
        problems.append(f"model_type is {config.get('model_type')!r}, expected 'llama'")
    architectures = config.get("architectures")
    if architectures not in (None, ["LlamaForCausalLM"]):
        problems.append(f"architectures is {architectures!r}, expected ['LlamaForCausalLM']")
    if "auto_map" in config:
        problems.append("auto_map names code of its own, which is never run here")
    return problems


def _fixed_problems(config: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {config[name]!r} ({reason})"
        for name, accepted, reason in FIXED
        if name in config and config[name] not in accepted
    ]


def _size_problems(config: dict[str, Any]) -> list[str]:
    problems = [f"{name} is missing" for name in REQUIRED if name not in config]
    sizes = [*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"]
    for name in sizes:
        value = config.get(name)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            problems.append(f"{name} is {value!r}, expected a positive integer")
    for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
        value = config.get(name)
        if value is not None and not is_positive(value):
            problems.append(f"{name} is {value!r}, expected a positive number")
    dropout = config.get("attention_dropout")
    is_number = isinstance(dropout, int | float) and not isinstance(dropout, bool)
    if dropout is not None and not (is_number and 0 <= dropout <= 1):
        problems.append(f"attention_dropout is {dropout!r}, expected a probability")
    if problems:
        return problems
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % groups:
        problems.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        problems.append(f"hidden_size {config['hidden_size']} is no multiple of num_attention_heads {heads}")
    return problems


def _rope_settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Rotary base and scaling, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    base = rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
    partial = rope.pop("partial_rotary_factor", 1.0)
    factor: Any = rope.get("factor")
    if not is_positive(base) or partial != 1:
        raise CheckpointError(f"{where}: rope_theta {base!r} with partial_rotary_factor {partial!r} cannot be imported")
    settings = {
        "rotary_base": int(base) if float(base).is_integer() else float(base),
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "rotary_seq_len_interpolation_factor": None,
    }
    if kind == "default" and not rope:
        return settings
    if kind == "linear" and set(rope) == {"factor"} and is_positive(factor) and float(factor).is_integer():
        return settings | {"rotary_seq_len_interpolation_factor": int(factor)}
    if kind == "llama3" and is_positive(factor) and rope == LLAMA3_ROPE | {"factor": factor}:
        return settings | {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}
    raise CheckpointError(
        f"{where}: rotary positions of type {kind!r} with {rope} cannot be imported: Megatron has the default ones, "
        f"linear ones with a whole factor, and llama3 with {LLAMA3_ROPE}"
    )
