#!/usr/bin/env python3
"""Claim: every tool answers `--help` in under half a second.

The baseline, measured in the same run, is the interpreter starting and doing nothing.

    python benchmarks/bench_help.py --repeats 7 --output benchmarks/results/help.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import spread, write_record

from megatron_ledom.errors import run_cli
from megatron_ledom.testing import REPOSITORY, tool_environment

CLAIMED_S = 0.5


def time_command(command: Sequence[str], repeats: int) -> dict[str, float]:
    """Run a command `repeats` times after a warm-up; return median, least and most wall time in seconds."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=tool_environment())
        seconds.append(time.perf_counter() - started)
    return {f"{name}_s": value for name, value in spread(seconds[1:]).items()}


def main(argv: list[str]) -> int:
    """Measure, print a table, write the results; status 1 if the claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    load_before = os.getloadavg()[0]
    results: dict[str, Any] = {"(interpreter alone)": time_command([sys.executable, "-c", "pass"], args.repeats)}
    for tool in sorted((REPOSITORY / "tools").glob("*.py")):
        results[tool.name] = time_command([sys.executable, str(tool), "--help"], args.repeats)
    for name, row in results.items():
        print(f"{name:24} median {row['median_s']:.3f} s   {row['min_s']:.3f} to {row['max_s']:.3f}")
    holds = all(row["median_s"] < CLAIMED_S for row in results.values())
    print(f"under {CLAIMED_S} s each: {'yes' if holds else 'NO'}")
    write_record(
        args.output,
        f"--help under {CLAIMED_S} s, median",
        holds,
        f"python benchmarks/bench_help.py --repeats {args.repeats}",
        load_before,
        results=results,
    )
    return 0 if holds else 1


if __name__ == "__main__":
    run_cli(main)
