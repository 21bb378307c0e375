"""Ranked files with answers whose worth is known, as tools/rerank.py writes them, for tests of the evaluation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def write_ranked(
    path: Path,
    num_problems: int,
    num_samples: int,
    *,
    seed: int,
    reverse_skill: float,
    forward_skill: float = 0.0,
    with_greedy: bool = True,
) -> Path:
    """Write a file of problems whose samples are right with probability 0.4.

    Args:
        path: the file.
        num_problems: lines.
        num_samples: samples of each.
        seed: of everything that is drawn.
        reverse_skill: nats by which a right answer's reverse score is higher on average, at a spread of 1.
        forward_skill: likewise of the forward score.
        with_greedy: add a candidate marked greedy.
    """
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for problem in range(num_problems):
            gold = problem + 100
            candidates: list[dict[str, Any]] = []
            for index in range(num_samples + with_greedy):
                is_right = generator.random() < 0.4
                answer = gold if is_right else generator.choice([1, 2, 3])
                candidates.append(
                    {
                        "text": f"So it is {answer}.{' Yes.' * generator.randint(0, 9)}\n#### {answer}",
                        "index": index,
                        "forward_logprob": -20 + generator.gauss(forward_skill * is_right, 1),
                        "num_forward_tokens": 12,
                        "reverse_logprob": -40 + generator.gauss(reverse_skill * is_right, 1),
                        "num_reverse_tokens": 24,
                    }
                )
            if with_greedy:
                candidates[-1]["greedy"] = True
            generator.shuffle(candidates)
            line = {"question": f"Problem {problem}?", "answer": gold, "candidates": candidates}
            file.write(json.dumps({**line, "reverse_reward": {"lambda": 0.5}}) + "\n")
    return path
