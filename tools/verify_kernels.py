#!/usr/bin/env python3
"""Verify the CUDA kernels on this machine's GPU and record it: until then attention does not use them by itself.

Output, gradients and logarithms against float64, twenty identical repeats, streams, CUDA graphs, compute-sanitizer, the
emulation's model of the hardware, and the rates beside torch's. It takes less than nine minutes on one H100. Where
compute-sanitizer is not found (PATH, CUDA_HOME, /usr/local/cuda), a record counts without the checks of memory, races
and barriers; the table and the record say so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; it imports nothing heavy."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="The record lies in $LEDOM_VERIFICATION, or below ~/.cache/megatron_ledom (XDG_CACHE_HOME).\n"
        "Exit status: 0 where every kernel passed; 1 where one failed; 2 where there is nothing to verify.",
    )
    parser.add_argument("--quick", action="store_true", help="a minute's worth of cases and shapes; writes no record")
    parser.add_argument("--no-speed", action="store_true", help="measure no rates")
    parser.add_argument(
        "--limit-s", type=float, default=500.0, metavar="S", help="begin nothing new after S seconds (default: 500)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything that was found to OUT as well")
    return parser


def main(argv: list[str]) -> int:
    """Verify what can be verified here."""
    arguments = build_parser().parse_args(argv)
    from megatron_ledom.ops.verify.run import Options, verify

    return verify(Options(arguments.quick, not arguments.no_speed, arguments.limit_s, arguments.json))


if __name__ == "__main__":
    run_cli(main)
