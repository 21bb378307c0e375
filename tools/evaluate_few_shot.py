r"""Let a reverse model solve word problems, writing upwards from the paper's reversed few-shot prompt.

python tools/evaluate_few_shot.py --model runs/tiny/hf --input test.jsonl --demonstrations train.jsonl \
    --output solved.jsonl

Problems are {"question", "answer"} lines, demonstrations have a "chain" as well (docs/scoring.md draws the prompt).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a reverse model, or RUN/checkpoints")
    parser.add_argument("--input", type=Path, required=True, help="JSONL of problems")
    parser.add_argument("--demonstrations", type=Path, help="JSONL of problems with chains; the first ones are shown")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write: what was said of each problem")
    parser.add_argument("--num-shots", type=int, default=4, help="demonstrations (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens to write (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--assume-reverse", action="store_true", help="take a model whose config.json does not say its direction"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def main(argv: list[str]) -> int:
    """Evaluate and print the accuracy."""
    args = build_parser().parse_args(argv)
    from megatron_ledom.evaluation.few_shot import FewShotSettings, evaluate_few_shot

    settings = FewShotSettings(
        model=args.model,
        num_shots=args.num_shots,
        max_new_tokens=args.max_new_tokens,
        device=args.device,
        assume_reverse=args.assume_reverse,
    )
    found = evaluate_few_shot(args.input, args.demonstrations, args.output, settings, overwrite=args.overwrite)
    print(
        f"{args.output}: {found['right']} of {found['problems']} right, {100 * found['accuracy']:.1f} % "
        f"(95 %: {100 * found['low']:.1f} to {100 * found['high']:.1f}); {found['answered']} said an answer"
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
