"""What computes attention in a run: the choice, its refusals, and our modules against Megatron's own."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.model import attention
from megatron_ledom.model.attention import KERNELS, LEDOM, MEGATRON, plan_attention
from megatron_ledom.testing import run_program

SETTINGS = {
    "attention": "auto",
    "direction": "reverse",
    "context_parallel_size": 1,
    "attention_dropout": 0.0,
    "num_experts": None,
    "multi_latent_attention": False,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
    "fp16": False,
    "spec": None,
    "position_embedding_type": "rope",
}


def arguments(**changed: object) -> argparse.Namespace:
    return argparse.Namespace(**SETTINGS | changed)


def test_the_cpu_takes_the_kernels_and_cuda_what_megatron_has() -> None:
    plan = plan_attention(arguments(), "cpu")
    assert (plan.kind, plan.is_ours, plan.needs_turned_samples) == (KERNELS, True, False)
    assert plan_attention(arguments(), "cuda").kind == MEGATRON
    assert plan_attention(arguments(attention="megatron"), "cpu").kind == MEGATRON


def test_only_a_reverse_model_in_natural_order_needs_turned_samples() -> None:
    plan = plan_attention(arguments(attention="ledom"), "cuda")
    assert (plan.kind, plan.direction, plan.needs_turned_samples) == (LEDOM, Direction.REVERSE, True)
    assert not plan_attention(arguments(attention="ledom", direction="forward"), "cpu").needs_turned_samples


def test_without_kernels_the_cpu_takes_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "load_kernels", lambda: "the extension is not built")
    plan = plan_attention(arguments(), "cpu")
    assert (plan.kind, plan.reason) == (MEGATRON, "the extension is not built")
    assert plan_attention(arguments(attention="ledom"), "cpu").kind == LEDOM  # by torch's path


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"context_parallel_size": 2}, "context-parallel-size"),
        ({"attention_dropout": 0.1}, r"attention-dropout 0\.1"),
        ({"num_experts": 4}, "num-experts"),
        ({"multi_latent_attention": True}, "multi-latent-attention"),
        ({"softmax_type": "learnable"}, "softmax-type learnable"),
        ({"apply_query_key_layer_scaling": True}, "apply-query-key-layer-scaling"),
        ({"fp16": True}, "fp16"),
        ({"spec": ["a", "b"]}, "spec"),
        ({"position_embedding_type": "learned_absolute"}, "position-embedding-type learned_absolute"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused_or_left_to_megatron(changed: dict[str, object], word: str) -> None:
    plan = plan_attention(arguments(**changed), "cpu")
    assert plan.kind == MEGATRON and plan.reason.startswith("--")
    with pytest.raises(UsageError, match=f"--attention ledom: --{word}"):
        plan_attention(arguments(attention="ledom", **changed), "cpu")


SCRIPT = """
import argparse
import torch
from megatron_ledom.checkpoint.model import build_megatron_model, start_one_rank
from megatron_ledom.engine.arguments import set_megatron_arguments
from megatron_ledom.direction import Direction, flip
from megatron_ledom.model import spec
from megatron_ledom.model.attention import AttentionPlan

start_one_rank()
build = spec.build_layer_spec
tokens = torch.arange(2 * 40).view(2, 40) * 7 % 100
argv = "--preset tiny --num-layers 2 --run-dir unused --mock-data --tokenizer-type NullTokenizer --vocab-size 100"
plain = set_megatron_arguments(argv.split(), "cpu")
in_part = {"rotary_interleaved": True, "rotary_percent": 0.5}
changes = ({}, in_part, {"window_size": (9, 0)}, {"position_embedding_type": "none"})
for changed in changes:
    args = argparse.Namespace(**vars(plain) | changed)
    for kind in ("megatron", "kernels", "ledom"):
        plan = AttentionPlan(kind, Direction.REVERSE, "")
        spec.build_layer_spec = lambda config, vp_stage=None, plan=plan: build(config, vp_stage, plan)
        torch.manual_seed(1)
        model = build_megatron_model(args)
        names = {type(m).__name__ for m in model.modules()}
        assert ("CoreAttention" in names) == plan.is_ours == ("DotProductAttention" not in names), names
        if kind == "megatron":
            state = model.state_dict()
        model.load_state_dict(state)
        ids = flip(tokens) if plan.needs_turned_samples else tokens
        loss = model(ids, torch.zeros_like(ids), None, labels=ids)
        loss = flip(loss) if plan.needs_turned_samples else loss
        (loss * torch.linspace(0, 1, 40)).sum().backward()
        found = [loss.detach(), *(p.grad for p in model.parameters())]
        if kind == "megatron":
            expected = found
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
        print("WORST", kind, worst, *changed)
"""


def test_a_model_with_our_attention_has_the_losses_and_gradients_of_megatrons(tmp_path: Path) -> None:
    """Whole models: rotary in both pairings, in part or absent, and a sliding window."""
    done = run_program(SCRIPT, tmp_path)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("WORST")]
    print(done.stdout[-2000:])
    assert len(lines) == 12
    assert all(float(line[2]) < 1e-5 for line in lines), lines
