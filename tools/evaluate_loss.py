r"""Put the losses of reverse and forward models on the same held-out tokens side by side.

python tools/evaluate_loss.py --models runs/tiny/hf runs/tiny-forward/hf --input heldout.jsonl \
    --train-data data/corpus_text_document

With --train-data a unigram model of the training tokens stands beside them: what a
model reaches that knows the words and not their order. A document longer than the context is
read in overlapping windows, and every token is scored once (docs/reverse_reward.md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_ledom.errors import run_cli
from megatron_ledom.inference import DEFAULT_BATCH_TOKENS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="Hugging Face folders, any direction")
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSONL of held-out documents (.gz too)")
    parser.add_argument("--json-key", default="text", help="field that holds the text (default: %(default)s)")
    parser.add_argument(
        "--train-data", type=Path, metavar="PREFIX", help="training data, PREFIX.bin, for the unigram model"
    )
    parser.add_argument("--context", type=int, help="tokens read at once (default: the models' shortest context)")
    parser.add_argument(
        "--stride", type=int, help="distance of windows in a longer document (default: half the context)"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=DEFAULT_BATCH_TOKENS, help="most tokens in a batch (default: %(default)s)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--assume-reverse", action="store_true", help="take models whose config.json does not say their direction"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write the table to as well")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def main(argv: list[str]) -> int:
    """Evaluate the models and print the table."""
    args = build_parser().parse_args(argv)
    from megatron_ledom.data.sources import check_inputs, read_documents
    from megatron_ledom.direction import Direction
    from megatron_ledom.evaluation.loss import compare_losses
    from megatron_ledom.evaluation.table import describe_comparison, format_table
    from megatron_ledom.evaluation.unigram import count_tokens
    from megatron_ledom.inference.files import check_output, open_output

    if args.output is not None:
        check_output(args.output, overwrite=args.overwrite)
    check_inputs(args.input)
    comparison = compare_losses(
        args.models,
        [document.texts[0] for document in read_documents(args.input, [args.json_key])],
        unigram=None if args.train_data is None else count_tokens(args.train_data),
        context_tokens=args.context,
        stride_tokens=args.stride,
        device=args.device,
        batch_tokens=args.batch_tokens,
        assume_direction=Direction.REVERSE if args.assume_reverse else None,
    )
    print(format_table(comparison))
    if args.output is not None:
        with open_output(args.output) as file:
            file.write(json.dumps(describe_comparison(comparison), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
