"""`--attention ledom`: training in natural order gives the losses of training on reversed ids with a causal mask."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import Pretrain

from megatron_ledom.train.metrics import TRAIN_LOSS, read_scalars

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
STEPS = 50
# Both runs of a pair have the same layout: with sequence parallelism a fresh start has other weights.
FOUR_RANKS = [
    *("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--sequence-parallel"),
    *("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1),
]


@pytest.mark.parametrize(
    ("num_processes", "layout"), [(1, []), (4, FOUR_RANKS)], ids=["TP1 PP1", "TP2 PP2, sequence parallel, recomputed"]
)
def test_natural_order_gives_the_losses_of_reversed_order(
    num_processes: int, layout: list[object], tmp_path: Path, prefixes: dict[str, Path], pretrain: Pretrain
) -> None:
    flags = ["--num-layers", 4, "--train-iters", STEPS, *layout]
    # A reversed file read as it is, Megatron's attention; a forward file, whose documents are in natural order, ours.
    pretrain(tmp_path / "reversed", num_processes, *flags, "--attention", "megatron", "--layer-kernels", "megatron")
    natural = ["--data-path", prefixes["forward"], "--attention", "ledom"]
    pretrain(tmp_path / "natural", num_processes, *flags, *natural)
    reversed_, natural_ = (read_scalars(tmp_path / name, TRAIN_LOSS) for name in ("reversed", "natural"))
    assert len(reversed_) == STEPS and reversed_.keys() == natural_.keys()
    worst = max(abs(natural_[step] / reversed_[step] - 1) for step in reversed_)
    print(f"{num_processes} ranks: the largest relative difference over {STEPS} steps is {worst:.1e}")
    assert worst <= TOLERANCE
    assert reversed_[STEPS] < reversed_[1] - 1, "the runs have learnt nothing"
