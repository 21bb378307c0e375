#!/usr/bin/env python3
"""Turn run directories into one self-contained HTML page: curves, events, goodput, data, configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.errors import OutputExistsError, run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Turn run directories into one self-contained HTML page: curves, events, goodput, data, "
        "configuration. It reads while a run goes on, too.",
        epilog="With one run, its twin of the other direction stands beside it if it lies in the same folder.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a --run-dir of tools/pretrain.py")
    parser.add_argument("--output", type=Path, help="the page (default: RUN/report.html of the first run)")
    parser.add_argument("--no-twin", action="store_false", dest="twin", help="only the runs that are named")
    parser.add_argument(
        "--keep", action="store_false", dest="overwrite", help="refuse to replace a page that is there already"
    )
    return parser


def main(argv: list[str]) -> int:
    """Read, build, write."""
    args = build_parser().parse_args(argv)
    from megatron_ledom.report.page import build_page
    from megatron_ledom.report.run_facts import find_twin, read_facts

    output = args.output or args.runs[0] / "report.html"
    if output.exists() and not args.overwrite:
        raise OutputExistsError(f"{output} exists: drop --keep to replace it")
    runs = [read_facts(folder) for folder in args.runs]
    twin = find_twin(runs[0]) if args.twin and len(runs) == 1 else None
    if twin is not None:
        runs.append(twin)
    output.write_text(build_page(runs), encoding="utf-8")
    beside = f", {twin.direction} twin {twin.folder} beside it" if twin is not None else ""
    print(f"{output}: {len(runs)} run{'s' * (len(runs) > 1)}{beside}, {output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    run_cli(main)
