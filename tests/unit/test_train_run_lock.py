"""Two launches of one run: the second waits and is refused before it touches anything; a dead one holds nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ledom.engine.rendezvous import Agreement
from megatron_ledom.errors import OutputExistsError
from megatron_ledom.testing import tool_environment
from megatron_ledom.train import resume
from megatron_ledom.train.run_lock import LOCK, hold_checkpoints

# Holds the folder until it is ended; its fork lives as long as the pipe.
HOLDER = """
import os, signal, sys
from pathlib import Path
from megatron_ledom.train.run_lock import hold_checkpoints
hold_checkpoints(Path(sys.argv[1]))
hold_checkpoints(Path(sys.argv[1]))  # in one process as often as one likes
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
signal.pause()
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the folder until the block ends or it is killed."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    environment = tool_environment({"SLURM_JOB_ID": "4711"})
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()
            holder.stdin.close()


def test_a_second_launch_is_refused_before_it_touches_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    under_way = checkpoints / ".iter_0000010.launch1.partial"
    under_way.mkdir(parents=True)
    monkeypatch.setattr(resume, "hold_checkpoints", functools.partial(hold_checkpoints, wait_s=0.2))
    with held(checkpoints) as holder:
        who = rf"process {holder.pid} on {socket.gethostname()}, job 4711"
        with pytest.raises(
            OutputExistsError, match=rf"another launch of this run is under way \({who}\).*remove .*lock"
        ):
            resume.settle_checkpoint(["--run-dir", str(checkpoints.parent)], Agreement())
        assert under_way.is_dir()
        resume.settle_checkpoint(["--run-dir", str(checkpoints.parent), "--data-report-only"], Agreement())
        assert under_way.is_dir()
        holder.kill()
        holder.wait()
        resume.settle_checkpoint(["--run-dir", str(checkpoints.parent)], Agreement())  # its fork lives
    assert not under_way.exists()


def test_a_launch_waits_for_the_one_before(tmp_path: Path, log_of: Callable[[str], pytest.LogCaptureFixture]) -> None:
    log = log_of("megatron_ledom.train.run_lock")
    with held(tmp_path) as holder:
        end = threading.Timer(1.0, holder.terminate)
        end.start()
        hold_checkpoints(tmp_path, wait_s=60)
        end.join()
    assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
    assert f"is held by process {holder.pid}" in log.text


def test_a_lock_that_was_removed_by_hand_holds_nothing(tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / LOCK).unlink()
        hold_checkpoints(tmp_path, wait_s=0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_the_log_says_so(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_of: Callable[[str], pytest.LogCaptureFixture],
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    log = log_of("megatron_ledom.train.run_lock")
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    hold_checkpoints(tmp_path)
    assert f"{tmp_path} cannot be locked ({os.strerror(number)}): start no second launch there" in log.text
