"""The layer specification: ours for dense local layers with RMSNorm, Megatron's own for everything else."""

from __future__ import annotations

from pathlib import Path

from megatron_ledom.testing import run_program

SCRIPT = """
import copy
from megatron_ledom.checkpoint.model import build_megatron_model, start_one_rank
from megatron_ledom.engine.arguments import set_megatron_arguments

start_one_rank()
argv = "--preset tiny --num-layers 2 --run-dir unused --mock-data --tokenizer-type NullTokenizer --vocab-size 100"
dense = set_megatron_arguments(argv.split(), "cpu")
experts = copy.copy(dense)
experts.num_experts = 4
for args in (dense, experts):
    kinds = {f"{type(m).__module__}.{type(m).__name__}" for m in build_megatron_model(args).modules()}
    print("LAYERS", *sorted(kinds))
"""


def test_experts_are_megatrons_and_dense_layers_take_our_norm(tmp_path: Path) -> None:
    done = run_program(SCRIPT, tmp_path)
    dense, experts = (line for line in done.stdout.splitlines() if line.startswith("LAYERS"))
    assert "megatron_ledom.model.spec.RMSNorm" in dense and "MoELayer" not in dense
    assert "MoELayer" in experts and "TopKRouter" in experts
