#!/usr/bin/env python3
"""Convert a Megatron checkpoint into a folder that plain transformers loads, and prove that the logits agree."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; it imports nothing heavy."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--load", type=Path, required=True, metavar="CHECKPOINT", help="RUN/checkpoints, or one iter_NNNNNNN folder"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--step", type=int, metavar="N", help="an iteration (default: the last finished one)")
    parser.add_argument(
        "--dtype",
        choices=["checkpoint", "float32", "bfloat16", "float16"],
        default="checkpoint",
        help="of the exported weights (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest safetensors file, e.g. 500MB (default: 5GB)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="the tokenizer's folder or file (default: RUN/tokenizer, else the one named in the checkpoint)",
    )
    parser.add_argument(
        "--no-parity",
        action="store_true",
        help="do not compare the folder with Megatron's own model (logits, losses, gradients; one layer in memory)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export of that name")
    return parser


def main(argv: list[str]) -> int:
    """Export, and print what was made."""
    options = build_parser().parse_args(argv)
    from megatron_ledom.convert.hf import ExportOptions, export_checkpoint
    from megatron_ledom.convert.safetensors_file import parse_size

    result = export_checkpoint(
        options.load,
        options.output,
        step=options.step,
        options=ExportOptions(
            dtype=options.dtype,
            max_shard_bytes=parse_size(options.max_shard_size),
            tokenizer=options.tokenizer,
            parity=not options.no_parity,
            overwrite=options.overwrite,
        ),
    )
    print(
        f"{result.folder}: {result.direction} model, {result.num_parameters:,} parameters, {', '.join(result.shards)}"
    )
    if result.parity is None:
        print("parity: NOT CHECKED (--no-parity)")
    else:
        print(
            f"parity: logits within {result.parity['max_relative_difference']:.1e} of Megatron's "
            f"(at most {result.parity['relative_tolerance']:g}) at {result.parity['positions']} positions"
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
