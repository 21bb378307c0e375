#!/usr/bin/env python3
"""Show what a Megatron checkpoint or a Hugging Face folder holds, verify it, or compare two; nothing in it is run."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; it imports nothing heavy."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        epilog="Exit status: 0; 1 where --verify finds a fault or --diff a difference; 2 where it cannot be opened.",
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="RUN/checkpoints, one iter_NNNNNNN folder, or a folder with config.json and safetensors files",
    )
    parser.add_argument("--step", type=int, metavar="N", help="an iteration (default: the last finished one)")
    parser.add_argument("--tensors", action="store_true", help="list every tensor: name, shape, dtype, bytes, chunks")
    parser.add_argument(
        "--verify", action="store_true", help="compare every file with its checksum, and read every tensor"
    )
    parser.add_argument(
        "--diff",
        type=Path,
        metavar="OTHER",
        help="compare with another checkpoint (or folder with folder): arguments, names, shapes, values",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: list[str]) -> int:
    """Inspect, print, and say by the status whether something is wrong."""
    options = build_parser().parse_args(argv)
    from megatron_ledom.convert.inspection import inspect, inspection_json
    from megatron_ledom.convert.inspection_text import inspection_text

    found = inspect(options.path, options.step, tensors=options.tensors, verify=options.verify, other=options.diff)
    print(inspection_json(found) if options.json else inspection_text(found))
    has_faults = bool(found.get("verify", {}).get("faults"))
    return int(has_faults or not found.get("diff", {}).get("is_equal", True))


if __name__ == "__main__":
    run_cli(main)
