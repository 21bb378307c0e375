"""What computes norms, SwiGLU and the loss in a run: the choice, its refusals, our modules against Megatron's own."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_ledom.errors import UsageError
from megatron_ledom.model import layers
from megatron_ledom.model.layers import LEDOM, MEGATRON, plan_layers
from megatron_ledom.testing import run_program

SETTINGS = {
    "layer_kernels": "auto",
    "num_experts": None,
    "multi_latent_attention": False,
    "spec": None,
    "fp16": False,
    "transformer_impl": "local",
}


def arguments(**changed: object) -> argparse.Namespace:
    return argparse.Namespace(**SETTINGS | changed)


def test_the_cpu_takes_the_kernels_and_cuda_what_megatron_has() -> None:
    assert plan_layers(arguments(), "cpu").kind == LEDOM
    assert plan_layers(arguments(layer_kernels="megatron"), "cpu").kind == MEGATRON
    plan = plan_layers(arguments(), "cuda")
    assert (plan.kind, plan.reason) == (MEGATRON, "these kernels run on the CPU")
    with pytest.raises(UsageError, match="--layer-kernels ledom: these kernels run on the CPU"):
        plan_layers(arguments(layer_kernels="ledom"), "cuda")


def test_without_kernels_the_cpu_takes_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "load_kernels", lambda: "the extension is not built")
    plan = plan_layers(arguments(), "cpu")
    assert (plan.kind, plan.reason) == (MEGATRON, "the extension is not built")
    with pytest.raises(UsageError, match="the extension is not built"):
        plan_layers(arguments(layer_kernels="ledom"), "cpu")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"num_experts": 4}, "num-experts"),
        ({"multi_latent_attention": True}, "multi-latent-attention"),
        ({"fp16": True}, "fp16"),
        ({"spec": ["a", "b"]}, "spec"),
        ({"transformer_impl": "transformer_engine"}, "transformer-impl transformer_engine"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused_or_left_to_megatron(changed: dict[str, object], word: str) -> None:
    plan = plan_layers(arguments(**changed), "cpu")
    assert plan.kind == MEGATRON and plan.reason.startswith("--")
    with pytest.raises(UsageError, match=f"--layer-kernels ledom: --{word}"):
        plan_layers(arguments(layer_kernels="ledom", **changed), "cpu")


SCRIPT = """
import argparse
import torch
from megatron.core import tensor_parallel
from megatron_ledom.checkpoint.model import build_megatron_model, start_one_rank
from megatron_ledom.engine import cpu
from megatron_ledom.engine.arguments import set_megatron_arguments
from megatron_ledom.model import spec
from megatron_ledom.model.cross_entropy import vocab_parallel_cross_entropy
from megatron_ledom.model.layers import LayerPlan, is_plain_swiglu
from megatron_ledom.ops import products

products.is_onednn_faster = lambda: True  # whatever this processor
start_one_rank()
build, megatrons = spec.build_layer_spec, tensor_parallel.vocab_parallel_cross_entropy
tokens = torch.arange(2 * 40).view(2, 40) * 7 % 100
argv = "--preset tiny --num-layers 2 --run-dir unused --mock-data --tokenizer-type NullTokenizer --vocab-size 100"
plain = set_megatron_arguments(argv.split(), "cpu")
for changed in ({}, {"add_bias_linear": True}, {"swiglu": False}):
    args = argparse.Namespace(**vars(plain) | changed)
    for kind in ("megatron", "ledom"):
        plan = LayerPlan(kind, "")
        spec.build_layer_spec = lambda config, vp_stage=None, plan=plan: build(config, vp_stage, None, plan)
        if plan.is_ours:
            cpu.use_cross_entropy(vocab_parallel_cross_entropy)
        torch.manual_seed(1)
        model = build_megatron_model(args)
        names = {type(m).__name__ for m in model.modules()}
        ours = {"FusedRMSNorm", "FusedMLP", "FasterColumnParallelLinear", "FasterRowParallelLinear"}
        assert ours <= names if plan.is_ours else not ours & names, names
        assert is_plain_swiglu(model.config) == (not changed), changed
        if kind == "megatron":
            state = model.state_dict()
        model.load_state_dict(state)
        loss = model(tokens, torch.zeros_like(tokens), None, labels=tokens)
        (loss * torch.linspace(0, 1, 40)).sum().backward()
        found = [loss.detach(), *(p.grad for p in model.parameters())]
        if kind == "megatron":
            expected = found
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
        print("WORST", kind, worst, *changed)
    cpu.restore()
    assert tensor_parallel.vocab_parallel_cross_entropy is megatrons
    cpu.install()
"""


def test_a_model_with_the_kernels_has_the_losses_and_gradients_of_megatrons(tmp_path: Path) -> None:
    """Whole models: SwiGLU; with biases, and with another activation, where the feed-forward layer is Megatron's."""
    done = run_program(SCRIPT, tmp_path)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("WORST")]
    print(done.stdout[-2000:])
    assert len(lines) == 6
    assert all(float(line[2]) < 1e-5 for line in lines), lines
