r"""Sample N answers to each question with a forward model: JSONL in, the same lines with candidates out.

python tools/sample_answers.py --model runs/forward/hf --input questions.jsonl --output candidates.jsonl \
    --num-samples 16 --separator $'\n'

The output is what tools/rerank.py ranks; give it the same separator. The greedy answer is written beside the
samples, as a baseline for tools/evaluate_rerank.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of any forward causal LM")
    parser.add_argument("--input", type=Path, required=True, help="JSONL: a question (or prompt) on each line")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--num-samples", type=int, default=8, help="answers to each question (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 0 (default: %(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="keep the k likeliest tokens; 0: all (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="keep this share of probability (default: %(default)s)"
    )
    parser.add_argument("--min-p", type=float, default=0.0, help="0: all tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random draw (default: %(default)s)")
    parser.add_argument("--separator", default="", help="text put after each question, e.g. $'\\n' (default: none)")
    parser.add_argument("--stop-pattern", metavar="REGEX", help="an answer ends with the first match, e.g. $'\\n'")
    parser.add_argument("--no-greedy", action="store_true", help="leave the greedy answer out")
    parser.add_argument("--batch-rows", type=int, default=128, help="answers grown at a time (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def main(argv: list[str]) -> int:
    """Sample the answers and say what was written."""
    args = build_parser().parse_args(argv)
    from megatron_ledom.inference.sampling import Sampling
    from megatron_ledom.rerank.generation import GenerationSettings, sample_file

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        num_samples=args.num_samples,
    )
    settings = GenerationSettings(
        model=args.model,
        sampling=sampling,
        separator=args.separator,
        stop_pattern=args.stop_pattern,
        greedy=not args.no_greedy,
        batch_rows=args.batch_rows,
        device=args.device,
    )
    num_questions, num_blank = sample_file(args.input, args.output, settings, overwrite=args.overwrite)
    left_out = f", {num_blank} blank answers left out" if num_blank else ""
    print(f"{args.output}: {num_questions} questions, {args.num_samples} samples each{left_out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
