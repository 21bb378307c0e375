#!/usr/bin/env python3
"""Convert a Hugging Face Llama folder into a Megatron checkpoint that tools/pretrain.py trains on, at any layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.direction import Direction
from megatron_ledom.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; it imports nothing heavy."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Then train from it: tools/pretrain.py --pretrained-checkpoint CHECKPOINT --use-checkpoint-args "
        "--run-dir RUN ... (the same command resumes the run).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--load", type=Path, required=True, metavar="FOLDER", help="config.json and safetensors, sharded or not"
    )
    parser.add_argument("--save", type=Path, required=True, metavar="CHECKPOINT", help="the checkpoint folder to make")
    parser.add_argument(
        "--direction",
        choices=[str(d) for d in Direction],
        help="in which direction the model reads; needed where config.json does not say (ordinary models: forward)",
    )
    parser.add_argument(
        "--dtype",
        choices=["folder", "float32", "bfloat16", "float16"],
        default="folder",
        help="of the checkpoint's weights (default: as in the folder)",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="a folder or file (default: the folder's own)")
    parser.add_argument(
        "--no-parity", action="store_true", help="do not compare Megatron's logits with those of transformers"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier import of that name")
    return parser


def main(argv: list[str]) -> int:
    """Import, and print what was made."""
    options = build_parser().parse_args(argv)
    from megatron_ledom.convert.from_hf import ImportOptions, import_folder

    result = import_folder(
        options.load,
        options.save,
        options=ImportOptions(
            direction=None if options.direction is None else Direction(options.direction),
            dtype=options.dtype,
            tokenizer=options.tokenizer,
            parity=not options.no_parity,
            overwrite=options.overwrite,
        ),
    )
    print(f"{result.folder}: {result.direction} model, {result.num_parameters:,} parameters in {result.dtype}")
    if result.parity is None:
        print("parity: NOT CHECKED (--no-parity)")
    else:
        print(
            f"parity: Megatron's logits within {result.parity['max_relative_difference']:.1e} of transformers' "
            f"(at most {result.parity['relative_tolerance']:g}) at {result.parity['positions']} positions"
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
