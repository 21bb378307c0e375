"""NVIDIA's compute-sanitizer over the kernels: memory, races, barriers, uninitialised reads.

Each run is a process without torch (`sanitized`), so that only our kernels are watched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.ops.kernels import kernels
from megatron_ledom.ops.verification import ROPE
from megatron_ledom.ops.verify.clock import Clock

CHILD = Path(__file__).with_name("sanitized.py")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND_EXIT = 66
SEQ = 150
PLANTED = "short"


@dataclass(frozen=True)
class Job:
    """One run: a tool over a part at a head size; with `PLANTED` it must find the fault that is there."""

    tool: str
    part: str
    head_dim: int
    planted: str = ""


def find_sanitizer() -> str | None:
    """The program, from PATH or where a toolkit puts it."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [folder for home in homes if home for folder in (f"{home}/bin", f"{home}/compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def jobs(parts: Sequence[str], is_quick: bool) -> list[Job]:
    """What is run; the planted fault comes first."""
    tools, head_dims = (TOOLS[:1], (128,)) if is_quick else (TOOLS, (64, 128, 192))
    found = [Job(tool, part, d) for tool in tools for part in parts for d in head_dims]
    return [Job("memcheck", parts[0], 64, PLANTED), *found, *(Job(tool, ROPE, 128) for tool in tools)]


def run_job(program: str, job: Job, timeout_s: float) -> str | None:
    """Run it; what is wrong, None where nothing is."""
    folder = str(Path(str(kernels().__file__)).parent)
    # Printing no limit keeps a report short; the exit status says whether anything was found.
    options = ["--tool", job.tool, "--error-exitcode", str(FOUND_EXIT), "--print-limit", "4"]
    child = [sys.executable, "-I", "-S", str(CHILD), folder, job.part, str(job.head_dim), str(SEQ)]
    command = [program, *options, *child, *([job.planted] if job.planted else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"it took more than {timeout_s:.0f} s"
    said = done.stdout + done.stderr
    if job.planted:
        is_found = done.returncode == FOUND_EXIT and "Invalid __global__ read" in said
        return (
            None
            if is_found
            else f"a planted read beyond a buffer was not reported (exit {done.returncode}): {said[-600:]}"
        )
    return None if done.returncode == 0 else f"exit {done.returncode}: {said[:1500]}"


def check_with_sanitizer(program: str, parts: Sequence[str], clock: Clock, is_quick: bool) -> dict[str, list[str]]:
    """Part -> faults; a planted fault that is not found is a fault of every part."""
    every = jobs(parts, is_quick)
    left_s = max(clock.limit_s - clock.elapsed_s, 10.0)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: run_job(program, job, left_s), every))
    faults: dict[str, list[str]] = {part: [] for part in (*parts, ROPE)}
    for job, fault in zip(every, results, strict=True):
        if fault:
            text = f"{job.tool}, D {job.head_dim}{', planted fault' if job.planted else ''}: {fault}"
            for part in faults if job.planted else (job.part,):
                faults[part].append(text)
    return faults
