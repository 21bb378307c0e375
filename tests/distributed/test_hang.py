"""A rank that is stopped from outside while others wait for it is named, and the job ends with the reason."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from fork_server import ForkServer
from small_run import NARROW

from megatron_ledom.train.hang_watch import HANG_STATUS

pytestmark = pytest.mark.distributed


def test_a_stopped_rank_is_named_with_collective_and_step(
    tmp_path: Path, fork_server: ForkServer, data_arguments: list[object]
) -> None:
    run = tmp_path / "run"
    flags = [*NARROW, *data_arguments, "--run-dir", run, "--train-iters", 100_000, "--hang-timeout", 10]
    launch = fork_server.start(flags, 2, tmp_path / "log")
    assert launch.wait_for("iteration        5/"), launch.text[-6000:]
    launch.signal(signal.SIGSTOP, rank=1)
    statuses = launch.wait()
    assert statuses == [HANG_STATUS, -signal.SIGKILL], launch.text[-6000:]
    (line,) = [line for line in launch.text.splitlines() if "hang: " in line]
    found = re.search(r"rank 1 has not answered for (\d+) s, step (\d+) \(.*; rank 0 waits in (\w+) \(megatron\.", line)
    assert found, line
    last = max(int(step) for step in re.findall(r"iteration +(\d+)/", launch.text))
    assert int(found[2]) in (last, last + 1), (line, last)
    assert line.removeprefix("error: ") in (run / "hang.txt").read_text()
