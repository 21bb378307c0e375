r"""Run tasks of lm-evaluation-harness on a model of either direction (pip install 'megatron-ledom[eval]').

python tools/evaluate_harness.py --model runs/tiny/hf --tasks my_task --include-path tasks/

The harness asks for log P(continuation given context). A reverse model answers with the joint log-probability of
both, which ranks the options of a question in the same way (--reading joint), with log P(context given
continuation) (context), or as a task asks that was written for reverse models (reversed); see docs/scoring.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_ledom.errors import UsageError, run_cli
from megatron_ledom.inference import DEFAULT_BATCH_TOKENS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder of either direction, or RUN/checkpoints"
    )
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="the harness's names")
    parser.add_argument("--include-path", type=Path, help="folder of further task descriptions (YAML)")
    parser.add_argument(
        "--reading", choices=["joint", "context", "reversed"], default="joint", help="of a reverse model (joint)"
    )
    parser.add_argument("--num-fewshot", type=int, help="demonstrations (default: what the task says)")
    parser.add_argument("--limit", type=int, help="examples of each task (default: all)")
    parser.add_argument(
        "--batch-tokens", type=int, default=DEFAULT_BATCH_TOKENS, help="most tokens in a batch (default: %(default)s)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--assume-reverse", action="store_true", help="take a model whose config.json does not say its direction"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write the results to as well")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def main(argv: list[str]) -> int:
    """Run the tasks and print the results."""
    args = build_parser().parse_args(argv)
    from megatron_ledom.direction import Direction
    from megatron_ledom.inference.files import check_output, open_output
    from megatron_ledom.inference.folder import load_record

    if args.output is not None:
        check_output(args.output, overwrite=args.overwrite)
    load_record(args.model)
    try:
        from megatron_ledom.evaluation.harness import format_results, run_harness
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UsageError("lm-evaluation-harness is not installed: pip install 'megatron-ledom[eval]'") from error

    results = run_harness(
        args.model,
        args.tasks,
        reading=args.reading,
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        device=args.device,
        batch_tokens=args.batch_tokens,
        assume_direction=Direction.REVERSE if args.assume_reverse else None,
    )
    print(format_results(results))
    if args.output is not None:
        with open_output(args.output) as file:
            file.write(json.dumps(results, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
