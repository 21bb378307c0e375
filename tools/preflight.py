#!/usr/bin/env python3
"""Look at a job's nodes before it trains on them: health, speed against each other, data, disk, configuration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ledom.errors import run_cli

EPILOG = """Start it on every rank of the job, as examples/slurm does:
  srun --ntasks-per-node=8 examples/slurm/task.sh python tools/preflight.py -- --preset 7b --run-dir RUN ...
or on this machine alone:
  python tools/preflight.py -- --preset tiny --device cpu --run-dir RUN --data-path DATA ...
What stands after -- are the flags that tools/pretrain.py will get; without them the run is not looked at.
Exit status: 0 start; 2 something other nodes would not mend; 3 bad nodes, whose --exclude line is printed last.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("training", nargs="*", metavar="-- FLAG", help="flags of tools/pretrain.py")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="a node is bad where its GPUs are slower than the median node by more (default: 0.1; on the CPU 0.5); "
        "connections get 2.5 times as much",
    )
    parser.add_argument(
        "--min-gemm-tflops", type=float, metavar="X", help="least speed of the matrix product of a rank"
    )
    parser.add_argument("--timeout-s", type=float, default=58, metavar="S", help="for everything (default: 58)")
    parser.add_argument("--exclude-file", type=Path, metavar="FILE", help="write the names of bad nodes to it")
    return parser


def main(argv: list[str]) -> int:
    """Check, and print the report on rank 0."""
    args = build_parser().parse_args(argv)
    from megatron_ledom.cluster.preflight import Options, run_preflight

    options = Options(args.device, args.training, args.tolerance, args.min_gemm_tflops, args.timeout_s)
    return run_preflight(options, args.exclude_file)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run_cli(main)
