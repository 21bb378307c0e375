r"""Score pairs of texts that follow each other: JSONL in, the same lines with log-probabilities out.

A reverse model gives log P(earlier given later), a forward model log P(later given earlier); which of the
two a model is, it says itself. A killed run goes on with the same command: finished scores are kept.

python tools/score.py --model runs/tiny/hf --input pairs.jsonl --output scored.jsonl
    {"earlier": "What is 12 times 3?", "later": " 12 * 3 = 36."}
 -> {"earlier": ..., "later": ..., "score": {"logprob": -14.2, "num_tokens": 7, "direction": "reverse"}}
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.errors import run_cli
from megatron_ledom.inference import DEFAULT_BATCH_TOKENS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, or RUN/checkpoints")
    parser.add_argument("--input", type=Path, required=True, help="JSONL: two texts on each line")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write; it appears when it is complete")
    parser.add_argument("--earlier-key", default="earlier", metavar="KEY", help="field of the earlier text (earlier)")
    parser.add_argument("--later-key", default="later", metavar="KEY", help="field of the later text (later)")
    parser.add_argument("--field", default="score", help="field to write the score to (score)")
    parser.add_argument(
        "--separator", default="", help="put between the texts, e.g. $'\\n'; conditioned on, never scored (nothing)"
    )
    parser.add_argument(
        "--closed", action="store_true", help="also score that the document begins (reverse) or ends (forward) there"
    )
    parser.add_argument(
        "--long",
        choices=["refuse", "window"],
        default="refuse",
        help="pairs longer than the context: refuse them by line, or read them in overlapping windows (refuse)",
    )
    parser.add_argument("--tokens", action="store_true", help="write the log-probability of every token, too")
    parser.add_argument(
        "--cache", type=Path, help="file of finished scores, by model, direction and text (OUTPUT.scores.sqlite)"
    )
    parser.add_argument("--no-cache", action="store_true", help="keep no finished scores: a killed run starts over")
    parser.add_argument(
        "--batch-tokens", type=int, default=DEFAULT_BATCH_TOKENS, help="most tokens in a batch (default: %(default)s)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float64", "bfloat16", "float16"],
        default="auto",
        help="of the weights; auto: float32 on a CPU, as saved on a GPU. In 2 bytes a score has 2 to 3 digits",
    )
    parser.add_argument(
        "--assume-reverse", action="store_true", help="take a model whose config.json does not say its direction"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def main(argv: list[str]) -> int:
    """Score the file and say what was written."""
    args = build_parser().parse_args(argv)
    from megatron_ledom.errors import UsageError
    from megatron_ledom.inference.score_file import ScoreSettings, score_file

    if args.no_cache and args.cache is not None:
        raise UsageError("--cache and --no-cache: give one of the two")
    beside = args.output.with_name(f"{args.output.name}.scores.sqlite")
    settings = ScoreSettings(
        model=args.model,
        earlier_key=args.earlier_key,
        later_key=args.later_key,
        separator=args.separator,
        closed=args.closed,
        windowed=args.long == "window",
        field=args.field,
        with_tokens=args.tokens,
        cache=None if args.no_cache else args.cache or beside,
        device=args.device,
        assume_reverse=args.assume_reverse,
        batch_tokens=args.batch_tokens,
        dtype=args.dtype,
    )
    counts = score_file(args.input, args.output, settings, overwrite=args.overwrite)
    what = "log P(earlier | later)" if counts.direction == "reverse" else "log P(later | earlier)"
    print(
        f"{args.output}: {what} of {counts.num_pairs:,} pairs, {counts.num_tokens:,} tokens; "
        f"{counts.num_known:,} were known"
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
