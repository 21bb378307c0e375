#!/usr/bin/env python3
"""Which mistakes does each score see? Right and wrong answers to the same problem, in pairs, by kind of mistake.

A wrong solution either has a false equation in it (a slip of arithmetic) or only true ones (it took something
from the question wrongly, or computed something else). Either kind may also name somebody who is not in the question,
which does not make an answer wrong. For each kind of pair: how often the right one scores higher; 50 % is chance.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_ledom.errors import run_cli

NUMBER = r"[$£€¥]?(\d+(?:/\d+)?)"
TERM = NUMBER + r"(?: [a-z/ ]*?)?"  # with its unit
EQUATION = re.compile(rf"(?:{TERM}\s*[-+*/x]\s*)+{TERM}\s*=\s*{NUMBER}")
TOKEN = re.compile(r"\d+/\d+|\d+|(?<![a-z])[-+*/x](?![a-z])")
NAME = re.compile(r"\b[A-Z][a-z]+\b")
SENTENCE_STARTS = {
    "He",
    "She",
    "They",
    "The",
    "There",
    "If",
    "So",
    "In",
    "Her",
    "His",
    "Right",
    "Together",
    "Therefore",
}
SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "forward": lambda c: c["forward_logprob"],
    "forward per token": lambda c: c["forward_logprob"] / c["num_forward_tokens"],
    "reverse": lambda c: c["reverse_logprob"],
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="ranked.jsonl of the experiment's seeds")
    return parser


def is_true(equation: str) -> bool:
    """Whether `a op b op c = d` holds, units and currencies not looked at.

    >>> is_true("9 * £5 = £45"), is_true("40-8-16 = 17"), is_true("192 pages x 2/3 = 128")
    (True, False, True)
    """
    left, _, right = equation.rpartition("=")
    words = [f"Fraction('{w}')" if w[0].isdigit() else w.replace("x", "*") for w in TOKEN.findall(left)]
    try:
        value = eval("".join(words), {"__builtins__": {}}, {"Fraction": Fraction})  # numbers and operators alone
    except (SyntaxError, ZeroDivisionError):
        return False
    return bool(value == Fraction(TOKEN.findall(right)[0]))


def has_slip(solution: str) -> bool:
    """Whether an equation of the solution is false."""
    return any(not is_true(match.group()) for match in EQUATION.finditer(solution))


def names_a_stranger(solution: str, question: str) -> bool:
    """Whether a name in the solution is not in the question."""
    return bool(set(NAME.findall(solution)) - SENTENCE_STARTS - set(NAME.findall(question)))


def final_answer(text: str) -> str:
    """What follows the last ####."""
    return text.rpartition("####")[2].strip() if "####" in text else ""


def pairs(line: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield (kind, right, wrong) for every pair of different samples of one problem."""
    samples = {c["text"]: c for c in line["candidates"] if not c.get("greedy")}.values()
    for wrong in (c for c in samples if final_answer(c["text"]) != line["answer"]):
        mistake = "slip of arithmetic" if has_slip(wrong["text"]) else "all equations true"
        for right in (c for c in samples if final_answer(c["text"]) == line["answer"]):
            stranger = [names_a_stranger(c["text"], line["question"]) for c in (right, wrong)]
            who = {(0, 0): "neither", (1, 1): "both", (1, 0): "the right one", (0, 1): "the wrong one"}[tuple(stranger)]
            yield f"{mistake} | {who}", right, wrong


def build_table(lines: Sequence[dict[str, Any]]) -> str:
    """Count how often the right one of a pair scores higher; Markdown."""
    counts: dict[str, list[float]] = {}
    for line in lines:
        for kind, right, wrong in pairs(line):
            row = counts.setdefault(kind, [0] * (len(SCORES) + 1))
            row[-1] += 1
            for place, score in enumerate(SCORES.values()):
                row[place] += (score(right) > score(wrong)) + 0.5 * (score(right) == score(wrong))
    heads = ["mistake of the wrong one", "a name from elsewhere in", "pairs", *(f"{name}, %" for name in SCORES)]
    rows = [
        [kind, f"{int(row[-1]):,}", *(f"{100 * n / row[-1]:.1f}" for n in row[:-1])] for kind, row in counts.items()
    ]
    rows.sort()
    return "\n".join(
        [f"| {' | '.join(heads)} |", "|---" * 2 + "|--:" * (len(heads) - 2) + "|"]
        + [f"| {' | '.join(r)} |" for r in rows]
    )


def main(argv: list[str]) -> int:
    """Print the table."""
    args = build_parser().parse_args(argv)
    lines = [json.loads(row) for path in args.input for row in path.read_text(encoding="utf-8").splitlines()]
    print(build_table(lines))
    return 0


if __name__ == "__main__":
    run_cli(main)
