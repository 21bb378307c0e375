"""A run that is killed between two checkpoints ends, at another layout, where an uninterrupted one ends."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest
from small_run import SMALL, Pretrain

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.testing import tool_environment, torchrun_command
from megatron_ledom.train.metrics import TRAIN_LOSS, VALIDATION_LOSS, read_scalars

pytestmark = pytest.mark.distributed

LENGTH = ["--train-iters", 12, "--save-interval", 4]
KILL_AFTER = 6
TIMEOUT_S = 240


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL torchrun and every rank: ranks live in sessions of their own, so a process group would miss them."""
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in tree:
        each.kill()
    process.wait()


def run_until_killed(run: Path, arguments: list[object], log: Path) -> None:
    with log.open("w") as output:
        process = subprocess.Popen(
            torchrun_command("pretrain.py", 2, [*SMALL, *arguments, "--run-dir", run]),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env=tool_environment(),
        )
        deadline = time.monotonic() + TIMEOUT_S
        while f"iteration {KILL_AFTER:8d}/" not in log.read_text():
            assert process.poll() is None, f"the run ended by itself:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.05)
        kill_tree(process)


def test_killed_run_resumed_at_another_layout_ends_as_the_uninterrupted_one(
    tmp_path: Path, pretrain: Pretrain, data_arguments: list[object]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = [*LENGTH, "--tensor-model-parallel-size", 2]  # the same for both: the initial weights depend on TP
    pretrain(whole, 2, *start)

    run_until_killed(killed, [*data_arguments, *start], tmp_path / "killed.log")
    assert max(read_scalars(killed, TRAIN_LOSS)) >= KILL_AFTER
    assert Checkpoint.open(killed / "checkpoints").iteration == 4, "killed between the checkpoints of steps 4 and 8"
    pretrain(killed, 2, *LENGTH, "--pipeline-model-parallel-size", 2)

    assert read_scalars(killed, VALIDATION_LOSS)[12] == pytest.approx(
        read_scalars(whole, VALIDATION_LOSS)[12], rel=1e-5
    )
    expected, found = read_scalars(whole, TRAIN_LOSS), read_scalars(killed, TRAIN_LOSS)
    assert found == pytest.approx(expected, rel=1e-5), "every step, before the kill and after the resume"
