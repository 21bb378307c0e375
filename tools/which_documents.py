#!/usr/bin/env python3
"""Show the documents behind a training step: files, rows, tokens and text in both directions. Needs no GPU."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

from megatron_ledom.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; it imports nothing heavy."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--run-dir", type=Path, metavar="RUN", help="the run directory of tools/pretrain.py")
    origin.add_argument(
        "--load",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, where the run directory is gone; earlier steps are taken to have had its batch size",
    )
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the step, from 1, as in the log")
    parser.add_argument(
        "--chars", type=int, default=160, metavar="N", help="characters of each text (default: 160; 0: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with all ids instead of text")
    return parser


def main(argv: list[str]) -> int:
    """Trace the step and print it."""
    options = build_parser().parse_args(argv)
    warnings.simplefilter("ignore")  # Megatron's, about kernels that are not needed here
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron_ledom.train.replay import describe_step, find_launch, format_step, launch_of_checkpoint, trace_step

    if options.run_dir is not None:
        launch, tokenizer_folder = find_launch(options.run_dir, options.step), options.run_dir / "tokenizer"
    else:
        launch, tokenizer_folder = launch_of_checkpoint(options.load), None
    samples, tokenizer, datasets = trace_step(launch, options.step, tokenizer_folder)
    described = describe_step(samples, tokenizer, datasets, options.chars)
    if options.json:
        print(json.dumps({"step": options.step, "samples": described}, ensure_ascii=False, indent=1))
    else:
        print(format_step(options.step, described))
    return 0


if __name__ == "__main__":
    run_cli(main)
