"""config.json to Megatron's arguments: every field that counts is mapped or refused by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from megatron_ledom.convert.llama_arguments import MAX_CONFIG_BYTES, megatron_settings, model_direction, read_config
from megatron_ledom.convert.llama_config import llama_config
from megatron_ledom.direction import Direction
from megatron_ledom.errors import CheckpointError, DirectionError, LedomError, UsageError

# The released reverse 7B's configuration, as its paper's docs give it.
RELEASED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 192,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 24576,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.1",
    "use_cache": True,
    "vocab_size": 64256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_released_7b_is_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_ledom.engine.presets import PRESETS

    settings = megatron_settings(RELEASED, where="config.json")
    preset = PRESETS["7b"].settings
    differing = {n: (settings[n], preset[n]) for n in settings.keys() & preset.keys() if settings[n] != preset[n]}
    # 16 groups of one head are plain multi-head attention; Megatron's own namespace then says 1
    assert differing == {"group_query_attention": (False, True), "num_query_groups": (1, 16)}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True, "head_dim": 128},
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-6},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"attention_dropout": 0.1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": None},
    ],
)
def test_it_is_the_inverse_of_the_export(changes: dict[str, Any]) -> None:
    """Through Megatron's arguments and back, transformers understands the same configuration."""
    config = RELEASED | changes
    args = argparse.Namespace(**megatron_settings(config, where="config.json"))
    back = llama_config(args, vocab_size=64256, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    fields = set(LlamaConfig().to_dict()) - {"transformers_version", "_name_or_path"}
    before, after = (LlamaConfig(**{k: v for k, v in c.items() if v is not None}).to_dict() for c in (config, back))
    before["rope_parameters"].pop("type", None)  # transformers keeps the older word beside the newer one
    assert {k: before[k] for k in fields if k in before} == {k: after[k] for k in fields if k in before}


def test_what_is_absent_means_what_transformers_takes_for_it() -> None:
    shape = {k: RELEASED[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    settings = megatron_settings(shape | {"model_type": "llama", "vocab_size": 100}, where="config.json")
    default = LlamaConfig(**shape, vocab_size=100)
    assert settings["kv_channels"] == default.head_dim == 192
    assert settings["layernorm_epsilon"] == default.rms_norm_eps
    assert settings["rotary_base"] == default.rope_parameters["rope_theta"]
    assert settings["max_position_embeddings"] == default.max_position_embeddings
    assert settings["untie_embeddings_and_output_weights"] is not default.tie_word_embeddings
    assert settings["group_query_attention"] is (default.num_key_value_heads != default.num_attention_heads)


REFUSALS = {
    "another model": ({"model_type": "qwen3"}, "model_type is 'qwen3', expected 'llama'"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
    "code": ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code of its own, which is never run"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "feed-forward bias": ({"mlp_bias": True}, "mlp_bias is True"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised weights are not converted"),
    "missing size": ({"hidden_size": None}, "hidden_size is missing"),
    "negative size": ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected a positive integer"),
    "text for a size": ({"vocab_size": "64256"}, "vocab_size is '64256'"),
    "true for a size": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "groups": ({"num_key_value_heads": 5}, "num_attention_heads 16 is no multiple of num_key_value_heads 5"),
    "heads": ({"hidden_size": 3073, "head_dim": None}, "hidden_size 3073 is no multiple"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions of type 'yarn'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary positions of type 'dynamic'"),
    "half a factor": ({"rope_scaling": {"type": "linear", "factor": 2.5}}, "linear ones with a whole factor"),
    "other llama3": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "rotary positions of type 'llama3'"),
    "partial": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    "text for a dropout": ({"attention_dropout": "0.1"}, "attention_dropout is '0.1', expected a probability"),
    "too much dropout": ({"attention_dropout": 1.5}, "attention_dropout is 1.5, expected a probability"),
    "infinite base": ({"rope_theta": float("inf")}, "rope_theta is inf"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_megatron_cannot_express_is_refused_by_name(case: str) -> None:
    changes, message = REFUSALS[case]
    config = {k: v for k, v in (RELEASED | changes).items() if v is not None}
    with pytest.raises(CheckpointError) as refusal:
        megatron_settings(config, where="FOLDER/config.json")
    assert "FOLDER/config.json" in str(refusal.value) and message in str(refusal.value)


def test_a_run_s_dropout_is_kept_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's own default is 0.1, so that exports of runs without a preset have it."""
    assert megatron_settings(RELEASED | {"attention_dropout": 0.1}, where="config.json")["attention_dropout"] == 0.1
    assert "attention_dropout 0.1 is kept" in capsys.readouterr().err
    assert megatron_settings(RELEASED | {"attention_dropout": 0}, where="config.json")["attention_dropout"] == 0.0
    assert capsys.readouterr().err == ""


def test_an_unknown_field_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    megatron_settings(RELEASED | {"residual_multiplier": 0.2, "_private": 1}, where="config.json")
    assert "residual_multiplier: not known here and not imported" in capsys.readouterr().err


FILES: dict[str, tuple[bytes | None, str]] = {
    "absent": (None, "it has no config.json"),
    "not JSON": (b"{", "cannot be read as JSON"),
    "not text": (b"\xff\xfe", "cannot be read as JSON"),
    "a list": (b"[]", "holds a list"),
    "large": (b" " * (MAX_CONFIG_BYTES + 1), "a configuration has a few thousand"),
    "nested": (b"[" * 200_000, "cannot be read as JSON"),
    "damaged record": (b'{"ledom": 3}', "its entry 'ledom' is damaged"),
    "later version": (
        b'{"ledom": {"format_version": 2}}',
        "has format 2, this version of megatron_ledom reads up to 1",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_refused(case: str, tmp_path: Path) -> None:
    content, message = FILES[case]
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_direction_comes_from_the_record_or_from_the_user(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"ledom": {"format_version": 1, "direction": "reverse"}}))
    recorded = read_config(tmp_path)
    assert model_direction(recorded, None, where="X") == model_direction(recorded, Direction.REVERSE, where="X")
    assert model_direction({}, Direction.FORWARD, where="X") is Direction.FORWARD
    with pytest.raises(DirectionError, match="--direction forward was given, X says that its model reads reverse"):
        model_direction(recorded, Direction.FORWARD, where="X")
    with pytest.raises(UsageError, match="give --direction reverse or forward"):
        model_direction({}, None, where="X")
    with pytest.raises(LedomError, match="X"):
        model_direction({"ledom": {"format_version": 1, "direction": "sideways"}}, None, where="X")
