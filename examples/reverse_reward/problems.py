"""Word problems with worked solutions: reasoning-gym's gsm_symbolic, thinned to what a tiny model can learn.

It owns which problems are used, the texts that both twins read, and the tokenizer. gsm_symbolic writes GSM8K-style
problems from templates, with a solution step by step that ends in "#### answer". A model of two million parameters
learns hardly any of them, so that only short ones with small whole numbers are kept: one in eight, of 15 templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path

from megatron_ledom.errors import InputError
from megatron_ledom.log import Progress

SEPARATOR = "\n"  # between question and solution, in training and in scoring
INSTRUCTION = " Give the result as your final answer. Do not include units."  # ends every question; says nothing
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
STRETCH = 100_000  # problems that a generator is asked for at a time; item i of seed s depends on s + i


@dataclass(frozen=True)
class Problem:
    """One problem: its question, worked solution, and final answer."""

    question: str
    solution: str
    answer: str


def draw_problems(largest_number: int, longest_chars: int) -> Iterator[Problem]:
    """Yield different problems without end, always the same ones in the same order.

    Args:
        largest_number: no number of question or solution is larger, and all are whole.
        longest_chars: question and solution together are not longer.

    Raises:
        InputError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError("the problems come from the package reasoning-gym: pip install reasoning-gym") from error
    stretches = (reasoning_gym.create_dataset("gsm_symbolic", size=STRETCH, seed=STRETCH * n) for n in count(1))
    seen: set[str] = set()
    for item in chain.from_iterable(stretches):
        problem = Problem(item["question"].removesuffix(INSTRUCTION), item["metadata"]["answer_cot"], item["answer"])
        text = problem.question + SEPARATOR + problem.solution
        numbers = NUMBER.findall(text)
        is_small = all(n.isdigit() and int(n) <= largest_number for n in numbers)
        if is_small and len(text) <= longest_chars and problem.question not in seen:
            seen.add(problem.question)
            yield problem


def write_problems(folder: Path, counts: dict[str, int], largest_number: int, longest_chars: int) -> None:
    """Write `folder/NAME.jsonl` for every name, in the order of `counts`; no question is in two of them."""
    source = draw_problems(largest_number, longest_chars)
    progress = Progress("draw problems", sum(counts.values()), "problems")
    for name, number in counts.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(number):
                file.write(json.dumps(asdict(next(source)), ensure_ascii=False) + "\n")
                progress.update(1)
    progress.close()


def read_problems(path: Path) -> list[Problem]:
    """Read what `write_problems` wrote."""
    return [Problem(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
