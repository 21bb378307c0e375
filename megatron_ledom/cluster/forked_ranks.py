"""Several gloo ranks on this machine, forked from one process that has imported Megatron already.

torchrun starts every rank from nothing, and importing torch and Megatron costs each of them seconds; a forked rank
starts in milliseconds with the imports of its parent. It is for small checks on CPUs: the parent must not have touched
CUDA, and must not have started threads that hold locks.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from megatron_ledom.errors import LedomError, ParityError

TAIL_LINES = 15


def run_ranks(num_ranks: int, work: Callable[[], object], logs: Path, *, timeout_s: float) -> None:
    """Fork `num_ranks` processes, run `work` in each of them as a rank of one group, and wait for all.

    Args:
        num_ranks: processes; each sees RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as under torchrun.
        work: called without arguments in every rank; what it changes is lost with the process.
        logs: a folder, made if absent; LOGS/rank-N.txt holds what rank N printed.
        timeout_s: after so long every rank is ended.

    Raises:
        ParityError: a rank failed or time ran out; the message ends with the last lines of the first rank that failed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    children: dict[int, int] = {}
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            _be_rank(rank, num_ranks, port, work, logs / f"rank-{rank}.txt")
        children[child] = rank
    failed = _wait(children, time.monotonic() + timeout_s)
    if failed is not None:
        rank, reason = failed
        lines = (logs / f"rank-{rank}.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        raise ParityError("\n".join([f"rank {rank} of {num_ranks} {reason}; its last lines:", *lines[-TAIL_LINES:]]))


def _wait(children: dict[int, int], deadline: float) -> tuple[int, str] | None:
    """Wait for every child; at the first failure, or when time is up, end the others. Returns that rank and why."""
    failed: tuple[int, str] | None = None
    while children:
        for child, rank in list(children.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            del children[child]
            code = os.waitstatus_to_exitcode(status)
            if code and failed is None:
                failed = rank, f"ended with status {code}"
                _end(children)
        if time.monotonic() > deadline and failed is None and children:
            failed = min(children.values()), "was not done in time"
            _end(children)
        time.sleep(0.02)
    return failed


def _end(children: dict[int, int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _be_rank(rank: int, num_ranks: int, port: int, work: Callable[[], object], log: Path) -> None:
    """Run `work` as one rank and end the process; never returns."""
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)})
        os.environ.update({"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        with open(descriptor, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):  # noqa: PTH123
            status = _status_of(work)
    finally:
        os._exit(status)


def _status_of(work: Callable[[], object]) -> int:
    """Run `work`; what it raises is printed, since nobody else will, and becomes a status."""
    try:
        work()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except LedomError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
