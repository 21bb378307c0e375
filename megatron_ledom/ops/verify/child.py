"""The work of a verification that touches the GPU, in a process of its own: a kernel that hangs, or breaks the context,
takes nothing else with it.

    python -m megatron_ledom.ops.verify.child PART OUT LIMIT_S [quick]
    python -m megatron_ledom.ops.verify.child speed OUT LIMIT_S [quick] PART ...

Each section's results are written to OUT (JSON) when it ends: what ran before a hang is known. A section that breaks
off is a fault, and the next one runs.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ledom.log import format_seconds, get_logger
from megatron_ledom.ops.verification import ROPE
from megatron_ledom.ops.verify import checks, speed
from megatron_ledom.ops.verify.clock import Clock

QUICK, SPEED = "quick", "speed"


class Notebook:
    """What was found so far; on disk after every section.

    Args:
        path: the JSON file.
        part: for the log.
        clock: sections after its limit are not begun, which is a fault.
    """

    def __init__(self, path: Path, part: str, clock: Clock) -> None:
        self.path, self.part, self.clock = path, part, clock
        self.found: dict[str, Any] = {"faults": [], "sections": {}, "current": None}

    def run(self, name: str, section: Callable[[], tuple[list[str], Any]]) -> None:
        """Run a section, which gives faults and facts."""
        if self.clock.is_over:
            self.found["faults"].append(f"{name}: not run, no time was left")
            self.write()
            return
        self.found["current"] = name
        self.write()
        started, facts = time.monotonic(), None
        try:
            faults, facts = section()
        except Exception as error:
            get_logger(__name__).warning("%s", traceback.format_exc(limit=-4))
            faults = [f"{name} broke off: {type(error).__name__}: {str(error)[:1500]}"]
        seconds = time.monotonic() - started
        self.found["faults"] += faults
        self.found["sections"][name] = {"seconds": round(seconds, 1), "faults": len(faults), "facts": facts}
        self.found["current"] = None
        self.write()
        word = f"{len(faults)} faults" if faults else "nothing wrong"
        get_logger(__name__).info("%s, %s: %s in %s", self.part, name, word, format_seconds(seconds))

    def write(self) -> None:
        """Put it on disk, complete or not at all."""
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.found), encoding="utf-8")
        temporary.replace(self.path)


def check_part(notebook: Notebook, part: str, device: torch.device, is_quick: bool) -> None:
    """Everything that decides whether a part passes, but for compute-sanitizer."""

    def correctness() -> tuple[list[str], Any]:
        return tallied(checks.check_correctness([part], device, notebook.clock, is_quick)[part])

    def rope() -> tuple[list[str], Any]:
        return tallied(checks.check_rope_kernel(device))

    def plain(check: Callable[[str, torch.device], list[str]]) -> Callable[[], tuple[list[str], Any]]:
        return lambda: (check(part, device), None)

    if part == ROPE:
        notebook.run("rotary positions", rope)
        return
    notebook.run("correctness", correctness)
    notebook.run("twenty repeats", plain(checks.check_repeats))
    notebook.run("streams and graphs", plain(checks.check_streams))
    notebook.run("torch's face", plain(checks.check_torch_face))
    notebook.run("two runtimes", lambda: ([], checks.loaded_runtimes()))


def tallied(tally: checks.Tally) -> tuple[list[str], dict[str, Any]]:
    """Faults and facts of a tally."""
    share, case = tally.worst
    facts = {"cases": tally.num_cases, "worst_share_of_allowed": round(share, 3), "worst_case": case}
    return tally.faults, facts


def measure(notebook: Notebook, parts: Sequence[str], device: torch.device, is_quick: bool) -> None:
    """Rates; nothing passes or fails by them."""
    notebook.run("rotary positions", lambda: ([], speed.measure_rope(device)))
    results: list[dict[str, Any]] = []
    for shape, kind in speed.cases(is_quick):
        name = f"{', '.join(map(str, shape))} {kind}"
        notebook.run(name, lambda shape=shape, kind=kind: ([], speed.measure(shape, kind, parts, device)))  # type: ignore[misc]
        torch.cuda.empty_cache()
        results.append(notebook.found["sections"].get(name, {}).get("facts"))
    for line in speed.speed_table([result for result in results if result]):
        get_logger(__name__).info("%s", line)


def main(words: list[str]) -> int:
    """Run one part, or the measurement."""
    part, out, limit_s, *rest = words
    device = torch.device("cuda", torch.cuda.current_device())
    notebook = Notebook(Path(out), part, Clock(float(limit_s)))
    is_quick = rest[:1] == [QUICK]
    if part == SPEED:
        measure(notebook, rest[1:] if is_quick else rest, device, is_quick)
    else:
        check_part(notebook, part, device, is_quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
