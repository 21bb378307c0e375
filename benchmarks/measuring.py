"""What the benchmarks share: the machine's name, a run's wall time and peak memory, and how results are kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One process, finished: wall time, CPU time of it and its children, and the largest of their resident sets."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    stdout: str


def processor_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def run_measured(command: Sequence[str], env: Mapping[str, str]) -> Run:
    """Run a command, its standard error shown, and measure it; the kernel's figures, so that no peak is missed.

    Raises:
        RuntimeError: it failed.
    """
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(env))
    assert child.stdout is not None
    stdout = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - started
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {child.returncode}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, stdout)


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
