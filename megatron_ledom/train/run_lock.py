"""One launch at a time writes in a run's folder of checkpoints.

    RUN/checkpoints/.lock    held by rank 0 as long as it lives; says which process that is

A job that was submitted twice would otherwise take the other's unfinished save for what a kill had left, and both
would write the same steps. The lock is one of POSIX: what a rank has forked, and what may outlive it for a moment (an
asynchronous save), does not hold it, and the kernel gives it back however the process ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from megatron_ledom.errors import OutputExistsError
from megatron_ledom.log import get_logger

LOCK = ".lock"
_WAIT_S = 60.0
"""How long a launch waits for the one before: killed processes take a while to end, and file servers to notice."""
_POLL_S = 0.5
_BUSY = (errno.EACCES, errno.EAGAIN)
_MAX_HOLDER_BYTES = 200


def hold_checkpoints(save: Path, wait_s: float = _WAIT_S) -> None:
    """Hold the lock of a folder of checkpoints until this process ends; again in the same process, it does nothing new.

    Where the file system has no locks, or the folder cannot be written, the log says so and nothing is held.

    Args:
        save: an existing folder.
        wait_s: for another process that holds it.

    Raises:
        OutputExistsError: another process still holds it.
    """
    deadline, is_told = time.monotonic() + wait_s, False
    while (holder := _take(save)) is not None:
        if time.monotonic() >= deadline:
            raise OutputExistsError(
                f"{save}: another launch of this run is under way ({holder}), and two would write over each other's "
                f"checkpoints. Stop it, or give another --run-dir. If it is gone (its node crashed), remove "
                f"{save / LOCK}"
            )
        if not is_told:
            get_logger(__name__).info("%s is held by %s: waiting up to %.0f s for its end", save, holder, wait_s)
            is_told = True
        time.sleep(_POLL_S)


def _take(save: Path) -> str | None:
    """Take the lock if it is free; return who holds it otherwise."""
    path = save / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        _go_without(save, error)
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        said = os.read(descriptor, _MAX_HOLDER_BYTES).decode("utf-8", "replace")
        os.close(descriptor)
        if error.errno in _BUSY:
            return said or "a process that has just begun"
        _go_without(save, error)
        return None
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
        os.close(descriptor)
        return "a process whose lock was removed just now"
    job = os.environ.get("SLURM_JOB_ID")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}".encode())
    return None  # the descriptor stays open: closing it would give the lock back


def _go_without(save: Path, error: OSError) -> None:
    get_logger(__name__).warning("%s cannot be locked (%s): start no second launch there", save, error.strerror)
