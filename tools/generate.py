"""Write text that comes before a given text, with a reverse model; on a terminal, shown while it grows leftwards.

python tools/generate.py --model runs/tiny/hf --text "and they lived happily ever after."
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_ledom.errors import InputError, run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder of a reverse model, or RUN/checkpoints"
    )
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="the later text")
    text.add_argument(
        "--text-file", type=Path, help="file with the later text, UTF-8, taken as it is; - reads it from stdin"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="most tokens to write (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=1, help="how many texts to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 0 (default: %(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="keep the k likeliest tokens; 0: all (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="keep this share of probability (default: %(default)s)"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="drop tokens with less than this share of the likeliest one's probability (default: %(default)s)",
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the random draw (default: %(default)s)")
    parser.add_argument("--whole", action="store_true", help="print the given text too, after what was written")
    parser.add_argument("--jsonl", action="store_true", help="print one JSON object per sample instead of plain text")
    parser.add_argument("--no-stream", action="store_true", help="on a terminal too, print when all is written")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--assume-reverse", action="store_true", help="take a model whose config.json does not say its direction"
    )
    return parser


def read_text(args: argparse.Namespace) -> str:
    """Return the later text of --text or --text-file.

    Raises:
        InputError: the file is missing or not UTF-8.
    """
    if args.text is not None:
        return str(args.text)
    try:
        data = sys.stdin.buffer.read() if str(args.text_file) == "-" else args.text_file.read_bytes()
        return str(data.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text-file {args.text_file}: {error}. Name a UTF-8 text file") from error


def main(argv: list[str]) -> int:
    """Write the texts and print them to standard output."""
    args = build_parser().parse_args(argv)
    text = read_text(args)
    from megatron_ledom.direction import Direction
    from megatron_ledom.inference.folder import check_direction, load_record
    from megatron_ledom.inference.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        num_samples=args.num_samples,
        greedy=args.greedy,
        min_p=args.min_p,
    )
    assumed = Direction.REVERSE if args.assume_reverse else None
    check_direction(load_record(args.model), Direction.REVERSE, assumed)
    from megatron_ledom.inference import ReverseLM

    lm = ReverseLM.load(args.model, device=args.device, assume_direction=assumed)
    if sys.stdout.isatty() and not (args.jsonl or args.no_stream):
        from megatron_ledom.inference.terminal import GrowingTexts

        with GrowingTexts(text, sys.stdout) as view:
            results = lm.write(text, sampling, on_step=view.update)
    else:
        results = lm.write(text, sampling)
    for number, written in enumerate(results, start=1):
        if args.jsonl:
            print(json.dumps({"sample": number, "seed": args.seed, **asdict(written)}, ensure_ascii=False))
            continue
        if len(results) > 1:
            print(f"--- sample {number} of {len(results)}")
        print(written.whole if args.whole else written.earlier)
    return 0


if __name__ == "__main__":
    run_cli(main)
