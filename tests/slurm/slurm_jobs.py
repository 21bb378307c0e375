"""Ways to submit the scripts of examples/slurm with the CPU engine, and to follow a job through its restarts."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from local_slurm import LocalSlurm

TIMEOUT_S = 900


@dataclass
class Job:
    """A submitted job and its log."""

    slurm: LocalSlurm
    number: int
    log: Path
    seen: int = field(default=0)

    def text(self) -> str:
        """The whole log."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait_for(self, pattern: str) -> str:
        """Wait for a line that matches, after those of the last call, and return it."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (match := re.compile(pattern, re.M).search(self.text().rpartition("\n")[0], self.seen)):
            states = self.slurm.states(self.number)
            assert time.monotonic() < deadline and "COMPLETED" not in states, f"no {pattern!r}: {states}\n{self.end()}"
            if states == ["PENDING"] and self.slurm.field(self.number, "Restarts") != "0":
                self.slurm.start_now(self.number)
            time.sleep(0.05)
        self.seen = match.end()
        return match[0]

    def wait(self) -> list[str]:
        """Wait until the job has ended for good and return its state, or those of an array's tasks."""
        return self.slurm.wait(self.number, TIMEOUT_S)

    def end(self) -> str:
        """The end of the log, for messages."""
        return self.text()[-5000:]

    def last_line(self) -> str:
        """The last line of the log."""
        return self.text().rstrip("\n").rsplit("\n", 1)[-1]


def wait_for_tasks(*words: str, count: int = 1) -> list[psutil.Process]:
    """Wait until `count` Python processes have command lines that hold all `words`, and return them."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or [""]
            if "python" in Path(line[0]).name and set(words) <= set(line):
                found.append(process)
        if len(found) >= count:
            return found
        time.sleep(0.01)
    raise AssertionError(f"fewer than {count} processes with {words}")


@dataclass(frozen=True)
class Scripts:
    """Submits scripts of examples/slurm; logs go to `folder`."""

    slurm: LocalSlurm
    folder: Path

    def submit(self, script: str, *flags: object, options: tuple[object, ...] = (), **variables: object) -> Job:
        """Submit a script with `flags` after its name, sbatch's `options` and environment variables."""
        venv = Path(sys.executable).parent.parent
        env = {"VENV": str(venv), "RUNTIME": "venv", "DEVICE": "cpu", "PRESET": "tiny", "TP": "1", "PREFLIGHT": "0"}
        env |= {name: str(value) for name, value in variables.items()}
        options = ("--cpus-per-task=1", "--output", self.folder / "%A-%a.log", *options)
        number = self.slurm.submit(f"examples/slurm/{script}", *flags, options=options, env=env)
        task = next(
            (str(o).removeprefix("--array=").split("-")[0] for o in options if "--array=" in str(o)), "4294967294"
        )
        return Job(self.slurm, number, self.folder / f"{number}-{task}.log")
