"""Launches of tools/pretrain.py that start at once: one process imports Megatron, and forks the ranks.

    server = ForkServer(); launch = server.start(argv, world_size=2, log=path); launch.kill(); launch.wait()

Importing is nine tenths of a short run on the CPU, and it touches nothing that these tests are about. What runs
in a rank is the tool's own `main`, with the environment that torchrun would give it; its process group can be
killed or stopped from outside like any other.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.testing import tool_environment

DEADLINE_S = 240.0


@dataclass
class Launch:
    """The ranks of one launch: process ids in the order of ranks."""

    server: ForkServer
    pids: list[int]
    log: Path

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all with the processes that they started."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            try:
                if rank is None:
                    os.killpg(pid, number)
                else:
                    os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL one rank and not what it has started, or everything at once; and wait."""
        self.signal(signal.SIGKILL, rank)
        self.server.statuses(self.pids)

    def wait(self) -> list[int]:
        """Wait for all ranks; their exit statuses, negative for a signal."""
        statuses = self.server.statuses(self.pids)
        self.signal(signal.SIGKILL)  # what a rank has started and left behind
        return statuses

    def wait_for(self, text: str) -> bool:
        """Wait until the log holds `text`; False where the ranks end before."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.text:
            if not self.server.are_alive(self.pids):
                return text in self.text
            assert time.monotonic() < deadline, self.text[-6000:]
            time.sleep(0.02)
        return True

    @property
    def text(self) -> str:
        """What the ranks have printed."""
        return self.log.read_text(errors="replace")


class ForkServer:
    """The process that has everything imported."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=tool_environment(),
        )

    def start(self, argv: Sequence[object], world_size: int, log: Path, env: Mapping[str, str] | None = None) -> Launch:
        port = free_port()
        log.touch()
        order = {"argv": [str(a) for a in argv], "world_size": world_size, "log": str(log), "port": port}
        return Launch(self, self._ask({"start": order | {"env": dict(env or {})}}), log)

    def statuses(self, pids: list[int]) -> list[int]:
        return self._ask({"wait": pids})

    def are_alive(self, pids: list[int]) -> bool:
        return bool(self._ask({"alive": pids})[0])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, request: dict[str, object]) -> list[int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: list[int] = json.loads(self._process.stdout.readline())
        return answer


def free_port() -> int:
    """A free port below those that the system gives out by itself, so that nobody gets it in between."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def serve() -> None:
    """Import, then start ranks for every line of standard input."""
    from megatron_ledom.engine import cpu

    cpu.install()
    import megatron.core.tokenizers.text
    import megatron.training  # noqa: F401 - imported before the forks, once

    import megatron_ledom.model.attention
    import megatron_ledom.model.spec
    import megatron_ledom.ops.kernels  # noqa: F401
    from megatron_ledom.train import pretrain  # noqa: F401

    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = [_fork(request["start"], rank) for rank in range(request["start"]["world_size"])]
        elif "alive" in request:
            answer = [int(all(_status(pid, ended) is None for pid in request["alive"]))]
        else:
            answer = _wait_as_a_launcher_does(request["wait"], ended)
        print(json.dumps(answer), flush=True)


def _wait_as_a_launcher_does(pids: list[int], ended: dict[int, int]) -> list[int]:
    """Wait for all; once one has failed, the others get a moment, and are killed."""
    deadline = None
    while None in (statuses := [_status(pid, ended) for pid in pids]):
        if deadline is None and any(statuses):
            deadline = time.monotonic() + 5
        for pid, status in zip(pids, statuses, strict=True):
            if deadline is not None and time.monotonic() > deadline and status is None:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [status for status in statuses if status is not None]


def _status(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended.get(pid)


def _fork(order: dict[str, object], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    log = os.open(str(order["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(order["world_size"]), "LOCAL_WORLD_SIZE": str(order["world_size"])}
    os.environ |= {"MASTER_PORT": str(order["port"])} | order["env"]  # type: ignore[operator]
    if "FILE_SIZE_LIMIT" in os.environ:  # a disk that takes no more, for one rank
        limit = int(os.environ["FILE_SIZE_LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    sys.argv = ["pretrain.py", *order["argv"]]  # type: ignore[misc]
    status = 1
    try:
        from megatron_ledom.errors import run_cli
        from megatron_ledom.train.pretrain import main

        run_cli(main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
