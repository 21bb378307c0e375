"""A damaged checkpoint and a disk that takes no more: the run falls back, goes on, and says what happened."""

from __future__ import annotations

from pathlib import Path

import pytest
from fork_server import ForkServer
from small_run import NARROW

from megatron_ledom.checkpoint.integrity import verify_checksums
from megatron_ledom.checkpoint.locate import finished_steps, folder_name, read_tracker
from megatron_ledom.train.metrics import TRAIN_LOSS, VALIDATION_LOSS, read_scalars
from megatron_ledom.train.run_lock import LOCK

pytestmark = pytest.mark.distributed

LENGTH = ["--train-iters", 12, "--save-interval", 4]
FULL = {"FILE_SIZE_LIMIT": "200000"}
"""Bytes: data files are larger; the event files and the record of the launch are smaller."""


@pytest.mark.parametrize("mode", ["--async-save", "--no-async-save"])
def test_damage_then_a_full_disk_then_the_same_end(
    mode: str, tmp_path: Path, fork_server: ForkServer, data_arguments: list[object]
) -> None:
    def launch(run: str, status: int, *more: object, env: dict[str, str] | None = None) -> str:
        flags = [*NARROW, *data_arguments, *LENGTH, "--run-dir", tmp_path / run, mode, *more]
        log = tmp_path / f"{run}-{len(list(tmp_path.glob('*.log')))}.log"
        started = fork_server.start(flags, 1, log, env)
        assert started.wait() == [status], started.text[-6000:]
        return started.text

    launch("whole", 0)
    save = tmp_path / "run" / "checkpoints"
    said = launch("run", 0, "--exit-interval", 8)
    assert ("scheduled an async checkpoint save" in said) is (mode == "--async-save")
    assert finished_steps(save) == [4, 8] and all(verify_checksums(save / folder_name(step)) for step in (4, 8))

    file = save / folder_name(8) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = launch("run", 2, env=FULL)
    assert f"warning: {save / folder_name(8)} is damaged: {file} has changed since it was saved" in said
    assert "fell back to step 4" in said and "loading distributed checkpoint" in said and "at iteration 4" in said
    assert "warning: no checkpoint of step 8: " in said and "bytes are free there)" in said
    assert f"The checkpoint of step 4 in {save} is the last one" in said
    assert "iteration       12/" in said, "training went on to its end"
    assert "error: the last save failed: " in said
    assert finished_steps(save) == [4] and read_tracker(save) == 4 and verify_checksums(save / folder_name(4))
    assert [path.name for path in save.glob(".*")] == [LOCK], "nothing half-written is left"

    launch("run", 0)
    assert finished_steps(save) == [4, 8, 12] and verify_checksums(save / folder_name(12))
    assert read_scalars(tmp_path / "run", TRAIN_LOSS) == read_scalars(tmp_path / "whole", TRAIN_LOSS)
    ends = [read_scalars(tmp_path / run, VALIDATION_LOSS)[12] for run in ("run", "whole")]
    assert ends[0] == ends[1]
