"""Disk and limits of a node: what a run meets in its first hour, or when it saves."""

from __future__ import annotations

import os
import resource
import shutil
import time
from pathlib import Path

from megatron_ledom.cluster.findings import Finding, Level, Measurement
from megatron_ledom.engine.presets import PRESETS, count_parameters

PROBE_BYTES = 1 << 25
# Saved for each parameter: the weight in bf16, and in fp32 a master copy and two moments.
BYTES_A_PARAMETER = 2 + 3 * 4
VOCABULARY = 64_256
NUM_CHECKPOINTS = 3
LEAST_OPEN_FILES = 4096
LEAST_SHARED_BYTES = 1 << 30


def checkpoint_bytes(preset: str) -> int:
    """About how large a checkpoint of a preset is (with the released vocabulary)."""
    return BYTES_A_PARAMETER * count_parameters(PRESETS[preset].settings, VOCABULARY)


def check_free_space(run: Path, preset: str | None) -> Finding:
    """Whether the run's file system holds a few checkpoints."""
    run.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run).free
    if preset is None:
        return Finding(
            "disk",
            Level.NOTE,
            f"{free / 1e9:,.0f} GB free in {run}; without a --preset, how much a save takes is not known",
        )
    needed = NUM_CHECKPOINTS * checkpoint_bytes(preset)
    sizes = f"{NUM_CHECKPOINTS} checkpoints of {preset} take about {needed / 1e9:,.2f} GB"
    text = f"{free / 1e9:,.0f} GB free in {run}; {sizes}"
    if free < needed:
        return Finding("disk", Level.BAD, f"{text}: make room, or give another --run-dir")
    return Finding("disk", Level.OK, text)


def measure_write(run: Path, node: str) -> Measurement:
    """Write 32 MiB to the run's folder, force them to disk, and remove them.

    Raises:
        OSError: the folder cannot be written from this node.
    """
    path = run / f".preflight-{node}-{os.getpid()}"
    block = os.urandom(1 << 20)
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    finally:
        path.unlink(missing_ok=True)
    return Measurement("write to the run directory", node, PROBE_BYTES / seconds / 1e6, "MB/s")


def check_limits(node: str) -> list[Finding]:
    """Open files, locked memory (InfiniBand needs it) and shared memory (NCCL and data loaders do)."""
    findings = []
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < LEAST_OPEN_FILES:
        text = f"ulimit -n is {files}: {LEAST_OPEN_FILES} or more are safe (Slurm's PropagateResourceLimits)"
        findings.append(Finding("limits", Level.NOTE, text, node))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and Path("/sys/class/infiniband").is_dir():
        findings.append(Finding("limits", Level.BAD, f"ulimit -l is {locked}: InfiniBand needs it unlimited", node))
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    if shared < LEAST_SHARED_BYTES:
        text = f"/dev/shm has {shared / 1e6:,.0f} MB free: NCCL and data loaders want a GB"
        findings.append(Finding("limits", Level.NOTE, text, node))
    return findings or [Finding("limits", Level.OK, f"{files} open files, {shared / 1e9:,.1f} GB in /dev/shm")]
