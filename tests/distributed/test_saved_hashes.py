"""Every save of a run gets its checksums while the run goes on, and a resume compares them."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import SMALL, Pretrain

from megatron_ledom.checkpoint.integrity import verify_checksums
from megatron_ledom.testing import run_distributed

pytestmark = pytest.mark.distributed


def test_every_save_has_checksums_and_a_resume_compares_them(
    tmp_path: Path, pretrain: Pretrain, data_arguments: list[object]
) -> None:
    run = tmp_path / "run"
    length = ["--train-iters", 6, "--save-interval", 2]
    pretrain(run, 2, *length, "--exit-interval", 4)
    steps = [run / "checkpoints" / f"iter_{step:07d}" for step in (2, 4)]
    assert [verify_checksums(step) for step in steps] == [True, True]

    file = steps[1] / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    arguments = [*SMALL, *data_arguments, "--run-dir", run, *length]
    refused = run_distributed("pretrain.py", 2, *arguments)
    assert refused.returncode != 0
    assert "__1_0.distcp has changed since it was saved" in refused.stderr
    assert "--no-verify-checkpoint" in refused.stderr

    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    pretrain(run, 2, *length, "--async-save")
    assert verify_checksums(steps[1].with_name("iter_0000006"))
