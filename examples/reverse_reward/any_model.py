#!/usr/bin/env python3
"""The full path with a forward model and a reverse model of your own: questions, N answers, ranking, the table.

The questions come from reasoning-gym's generators, with their answers. It shows that the path runs; a small
model, few questions and a scorer trained on other text show nothing about Reverse Reward.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ledom.errors import InputError, run_cli
from megatron_ledom.testing import REPOSITORY

GENERATORS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "gsm_symbolic": {},
}
SEPARATOR = "\nAnswer:"
LOOKED_AT = 20  # questions drawn for each that is wanted, since long ones are passed over


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward-model", type=Path, required=True, help="Hugging Face folder of any causal LM")
    parser.add_argument("--reverse-model", type=Path, required=True, help="Hugging Face folder of a reverse model")
    parser.add_argument("--output", "-o", type=Path, required=True, help="folder for everything; made if absent")
    parser.add_argument("--generators", nargs="+", choices=list(GENERATORS), default=list(GENERATORS))
    parser.add_argument("--num-questions", type=int, default=60, help="in all (default: %(default)s)")
    parser.add_argument(
        "--longest-chars", type=int, default=300, help="of a question, for short contexts (default: %(default)s)"
    )
    parser.add_argument("--num-samples", type=int, default=8, help="answers to each (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of questions and samples (default: %(default)s)")
    return parser


def write_questions(path: Path, generators: Sequence[str], count: int, longest_chars: int, seed: int) -> None:
    """Write `count` questions with their answers, the same number of each generator (one more of the first).

    Args:
        path: JSONL to write.
        generators: names of reasoning-gym's.
        count: questions in all.
        longest_chars: longer questions are passed over.
        seed: of the generators.

    Raises:
        InputError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError("the questions come from the package reasoning-gym: pip install reasoning-gym") from error
    with path.open("w", encoding="utf-8") as file:
        for place, name in enumerate(generators):
            items = reasoning_gym.create_dataset(name, size=LOOKED_AT * count, seed=seed, **GENERATORS[name])
            fitting = (item for item in items if len(item["question"]) <= longest_chars)
            for item in islice(fitting, len(range(place, count, len(generators)))):
                record = {"question": item["question"], "answer": item["answer"], "generator": name}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def run_tool(tool: str, *arguments: object) -> None:
    """Run one of the project's tools and show what it prints.

    Raises:
        InputError: it failed; it has said why.
    """
    words = [str(argument) for argument in arguments]
    print("$ python", f"tools/{tool}", *words, flush=True)
    if subprocess.run([sys.executable, REPOSITORY / "tools" / tool, *words], check=False).returncode != 0:
        raise InputError(f"tools/{tool} failed")


def main(argv: list[str]) -> int:
    """Run the four steps."""
    args = build_parser().parse_args(argv)
    folder = args.output
    folder.mkdir(parents=True, exist_ok=True)
    questions, candidates, ranked = (folder / f"{name}.jsonl" for name in ("questions", "candidates", "ranked"))
    write_questions(questions, args.generators, args.num_questions, args.longest_chars, args.seed)
    run_tool(
        "sample_answers.py",
        *("--model", args.forward_model, "--input", questions, "--output", candidates, "--overwrite"),
        *("--num-samples", args.num_samples, "--max-new-tokens", args.max_new_tokens, "--seed", args.seed),
        *("--separator", SEPARATOR, "--stop-pattern", r"\n", "--batch-rows", 32),
    )
    run_tool(
        "rerank.py",
        *("--input", candidates, "--output", ranked, "--separator", SEPARATOR, "--overwrite"),
        *("--reverse-model", args.reverse_model, "--forward-model", args.forward_model),
    )
    evaluation = ("--input", ranked, "--output", folder / "report", "--held-out-share", 0.25, "--overwrite")
    run_tool("evaluate_rerank.py", *evaluation)
    return 0


if __name__ == "__main__":
    run_cli(main)
