r"""Compare every way of choosing among N answers: greedy, random, majority vote, likelihood, Reverse Reward, oracle.

python tools/evaluate_rerank.py --input ranked.jsonl --output report

It reads what tools/rerank.py wrote (several files: one a seed of the same experiment), with the gold answer on every
line, and needs no model. Lambda and normalisation are chosen on held-out problems. Printed, and written as
report.md, report.json and report.png; docs/reverse_reward.md describes them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_ledom.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, help="JSONL that tools/rerank.py wrote, one a run"
    )
    parser.add_argument("--output", type=Path, help="write OUTPUT.md, OUTPUT.json and OUTPUT.png (default: print only)")
    parser.add_argument("--answer-field", default="answer", help="field with the gold answer (default: %(default)s)")
    parser.add_argument(
        "--answer-pattern",
        help="regular expression of a candidate's final answer: group 1 of its last match "
        "(default: what follows the last ####, or else what math-verify finds in the whole text)",
    )
    parser.add_argument(
        "--held-out-share",
        type=float,
        default=0.2,
        help="share of the problems that chooses lambda and normalisation, by a hash of the question "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--sets", type=int, default=32, help="random sets of n samples for n below N (default: %(default)s)"
    )
    parser.add_argument(
        "--resamples", type=int, default=10_000, help="of the bootstrap over problems (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sets and resamples (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def main(argv: list[str]) -> int:
    """Evaluate, print the tables and write them."""
    args = build_parser().parse_args(argv)
    from megatron_ledom.inference.files import check_output, open_output
    from megatron_ledom.rerank.evaluation import EvaluationSettings, evaluate_files
    from megatron_ledom.rerank.report import draw_report, format_markdown

    outputs = (
        [args.output.with_name(f"{args.output.name}.{kind}") for kind in ("md", "json", "png")] if args.output else []
    )
    for path in outputs:
        check_output(path, overwrite=args.overwrite)
    settings = EvaluationSettings(
        answer_field=args.answer_field,
        answer_pattern=args.answer_pattern,
        held_out_share=args.held_out_share,
        num_sets=args.sets,
        num_resamples=args.resamples,
        seed=args.seed,
    )
    report = evaluate_files(args.input, settings)
    text = format_markdown(report)
    print(text, end="")
    if outputs:
        markdown, record, picture = outputs
        draw_report(report, picture)
        with open_output(record) as file:
            file.write(json.dumps(report, indent=1) + "\n")
        with open_output(markdown) as file:
            file.write(text)
        print(f"\n{', '.join(str(path) for path in outputs)}")
    return 0


if __name__ == "__main__":
    run_cli(main)
