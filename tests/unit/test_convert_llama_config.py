"""Megatron's arguments as a LlamaConfig: what it says, and every refusal by name."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from transformers import LlamaConfig

from megatron_ledom.convert import llama_config as module
from megatron_ledom.engine.presets import PRESETS
from megatron_ledom.errors import CheckpointError


def arguments(**changes: Any) -> argparse.Namespace:
    """The arguments of a Llama-shaped run, as far as a configuration looks at them."""
    accepted = {name: values[0] for name, values, _ in module.REQUIREMENTS}
    shape = {
        "num_layers": 3,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "group_query_attention": True,
        "kv_channels": 24,
        "max_position_embeddings": 128,
        "rotary_base": 20_000,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "rotary_seq_len_interpolation_factor": None,
        "layernorm_epsilon": 1e-6,
        "init_method_std": 0.01,
        "attention_dropout": 0.0,
        "untie_embeddings_and_output_weights": True,
    }
    return argparse.Namespace(**(accepted | shape | changes))


def build(args: argparse.Namespace) -> LlamaConfig:
    module.check_is_llama(args, where="CHECKPOINT")
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(**module.llama_config(args, vocab_size=1000, dtype="bfloat16", **tokens))


def test_transformers_understands_every_field() -> None:
    config = build(arguments())
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 64, 96)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 24)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (1000, 1, 2)
    assert config.rms_norm_eps == 1e-6 and config.initializer_range == 0.01
    assert config.rope_parameters == {"rope_theta": 20_000.0, "rope_type": "default"}
    assert not config.attention_bias and not config.mlp_bias and not config.tie_word_embeddings
    assert str(config.dtype) == "torch.bfloat16"


def test_without_grouped_attention_every_head_has_its_own_keys() -> None:
    assert build(arguments(group_query_attention=False, num_query_groups=1)).num_key_value_heads == 4
    assert build(arguments(num_query_groups=1)).num_key_value_heads == 1


def test_tied_embeddings() -> None:
    assert build(arguments(untie_embeddings_and_output_weights=False)).tie_word_embeddings


def test_rope_scaling() -> None:
    llama3 = build(arguments(use_rope_scaling=True, rope_scaling_factor=4.0)).rope_parameters
    assert (llama3["rope_type"], llama3["factor"], llama3["original_max_position_embeddings"]) == ("llama3", 4.0, 8192)
    linear = build(arguments(rotary_seq_len_interpolation_factor=2)).rope_parameters
    assert (linear["rope_type"], linear["factor"]) == ("linear", 2.0)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_llama(name: str) -> None:
    settings = dict(PRESETS[name].settings)
    settings.setdefault("kv_channels", settings["hidden_size"] // settings["num_attention_heads"])
    assert build(arguments(**settings)).head_dim == settings["kv_channels"]


@pytest.mark.parametrize("name", [name for name, _, _ in module.REQUIREMENTS])
def test_every_other_architecture_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"CHECKPOINT cannot be a Llama: {name}='other'"):
        build(arguments(**{name: "other"}))


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"normalization='LayerNorm' .*; add_bias_linear=True"):
        build(arguments(add_bias_linear=True, normalization="LayerNorm"))


def test_what_transformers_would_refuse_is_refused_here() -> None:
    with pytest.raises(CheckpointError, match="hidden_size=66"):
        build(arguments(hidden_size=66))
    with pytest.raises(CheckpointError, match="one or the other"):
        build(arguments(use_rope_scaling=True, rotary_seq_len_interpolation_factor=2))


def test_an_argument_of_another_version_has_no_say() -> None:
    args = arguments()
    del args.softmax_type
    assert build(args).num_hidden_layers == 3


@pytest.mark.parametrize("name", [*module.SIZES, *module.NUMBERS, "hf_origin"])
@pytest.mark.parametrize("value", [0, -1, "12", 1.5j, [3], float("nan"), {"a": 1}, True])
def test_an_argument_that_is_no_number_is_refused_by_name(name: str, value: Any) -> None:
    if name == "hf_origin" and isinstance(value, dict):
        value = {"vocab_size": "many"}
    with pytest.raises(CheckpointError, match=rf"save has damaged arguments: {name} is "):
        module.check_is_llama(arguments(**{name: value}), where="save")


def test_a_size_that_is_absent_is_missed() -> None:
    args = arguments()
    del args.hidden_size
    with pytest.raises(CheckpointError, match="damaged arguments: hidden_size is missing"):
        module.check_is_llama(args, where="save")
