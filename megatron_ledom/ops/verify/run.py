"""The verification of the CUDA kernels on one GPU, from the first check to the record.

What touches the GPU runs in processes of its own (`child`). A part (an attention variant, or "rope") passes where every
check that concerns it ran and found nothing; one that breaks is reported, and the others run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.log import format_seconds, get_logger
from megatron_ledom.ops.gpu import Gpu, find_gpu
from megatron_ledom.ops.kernels import cuda_variants, describe_kernels, load_kernels
from megatron_ledom.ops.trust import this_build
from megatron_ledom.ops.verification import ROPE, Build, record_folder, write_record
from megatron_ledom.ops.verify import child, speed
from megatron_ledom.ops.verify.clock import Clock
from megatron_ledom.ops.verify.sanitizer import check_with_sanitizer, find_sanitizer

LIMIT_S = 500.0
PARTS_SHARE = 0.6
"""Of the time that is left, what the parts may take together: a kernel that hangs must leave some for the rest."""
SHOWN_FAULTS, KEPT_FAULTS = 6, 12


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        is_quick: fewer cases and shapes; no record is written, as they prove less.
        has_speed: whether to measure rates.
        limit_s: after this nothing new is begun.
        json_path: where all results go besides; None for nowhere.
    """

    is_quick: bool = False
    has_speed: bool = True
    limit_s: float = LIMIT_S
    json_path: Path | None = None


@dataclass
class Report:
    """What was found.

    Attributes:
        faults: part -> what is wrong.
        sections: part, or "speed" -> section -> {"seconds", "faults", "facts"}.
        notes: further facts.
    """

    faults: dict[str, list[str]]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def check_machine() -> torch.device:
    """The GPU that is verified.

    Raises:
        UsageError: there is none, or the extension has no kernels for it.
    """
    found = load_kernels()
    if isinstance(found, str):
        raise UsageError(found)
    if not cuda_variants():
        raise UsageError(f"nothing to verify: {describe_kernels()}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} was built for CUDA {built}" if built else "this torch was built without CUDA"
        raise UsageError(f"no GPU: torch sees none ({why}), so nothing can be verified here. {describe_kernels()}")
    return torch.device("cuda", torch.cuda.current_device())


def verify(options: Options) -> int:
    """Run every check, print a table, and write the record.

    Returns:
        0 where all parts passed, 1 otherwise.

    Raises:
        UsageError: nothing can be verified on this machine.
    """
    device = check_machine()
    clock, gpu, say = Clock(options.limit_s), find_gpu(device.index or 0), get_logger(__name__).info
    unfit = {v.name: v.fault_on(gpu.capability) for v in cuda_variants()}
    parts = [name for name, fault in unfit.items() if fault is None]
    say("%s", describe_kernels())
    say("%s, capability %d, driver %s, torch %s", gpu.name, gpu.capability, gpu.driver, torch.__version__)
    for fault in filter(None, unfit.values()):
        say("not verified here: %s", fault)
    report = Report({part: [] for part in (*parts, ROPE)})
    with tempfile.TemporaryDirectory() as folder:
        run_all(report, parts, Path(folder), clock, options)
    passed = {part: not faults for part, faults in report.faults.items()}
    print("\n".join(table(report, passed)), flush=True)
    keep(report, passed, options, this_build(), gpu)
    say("%s in all", format_seconds(clock.elapsed_s))
    return 0 if passed and all(passed.values()) else 1


def run_all(report: Report, parts: Sequence[str], folder: Path, clock: Clock, options: Options) -> None:
    """Fill the report: what decides first, the rates last."""
    limit_s = PARTS_SHARE * max(options.limit_s - clock.elapsed_s, 0.0)
    with ThreadPoolExecutor() as pool:  # much of their time they wait for torch to start, or for a compiler
        wrappers = pool.submit(compare_wrappers, folder)
        running = {part: pool.submit(run_child, report, [part], folder, limit_s, options) for part in report.faults}
    for part, future in running.items():
        report.faults[part] += future.result()
    report.notes["wrappers"] = wrappers.result()
    program = find_sanitizer()
    if program is None:
        report.notes["compute-sanitizer"] = "not found: the record counts without checks of memory, races and barriers"
    else:
        started = time.monotonic()
        for part, faults in check_with_sanitizer(program, parts, clock, options.is_quick).items():
            report.faults[part] += faults
        report.notes["compute-sanitizer"] = f"ran ({format_seconds(time.monotonic() - started)})"
    if options.has_speed:
        left_s = max(options.limit_s - clock.elapsed_s, 0.0)
        report.notes["speed faults"] = run_child(report, ["speed", *parts], folder, left_s, options)


def run_child(report: Report, words: Sequence[str], folder: Path, limit_s: float, options: Options) -> list[str]:
    """Run a part, or "speed" with its parts, for at most about `limit_s`; returns the faults."""
    name, *rest = words
    out = folder / f"{name}.json"
    quick = [child.QUICK] if options.is_quick else []
    command = [sys.executable, "-m", child.__name__, name, str(out), f"{limit_s:.0f}", *quick, *rest]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    status = ""
    try:
        done = subprocess.run(command, env=environment, check=False, timeout=limit_s + 30)
        status = f"its process ended with status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        status = f"it hung: its process was ended after {format_seconds(limit_s + 30)}"
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    report.sections[name] = found.get("sections", {})
    faults = [str(fault) for fault in found.get("faults", [])]
    if status or not found:
        faults.append(f"{found.get('current') or 'start'}: {status or 'it wrote nothing'}")
    return faults


def compare_wrappers(folder: Path) -> list[str] | str:
    """Each inline-assembly function on the GPU against the emulation; it concerns the emulation, not a part."""
    command = [sys.executable, "-m", "megatron_ledom.ops.verify.wrappers", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, env=environment, check=False, timeout=90, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return ["they took more than 90 s"]
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        return lines[-1] if lines else "nothing was said"
    return lines or done.stderr.strip().splitlines()[-3:]


def table(report: Report, passed: dict[str, bool]) -> list[str]:
    """What was found, for people."""
    lines = []
    for part, is_good in passed.items():
        counted = [s["facts"] for s in report.sections.get(part, {}).values() if isinstance(s["facts"], dict)]
        words = "not run"
        if counted:
            worst, case = counted[0]["worst_share_of_allowed"], counted[0]["worst_case"]
            words = f"{counted[0]['cases']} cases, the worst error {worst:.2f} of what is allowed ({case})"
        lines.append(f"{part:8} {'passed' if is_good else 'FAILED'}   {words}")
        faults = report.faults[part]
        lines += [f"         - {fault}" for fault in faults[:SHOWN_FAULTS]]
        if len(faults) > SHOWN_FAULTS:
            lines.append(f"         ... and {len(faults) - SHOWN_FAULTS} more")
    lines += [f"{name}: {facts}" for name, facts in report.notes.items() if facts]
    if measured := [
        s["facts"] for s in report.sections.get("speed", {}).values() if s["facts"] and "tflops" in s["facts"]
    ]:
        lines += ["", "TFLOP/s, forward / forward and backward (medians):", *speed.speed_table(measured)]
        lines.append(f"rotary positions: {report.sections['speed'].get('rotary positions', {}).get('facts')}")
    return lines


def keep(report: Report, passed: dict[str, bool], options: Options, build: Build, gpu: Gpu) -> None:
    """Write the record, and everything to `--json`; a quick run writes no record."""
    parts = {
        part: {"passed": passed[part], "faults": faults[:KEPT_FAULTS], "num_faults": len(faults)}
        for part, faults in report.faults.items()
    }
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "sections": report.sections,
        "notes": report.notes,
    }
    if options.json_path:
        everything = {"source": build.source, "compiler": build.compiler, "gpu": gpu.name, "capability": gpu.capability}
        everything |= {"driver": gpu.driver, "is_quick": options.is_quick, "parts": parts, **facts}
        options.json_path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if options.is_quick:
        print("a quick run writes no record")
        return
    path = write_record(record_folder(), build, gpu, parts, **facts)
    print(f"recorded in {path}")
