"""The layout does not change what is computed: twenty steps from one checkpoint, the same loss at each."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import Pretrain

from megatron_ledom.train.metrics import TRAIN_LOSS, VALIDATION_LOSS, read_scalars

pytestmark = pytest.mark.distributed

TENSOR, PIPELINE, VIRTUAL = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
)
LAYOUTS: dict[str, tuple[int, list[object]]] = {
    "TP2": (2, [TENSOR, 2]),
    "PP2": (2, [PIPELINE, 2]),
    "TP2 PP2": (4, [TENSOR, 2, PIPELINE, 2]),
    "DP2": (2, []),
    "TP2 + SP": (2, [TENSOR, 2, "--sequence-parallel"]),
    "PP4, 2 virtual stages": (4, [PIPELINE, 4, VIRTUAL, 1]),
}
TOLERANCE = 1e-5
FIRST, LAST = 2, 21


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, pretrain: Pretrain) -> Path:
    """A checkpoint after one step at TP1 PP1, optimizer state included."""
    run = tmp_path_factory.mktemp("layouts") / "start"
    pretrain(run, 1, "--train-iters", LAST, "--exit-interval", 1, "--save-interval", 1000)
    return run / "checkpoints"


def losses(run: Path, curve: str) -> list[float]:
    return [value for step, value in read_scalars(run, curve).items() if FIRST <= step <= LAST]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, pretrain: Pretrain) -> tuple[list[float], list[float]]:
    run = checkpoint.parent.parent / "one-rank"
    pretrain(run, 1, "--load", checkpoint, "--train-iters", LAST, "--save-interval", 1000)
    return losses(run, TRAIN_LOSS), losses(run, VALIDATION_LOSS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_have_the_losses_of_one_rank(
    layout: str, checkpoint: Path, expected: tuple[list[float], list[float]], pretrain: Pretrain
) -> None:
    num_processes, flags = LAYOUTS[layout]
    run = checkpoint.parent.parent / layout.replace(" ", "-")
    pretrain(run, num_processes, *flags, "--load", checkpoint, "--train-iters", LAST, "--save-interval", 1000)
    found = losses(run, TRAIN_LOSS), losses(run, VALIDATION_LOSS)
    assert len(found[0]) == len(expected[0]) == LAST - FIRST + 1
    worst = max(abs(a / b - 1) for a, b in zip(found[0], expected[0], strict=True))
    print(f"{layout}: largest relative difference of a step's loss {worst:.1e}")
    assert worst <= TOLERANCE
    assert found[1] == pytest.approx(expected[1], rel=TOLERANCE)
    assert found[0][-1] < found[0][0] - 0.1, "the loss must fall, else equality says little"
