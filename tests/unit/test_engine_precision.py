"""`--precision`: each name becomes arguments that Megatron's own validation takes, or is refused in words."""

from __future__ import annotations

import argparse
import json

import pytest

from megatron_ledom.engine import precision
from megatron_ledom.engine.precision import PRECISIONS, check_gpu, check_precision, precision_defaults
from megatron_ledom.errors import UsageError
from megatron_ledom.testing import run_program

VALIDATE = """
import json, warnings
warnings.simplefilter("ignore")
from megatron_ledom.engine import cpu
cpu.install()  # torch.cuda then answers for a device of compute capability 9.0, as an H100 does
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.global_vars import destroy_global_vars
from megatron.training.models.gpt import GPTModelBuilder
from megatron_ledom.checkpoint.model import start_one_rank
from megatron_ledom.engine.arguments import check_arguments, set_megatron_arguments
from megatron_ledom.engine.precision import PRECISIONS
from megatron_ledom.errors import UsageError
from megatron_ledom.model.spec import build_layer_spec

start_one_rank()

def parts_of_the_model(config):
    "Build it without memory, since its weights in FP8 would need a GPU; the engine asks for one before that."
    torch.cuda.is_available = lambda: True
    config.transformer_layer_spec = build_layer_spec
    config.finalize()
    config.transformer.init_model_with_meta_device = True
    model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    return sorted({type(m).__name__ for m in model.modules()}), sorted(model.state_dict())

assert torch.cuda.get_device_capability() == (9, 0)
argv = "--preset 7b --run-dir unused --mock-data --tokenizer-type NullTokenizer --vocab-size 64255"
argv += " --transformer-impl transformer_engine --tensor-model-parallel-size 1"
argv += " --num-layers 3 --hidden-size 384 --ffn-hidden-size 512 --num-attention-heads 4 --num-query-groups 2"
names = ("fp8", "fp8_recipe", "fp8_param", "first_last_layers_bf16", "fp8_amax_history_len", "fp8_amax_compute_algo")
for name in PRECISIONS:
    args = set_megatron_arguments([*argv.split(), "--precision", name], "cuda")
    config = gpt_config_from_args(args)
    found = {key: getattr(config.transformer, key) for key in names} | {"bf16": config.transformer.bf16}
    try:
        check_arguments(args, "cuda")
        found["parts"], found["keys"] = parts_of_the_model(config) if HAVE_TE else (None, None)
    except UsageError as error:
        found["refusal"] = str(error)
    print("FOUND", json.dumps({"name": name, "has_engine": HAVE_TE} | found), flush=True)
    destroy_global_vars()
    destroy_num_microbatches_calculator()
"""


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Precision -> Megatron's configuration after its validation for a GPU of compute capability 9.0."""
    done = run_program(VALIDATE, tmp_path_factory.mktemp("validate"))
    records = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    return {record["name"]: record for record in records}


def test_every_name_passes_megatrons_validation_as_on_an_h100(validated: dict[str, dict[str, object]]) -> None:
    assert set(validated) == set(PRECISIONS)
    wanted = {
        "bf16": (None, None, False, False, None, None),
        "fp8-delayed": ("hybrid", "delayed", True, False, 1024, "max"),
        "fp8-tensorwise": ("hybrid", "tensorwise", True, True, None, None),
        "fp8-blockwise": ("e4m3", "blockwise", False, False, None, None),
    }
    keys = ("fp8", "fp8_recipe", "fp8_param", "first_last_layers_bf16", "fp8_amax_history_len", "fp8_amax_compute_algo")
    for name, values in wanted.items():
        found = validated[name]
        assert found["bf16"] is True
        for key, value in zip(keys, values, strict=True):
            if value is not None:
                assert found[key] == value, f"{name}: {key}"
    assert validated["bf16"]["fp8"] is None


def test_with_transformer_engine_its_layers_are_taken_and_without_it_the_message_says_what_to_install(
    validated: dict[str, dict[str, object]],
) -> None:
    for name, found in validated.items():
        if found["has_engine"]:
            parts, keys = found["parts"], found["keys"]
            assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"} <= set(parts), (
                name
            )  # type: ignore[call-overload]
            # The names under which checkpoints and conversion know the weights.
            assert "decoder.layers.2.mlp.linear_fc1.layer_norm_weight" in keys, name  # type: ignore[operator]
            continue
        refusal = str(found["refusal"])
        assert "needs Transformer Engine, which this Python cannot import. Install it for this torch" in refusal
        assert "transformer-engine[pytorch]" in refusal and ("--device cpu" in refusal) == name.startswith("fp8")


def arguments(**changes: object) -> argparse.Namespace:
    settings: dict[str, object] = {
        "precision": None,
        "fp16": False,
        "bf16": True,
        "fp8": None,
        "fp8_recipe": "delayed",
        "fp8_param_gather": False,
        "first_last_layers_bf16": False,
        "shadow_every": 0,
        "pipeline_model_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "num_experts": None,
        "multi_latent_attention": False,
        "spec": None,
        "normalization": "RMSNorm",
        "recompute_granularity": None,
        "recompute_modules": None,
        "transformer_impl": "transformer_engine",
        "hidden_size": 3072,
        "ffn_hidden_size": 24576,
        "num_attention_heads": 16,
        "kv_channels": 192,
        "seq_length": 8192,
        "micro_batch_size": 1,
    }
    return argparse.Namespace(**settings | changes)


ON_THE_CPU = {
    "Megatron's flag": ({"fp8": "hybrid"}, "--fp8-format is Transformer Engine's, which needs a GPU"),
    "weights in FP8": ({"precision": "fp8-delayed", "fp8_param_gather": True}, "--fp8-param-gather is Transformer"),
    "experts": ({"precision": "fp8-delayed", "num_experts": 4}, "emulated in dense layers with RMSNorm only"),
    "half precision": ({"precision": "fp8-delayed", "fp16": True}, "and --fp16: what is not FP8 is BF16"),
    "single precision": ({"precision": "bf16", "bf16": False}, "--precision bf16 and --no-bf16"),
    "recomputation": ({"precision": "fp8-delayed", "recompute_granularity": "full"}, "cannot recompute linear layers"),
    "ends in BF16": ({"precision": "fp8-delayed", "first_last_layers_bf16": True}, "Megatron has no such combination"),
    "a shadow of nothing": ({"precision": "bf16", "shadow_every": 10}, "this run has no FP8"),
    "a shadow in a pipeline": (
        {"precision": "fp8-blockwise", "shadow_every": 10, "pipeline_model_parallel_size": 2},
        "which a pipeline has no place for",
    ),
}


@pytest.mark.parametrize("case", ON_THE_CPU)
def test_what_the_cpu_cannot_do_is_refused(case: str) -> None:
    changes, message = ON_THE_CPU[case]
    for name in PRECISIONS:
        check_precision(arguments(precision=name), "cpu", has_engine=False)
    with pytest.raises(UsageError) as refusal:
        check_precision(arguments(**changes), "cpu", has_engine=False)
    assert message in str(refusal.value)


def test_flags_that_say_something_else_are_refused() -> None:
    with pytest.raises(UsageError, match="means the recipe tensorwise, Megatron's flags say delayed"):
        check_precision(arguments(precision="fp8-tensorwise", fp8="hybrid"), "cuda", has_engine=True)
    with pytest.raises(UsageError, match="means the recipe BF16, Megatron's flags say delayed"):
        check_precision(arguments(precision="bf16", fp8="hybrid"), "cuda", has_engine=True)
    with pytest.raises(UsageError, match=r"none can be left out\. Use fp8-tensorwise"):
        changes = {"precision": "fp8-delayed", "fp8": "hybrid", "first_last_layers_bf16": True}
        check_precision(arguments(**changes), "cuda", has_engine=True)


@pytest.mark.parametrize(
    ("recipe", "capability", "version", "message"),
    [
        ("delayed", (8, 0), "2.20.0", "needs a GPU of compute capability 8.9 or later, this one has 8.0"),
        ("blockwise", (8, 9), "2.20.0", "needs a GPU of compute capability 9.0 or later, this one has 8.9"),
        ("blockwise", (9, 0), "2.2.1", "needs Transformer Engine 2.3, found 2.2.1"),
        ("tensorwise", (9, 0), "2.1+abc", "needs Transformer Engine 2.2, found 2.1"),
    ],
)
def test_a_gpu_or_an_engine_without_the_recipe_is_named(
    recipe: str, capability: tuple[int, int], version: str, message: str
) -> None:
    args = arguments(fp8="hybrid", fp8_recipe=recipe)
    check_gpu(args, (9, 0), "2.10.0")
    with pytest.raises(UsageError) as refusal:
        check_gpu(args, capability, version)
    assert message in str(refusal.value)


def test_the_cpu_takes_bf16_and_what_the_emulation_follows() -> None:
    assert precision_defaults(None, "cpu") == {}
    assert precision_defaults("fp8-delayed", "cpu") == {"bf16": True, "fp8_amax_history_len": 1024}
    assert precision_defaults("fp8-tensorwise", "cpu") == {"bf16": True, "first_last_layers_bf16": True}
    assert precision_defaults("fp8-blockwise", "cuda") == {"bf16": True, "fp8": "e4m3", "fp8_recipe": "blockwise"}


def test_the_documented_flags_are_the_settings() -> None:
    assert precision.__doc__ is not None
    words = precision.__doc__.replace("--bf16", " --bf16").split()
    starts = {name: words.index(name) for name in PRECISIONS} | {"": words.index("None")}
    for (name, start), end in zip(starts.items(), [*starts.values()][1:], strict=False):
        documented, settings = words[start + 1 : end], PRECISIONS[name].settings
        flags = {f"--{key.replace('_', '-')}" if key != "fp8" else "--fp8-format": settings[key] for key in settings}
        assert {word for word in documented if word.startswith("--")} == set(flags), name
        for flag, value in flags.items():
            assert value is True or documented[documented.index(flag) + 1] == str(value)
