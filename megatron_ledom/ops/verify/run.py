"""The verification of the CUDA kernels on one GPU, from the first check to the record.

Sections are independent: one that breaks is reported, and the next one runs. A part (an attention variant, or "rope")
passes where every section that concerns it ran and found nothing.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.log import format_seconds, get_logger
from megatron_ledom.ops.gpu import find_gpu
from megatron_ledom.ops.kernels import cuda_variants, describe_kernels, load_kernels
from megatron_ledom.ops.trust import this_build
from megatron_ledom.ops.verification import ROPE, record_folder, write_record
from megatron_ledom.ops.verify import checks, speed
from megatron_ledom.ops.verify.clock import Clock
from megatron_ledom.ops.verify.sanitizer import check_with_sanitizer, find_sanitizer
from megatron_ledom.ops.verify.wrappers import compare

LIMIT_S = 500.0
SHOWN_FAULTS = 6


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
        notes: section -> facts for the record.
        seconds: section -> how long it took.
        stray: faults that concern no part: of the emulation's model, or of the measurement.
    """

    faults: dict[str, list[str]]
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stray: list[str] = field(default_factory=list)


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
    """Run every section, print a table, and write the record.

    Returns:
        0 where all parts passed, 1 otherwise.

    Raises:
        UsageError: nothing can be verified on this machine.
    """
    device = check_machine()
    clock, gpu, say = Clock(options.limit_s), find_gpu(device.index or 0), get_logger(__name__).info
    usable = {v.name: v.fault_on(gpu.capability) for v in cuda_variants()}
    parts = [name for name, fault in usable.items() if fault is None]
    say("%s", describe_kernels())
    say("%s, capability %d, driver %s, torch %s", gpu.name, gpu.capability, gpu.driver, torch.__version__)
    for _name, fault in usable.items():
        if fault:
            say("not verified here: %s", fault)
    report = Report({part: [] for part in (*parts, ROPE)})
    run_sections(report, parts, device, clock, options)
    passed = {part: not faults for part, faults in report.faults.items()}
    for line in table(report, passed):
        print(line)
    keep(report, passed, options, device, clock)
    return 0 if passed and all(passed.values()) else 1


def run_sections(report: Report, parts: list[str], device: torch.device, clock: Clock, options: Options) -> None:
    """Run them in the order of what is worth knowing first."""

    def run(name: str, concerned: list[str], section: Callable[[], None]) -> None:
        started = time.monotonic()
        if clock.is_over:
            for part in concerned:
                report.faults[part].append(f"{name}: not run, the {format_seconds(options.limit_s)} were over")
            return
        try:
            section()
        except Exception as error:
            text = f"{name} broke off: {type(error).__name__}: {error}"
            get_logger(__name__).warning("%s\n%s", text, traceback.format_exc(limit=-4))
            for part in concerned:
                report.faults[part].append(text[:2000])
            if not concerned:
                report.stray.append(text[:2000])
        report.seconds[name] = round(time.monotonic() - started, 1)
        took, left = report.seconds[name], max(options.limit_s - clock.elapsed_s, 0.0)
        get_logger(__name__).info("%s: %s, %s left", name, format_seconds(took), format_seconds(left))

    def correctness() -> None:
        for part, tally in checks.check_correctness(parts, device, clock, options.is_quick).items():
            keep_tally(report, part, tally, "correctness")

    def each(check: Callable[[str, torch.device], list[str]]) -> Callable[[], None]:
        def section() -> None:
            for part in parts:
                report.faults[part] += check(part, device)

        return section

    def rope() -> None:
        keep_tally(report, ROPE, checks.check_rope_kernel(device), "rope")

    def runtimes() -> None:
        report.notes["runtimes"] = checks.loaded_runtimes()

    def wrappers() -> None:
        with tempfile.TemporaryDirectory() as folder:
            report.stray += compare(Path(folder), "nvcc", device, range(8))
        report.notes["wrappers"] = "agree with the emulation" if not report.stray else "differ"

    def sanitizer() -> None:
        program = find_sanitizer()
        if program is None:
            report.notes["compute-sanitizer"] = "not found: memory, races and barriers were not looked at"
            return
        for part, faults in check_with_sanitizer(program, parts, clock, options.is_quick).items():
            report.faults[part] += faults
        report.notes["compute-sanitizer"] = "ran"

    def measure() -> None:
        report.notes["speed"] = speed.measure_all(parts, device, clock, options.is_quick)
        report.notes["rope_speed"] = speed.measure_rope(device)

    run("correctness", parts, correctness)
    run("rotary positions", [ROPE], rope)
    run("twenty repeats", parts, each(checks.check_repeats))
    run("streams and graphs", parts, each(checks.check_streams))
    run("torch's face", parts, each(checks.check_torch_face))
    run("two runtimes", parts, runtimes)
    run("compute-sanitizer", [*parts, ROPE], sanitizer)
    run("wrappers", [], wrappers)
    if options.has_speed:
        run("speed", [], measure)


def keep_tally(report: Report, part: str, tally: checks.Tally, section: str) -> None:
    """Take over what a section counted."""
    report.faults[part] += tally.faults
    share, case = tally.worst
    report.notes.setdefault(section, {})[part] = {
        "cases": tally.num_cases,
        "worst_share_of_allowed": round(share, 3),
        "worst_case": case,
    }


def table(report: Report, passed: dict[str, bool]) -> list[str]:
    """What was found, for people."""
    lines = []
    for part, is_good in passed.items():
        counted = {**report.notes.get("correctness", {}), **report.notes.get("rope", {})}.get(part)
        words = (
            f"{counted['cases']} cases, worst error {counted['worst_share_of_allowed']:.2f} of what is allowed"
            if counted
            else "not run"
        )
        lines.append(
            f"{part:8} {'passed' if is_good else 'FAILED'}   {words}"
            + (f" ({counted['worst_case']})" if counted else "")
        )
        faults = report.faults[part]
        lines += [f"         - {fault}" for fault in faults[:SHOWN_FAULTS]]
        if len(faults) > SHOWN_FAULTS:
            lines.append(f"         ... and {len(faults) - SHOWN_FAULTS} more")
    lines += [f"note     {fault}" for fault in report.stray[:SHOWN_FAULTS]]
    for name in ("wrappers", "compute-sanitizer", "runtimes"):
        lines.append(f"{name:18} {report.notes.get(name, 'not run')}")
    if report.notes.get("speed"):
        lines += ["", "TFLOP/s, forward / forward and backward (medians):", *speed.speed_table(report.notes["speed"])]
        lines.append(f"rotary positions: {report.notes.get('rope_speed')}")
    return lines


def keep(report: Report, passed: dict[str, bool], options: Options, device: torch.device, clock: Clock) -> None:
    """Write the record, and everything to `--json`; a quick run writes no record."""
    build, gpu = this_build(), find_gpu(device.index or 0)
    parts = {
        part: {"passed": passed[part], "faults": faults[: checks.MAX_FAULTS], "num_faults": len(faults)}
        for part, faults in report.faults.items()
    }
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": report.seconds,
        "stray": report.stray,
        **report.notes,
    }
    if options.json_path:
        everything = {"source": build.source, "compiler": build.compiler, "gpu": gpu.name, "capability": gpu.capability}
        everything |= {"driver": gpu.driver, "is_quick": options.is_quick, "parts": parts, **facts}
        options.json_path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if options.is_quick:
        print("a quick run writes no record")
        return
    path = write_record(record_folder(), build, gpu, parts, **facts)
    print(f"{format_seconds(clock.elapsed_s)}; recorded in {path}")
