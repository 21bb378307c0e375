r"""Rank candidate answers by Reverse Reward: JSONL in, the same lines with ranked candidates out.

R(x, y) = (1 - lambda) * log P_F(y given x) + lambda * log P_R(x given y)

python tools/rerank.py --reverse-model runs/tiny/hf --forward-model runs/tiny-forward/hf \
    --input candidates.jsonl --output ranked.jsonl --lambda 0.5 --normalize token

The file format is described in docs/reverse_reward.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.errors import run_cli
from megatron_ledom.inference import DEFAULT_BATCH_TOKENS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="JSONL: a question and its candidates on each line")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--reverse-model", type=Path, required=True, help="Hugging Face folder of a reverse model")
    parser.add_argument(
        "--forward-model",
        type=Path,
        help="Hugging Face folder of any forward causal LM; not needed when candidates carry log-probabilities",
    )
    parser.add_argument(
        "--lambda",
        dest="reverse_weight",
        type=float,
        default=0.5,
        metavar="LAMBDA",
        help="weight of the reverse model, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--normalize",
        choices=["none", "token", "char"],
        default="none",
        help="divide each log-probability by the length of its text (default: %(default)s)",
    )
    parser.add_argument(
        "--separator",
        default="",
        help="text put between question and answer, e.g. $'\\n'; read, never scored (default: none)",
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=DEFAULT_BATCH_TOKENS, help="most tokens in a batch (default: %(default)s)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--assume-reverse",
        action="store_true",
        help="take a --reverse-model whose config.json does not say its direction",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def main(argv: list[str]) -> int:
    """Rank the candidates and say what was written."""
    args = build_parser().parse_args(argv)
    from megatron_ledom.rerank.best_of_n import RerankSettings, rerank_file
    from megatron_ledom.rerank.reward import Normalize

    settings = RerankSettings(
        reverse_model=args.reverse_model,
        forward_model=args.forward_model,
        reverse_weight=args.reverse_weight,
        normalize=Normalize(args.normalize),
        separator=args.separator,
        device=args.device,
        assume_reverse=args.assume_reverse,
        batch_tokens=args.batch_tokens,
    )
    num_questions, num_candidates = rerank_file(args.input, args.output, settings, overwrite=args.overwrite)
    print(f"{args.output}: {num_questions} questions, {num_candidates} candidates ranked")
    return 0


if __name__ == "__main__":
    run_cli(main)
