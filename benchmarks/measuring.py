"""What the benchmarks share: the machine's name, a run's wall time and peak memory, and how results are kept."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Run:
    """One process, finished.

    Attributes:
        wall_s: from its start to its end.
        cpu_s: of it and its children.
        peak_rss_bytes: the largest resident set of one process among them, as the kernel counts.
        tree_bytes: the resident sets of all of them together, twenty times a second.
        stdout: what it printed.
    """

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    tree_bytes: list[int]
    stdout: str


def processor_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def tree_rss_bytes(pid: int) -> int:
    """The resident sets of a process and all below it, together; pages that a fork shares count in each."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total


def run_measured(command: Sequence[str], env: Mapping[str, str]) -> Run:
    """Run a command, its standard error shown, and measure it.

    Raises:
        RuntimeError: it failed.
    """
    started, samples, is_over = time.perf_counter(), [0], threading.Event()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(env))

    def watch() -> None:
        while not is_over.wait(0.05):
            samples.append(tree_rss_bytes(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert child.stdout is not None
    stdout = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall_s = time.perf_counter() - started
    is_over.set()
    watcher.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {child.returncode}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, samples, stdout)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return median, least and most."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def write_record(
    output: Path | None, claim: str, holds: bool, command: str, load_before: float, **results: Any
) -> None:
    """Write what was found, with the machine, the date and the command; nothing where `output` is None."""
    record = {
        "claim": claim,
        "holds": holds,
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "load_before": round(load_before, 2),
        "command": command,
        **results,
    }
    if output is not None:
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Print a line at once, on standard error."""
    print(text, file=sys.stderr, flush=True)
