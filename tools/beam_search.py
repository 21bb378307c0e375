r"""Step-level beam search: solutions grown step by step by a forward model, the best kept by Reverse Reward.

python tools/beam_search.py --forward-model runs/forward/hf --reverse-model runs/reverse/hf \
    --input questions.jsonl --output searched.jsonl --separator $'\n' --step newline --beams 4 --expansions 3 --print

Every line of the output holds the last beams as ranked candidates, and the whole tree; docs/reverse_reward.md
describes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="JSONL: a question (or prompt) on each line")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--forward-model", type=Path, required=True, help="Hugging Face folder: writes the steps")
    parser.add_argument("--reverse-model", type=Path, required=True, help="Hugging Face folder of a reverse model")
    parser.add_argument("--beams", type=int, default=4, help="partial solutions kept (default: %(default)s)")
    parser.add_argument("--expansions", type=int, default=3, help="continuations of each (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, default=16, help="most steps of a solution (default: %(default)s)")
    parser.add_argument(
        "--step",
        choices=["newline", "sentence", "pattern"],
        default="newline",
        help="where a step ends (default: %(default)s)",
    )
    parser.add_argument("--step-pattern", metavar="REGEX", help="with --step pattern: a step ends where it matches")
    parser.add_argument("--punkt", type=Path, metavar="JSON", help="with --step sentence: Punkt's parameters")
    parser.add_argument(
        "--lambda", dest="reverse_weight", type=float, default=0.5, help="weight of the reverse model (%(default)s)"
    )
    parser.add_argument("--normalize", choices=["none", "token", "char"], default="none", help="(default: %(default)s)")
    parser.add_argument("--separator", default="", help="text between question and solution (default: none)")
    parser.add_argument("--step-tokens", type=int, default=64, help="longest step (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 0 (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="0: all tokens (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--min-p", type=float, default=0.0, help="0: all tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random draw (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    parser.add_argument("--assume-reverse", action="store_true", help="take a reverse model without a direction")
    parser.add_argument("--print", dest="is_printed", action="store_true", help="print every tree")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def main(argv: list[str]) -> int:
    """Search and say what was written."""
    args = build_parser().parse_args(argv)
    from megatron_ledom.inference.sampling import Sampling
    from megatron_ledom.rerank.beam import BeamSettings, format_tree, search_file
    from megatron_ledom.rerank.best_of_n import RerankSettings
    from megatron_ledom.rerank.reward import Normalize
    from megatron_ledom.rerank.steps import build_step_end

    reward = RerankSettings(
        reverse_model=args.reverse_model,
        forward_model=args.forward_model,
        reverse_weight=args.reverse_weight,
        normalize=Normalize(args.normalize),
        separator=args.separator,
        device=args.device,
        assume_reverse=args.assume_reverse,
    )
    settings = BeamSettings(
        reward=reward,
        sampling=Sampling(
            max_new_tokens=args.step_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            seed=args.seed,
        ),
        step=args.step if args.step_pattern is None else f"pattern {args.step_pattern}",
        num_beams=args.beams,
        expansions=args.expansions,
        max_steps=args.max_steps,
    )
    find_end = build_step_end(args.step, pattern=args.step_pattern, punkt=args.punkt)
    num_questions = num_finished = 0
    for record in search_file(args.input, args.output, find_end, settings, overwrite=args.overwrite):
        num_questions += 1
        num_finished += record["candidates"][0]["finished"]
        if args.is_printed:
            print(f"{record.get('question', record.get('prompt'))}\n{format_tree(record)}\n")
    print(f"{args.output}: {num_questions} questions searched, {num_finished} of the best solutions finished")
    return 0


if __name__ == "__main__":
    run_cli(main)
