"""Presets: complete, of the stated sizes, and overridden by flags."""

from __future__ import annotations

import argparse

import pytest

from megatron_ledom.engine.arguments import (
    _add_negations,
    add_ledom_arguments,
    build_defaults,
    build_front_parser,
    check_arguments,
    named_on_command_line,
)
from megatron_ledom.engine.device import CPU_DEFAULTS, CUDA_LOCAL_DEFAULTS, device_defaults
from megatron_ledom.engine.precision import check_precision
from megatron_ledom.engine.presets import PRESETS, count_parameters, get_preset
from megatron_ledom.errors import UsageError

RELEASED_VOCABULARY = 64_256


def test_7b_is_the_released_model() -> None:
    # 7.794 B parameters: the sum over the released shards' shapes
    assert count_parameters(PRESETS["7b"].settings, RELEASED_VOCABULARY) == 7_793_716_224
    settings = PRESETS["7b"].settings
    assert (settings["num_layers"], settings["hidden_size"], settings["ffn_hidden_size"]) == (28, 3072, 24576)
    assert (settings["num_attention_heads"], settings["kv_channels"], settings["seq_length"]) == (16, 192, 8192)


def test_2b_has_one_kv_head_and_about_two_billion_parameters() -> None:
    settings = PRESETS["2b"].settings
    assert settings["num_query_groups"] == 1
    assert 1.9e9 < count_parameters(settings, RELEASED_VOCABULARY) < 2.3e9


@pytest.mark.parametrize("name", ["2b", "7b"])
def test_large_presets_train_on_the_papers_tokens(name: str) -> None:
    s = PRESETS[name].settings
    assert s["train_iters"] * s["global_batch_size"] * s["seq_length"] == pytest.approx(435e9, rel=1e-4)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--preset 3b.*tiny, 2b, 7b"):
        get_preset("3b")


def megatron_like_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--swiglu", action="store_true")
    parser.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    parser.add_argument("--hidden-size", type=int)
    return add_ledom_arguments(parser)


def parse(defaults: dict[str, object], *argv: str) -> argparse.Namespace:
    parser = megatron_like_parser()
    _add_negations(parser, defaults)
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def test_every_preset_value_can_be_overridden() -> None:
    defaults = {"swiglu": True, "add_bias_linear": False, "hidden_size": 128}
    kept = parse(defaults)
    assert (kept.swiglu, kept.add_bias_linear, kept.hidden_size) == (True, False, 128)
    changed = parse(defaults, "--no-swiglu", "--add-bias-linear", "--hidden-size", "64")
    assert (changed.swiglu, changed.add_bias_linear, changed.hidden_size) == (False, True, 64)


def defaults_for(*argv: str, device: str = "cpu", named: set[str] | None = None) -> dict[str, object]:
    front, _ = build_front_parser().parse_known_args(argv)
    return build_defaults(front, device, named or set())  # type: ignore[arg-type]


def test_the_device_decides_the_engines_arguments() -> None:
    assert CPU_DEFAULTS.items() <= defaults_for("--preset", "tiny").items()
    assert "distributed_backend" not in defaults_for("--preset", "tiny", device="cuda")


def test_without_transformer_engine_cuda_takes_megatrons_own_layers() -> None:
    assert device_defaults("cuda", True, True) == {}
    assert device_defaults("cuda", True, False) == {"gradient_accumulation_fusion": False}
    assert device_defaults("cuda", False, True) == CUDA_LOCAL_DEFAULTS
    assert device_defaults("cpu", True, True) == CPU_DEFAULTS
    assert CUDA_LOCAL_DEFAULTS.items() <= CPU_DEFAULTS.items()  # the same layers; the rest is the CPU's


def test_sample_based_training_supersedes_the_presets_iterations() -> None:
    named = named_on_command_line(megatron_like_parser(), ["--hidden-size=3", "x"])
    assert named == {"hidden_size"}
    assert "train_iters" in defaults_for("--preset", "tiny")
    assert "train_iters" not in defaults_for("--preset", "tiny", named={"train_samples"})
    assert "split" not in defaults_for("--preset", "tiny", named={"train_data_path"})


def test_a_run_directory_with_checkpoints_is_continued(tmp_path) -> None:
    fresh = defaults_for("--run-dir", str(tmp_path))
    assert fresh["save"] == str(tmp_path / "checkpoints") and "load" not in fresh
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("20")
    assert defaults_for("--run-dir", str(tmp_path))["load"] == fresh["save"]


def test_masks_of_documents_turn_on_the_loaders_masks() -> None:
    assert defaults_for("--preset", "tiny")["create_attention_mask_in_dataloader"] is False
    assert "create_attention_mask_in_dataloader" not in defaults_for("--preset", "tiny", named={"reset_attention_mask"})


def arguments(**changes: object) -> argparse.Namespace:
    values = {
        "run_dir": "RUN",
        "preset": "tiny",
        "mock_data": True,
        "tokenizer_type": None,
        "world_size": 4,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "num_layers": 8,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "group_query_attention": True,
        "ffn_hidden_size": 128,
        "seq_length": 64,
        "sequence_parallel": False,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "rampup_batch_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "fp8": None,
        "fp16": False,
        "transformer_impl": "local",
        "distributed_backend": "gloo",
        "data_budget": None,
        "data_report_only": False,
        "keep_last": None,
        "keep_every": None,
        "ckpt_format": "torch_dist",
        "rerun_mode": "validate_results",
        "bad_numbers": "stop",
        "reset_attention_mask": False,
        "pack_pairs": False,
        "create_attention_mask_in_dataloader": False,
        "precision": None,
        "bf16": False,
        "fp8_param_gather": False,
        "shadow_every": 0,
    }
    return argparse.Namespace(**(values | changes))


REFUSALS = {
    "no run directory": ({"run_dir": None}, "--run-dir RUN is missing"),
    "no model": ({"preset": None, "num_layers": None}, "--preset tiny|2b|7b"),
    "no tokenizer": ({"mock_data": False}, "--tokenizer-type is missing"),
    "world size": (
        {"world_size": 6, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        "6 processes do not fit the layout: --tensor-model-parallel-size 2 x --pipeline-model-parallel-size 2",
    ),
    "heads": ({"tensor_model_parallel_size": 4, "num_attention_heads": 6}, "--num-attention-heads 6"),
    "groups": ({"tensor_model_parallel_size": 4, "num_query_groups": 3, "num_attention_heads": 12}, "groups 3"),
    "sequence": (
        {"tensor_model_parallel_size": 4, "sequence_parallel": True, "seq_length": 66},
        "--seq-length 66 into 4 parts",
    ),
    "batch": ({"global_batch_size": 6}, "--global-batch-size 6 is not a multiple of --micro-batch-size 1 x 4"),
    "virtual stages alone": ({"num_layers_per_virtual_pipeline_stage": 1}, "--pipeline-model-parallel-size 2 or more"),
    "virtual stages": (
        {"num_layers_per_virtual_pipeline_stage": 3, "pipeline_model_parallel_size": 2},
        "--num-layers 8 over 2 stages cannot be cut into virtual stages of 3",
    ),
    "another model": ({"hybrid_layer_pattern": "M*"}, "--hybrid-layer-pattern is not supported by this tool"),
    "another dataset": ({"sft": True}, "--sft is not supported by this tool: conversations are not a dataset here"),
    "context parallelism": ({"context_parallel_size": 2}, "--context-parallel-size 2 is not supported by this tool"),
    "packed pairs that nothing keeps apart": (
        {"pack_pairs": True, "create_attention_mask_in_dataloader": True, "transformer_impl": "transformer_engine"},
        "--pack-pairs needs --transformer-impl local",
    ),
    "a mask that nothing makes": ({"reset_attention_mask": True}, "--reset-attention-mask does nothing with"),
    "a mask that nothing reads": (
        {
            "reset_attention_mask": True,
            "create_attention_mask_in_dataloader": True,
            "transformer_impl": "transformer_engine",
        },
        "--reset-attention-mask needs --transformer-impl local",
    ),
    "no checkpoint to keep": ({"keep_last": 0}, "--keep-last 0: give 1 or more"),
    "keeping besides all": ({"keep_every": 100}, "--keep-every says what stays besides --keep-last K"),
    "old checkpoints": ({"ckpt_format": "torch"}, "--ckpt-format torch is not supported by this tool"),
    "two keepers": ({"save_retain_interval": 100}, "--keep-last and --keep-every say which checkpoints stay"),
    "statistics of reruns": ({"rerun_mode": "report_stats"}, "report_stats needs --bad-numbers megatron"),
    "fp8 on the CPU": ({"fp8": "hybrid"}, "--fp8-format is Transformer Engine's, which needs a GPU"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_run_is_refused_in_words(case: str) -> None:
    changes, message = REFUSALS[case]
    check_arguments(arguments(), "cpu")
    with pytest.raises(UsageError) as refusal:
        check_arguments(arguments(**changes), "cpu")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"fp8": "hybrid"}, "--fp8-format"), ({"transformer_impl": "transformer_engine"}, "--transformer-impl")],
)
def test_what_needs_transformer_engine_is_refused_without_it(changes: dict[str, object], flag: str) -> None:
    check_precision(arguments(transformer_impl="local"), "cuda", has_engine=False)
    with pytest.raises(UsageError, match=f"^{flag}.* needs Transformer Engine, .* Install it for this torch"):
        check_precision(arguments(**changes), "cuda", has_engine=False)
