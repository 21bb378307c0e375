"""Reverse Reward against its baselines: every strategy, at every N, with intervals.

Owns the order of the work: ranked files in (one a run, e.g. one a seed), lambda and normalisation chosen on
held-out problems of each run alone, credits on the others, intervals over problems. What a strategy does is
`strategies.py`'s, how the numbers are shown `report.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.rerank.answers import AnswerChecker
from megatron_ledom.rerank.bootstrap import bootstrap
from megatron_ledom.rerank.outcomes import Outcomes, read_outcomes
from megatron_ledom.rerank.reward import Normalize
from megatron_ledom.rerank.strategies import (
    BROKEN_TIES,
    COMBINED,
    FORWARD,
    GREEDY,
    MAJORITY,
    ORACLE,
    RANDOM,
    REVERSE,
    STRATEGIES,
    credit_best,
    credit_majority,
    credit_oracle,
    credit_random,
    draw_sets,
)

LAMBDAS = (
    *(0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45),
    *(0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
)
COMPARED_WITH = (FORWARD, MAJORITY, GREEDY)
MIN_PROBLEMS = 10
"""On each side of the split: fewer choose nothing and show nothing."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How runs are evaluated.

    Attributes:
        answer_field: where a line has its gold answer.
        answer_pattern: regular expression of the final answer, see `AnswerChecker`.
        held_out_share: share of the problems that chooses lambda and normalisation.
        num_sets: random sets of n samples for 1 < n < N.
        num_resamples: of the bootstrap.
        seed: of sets and resamples.
    """

    answer_field: str = "answer"
    answer_pattern: str | None = None
    held_out_share: float = 0.2
    num_sets: int = 32
    num_resamples: int = 10_000
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: a number out of its range.
        """
        if not 0 < self.held_out_share < 1:
            raise UsageError(f"--held-out-share is {self.held_out_share}, it must lie between 0 and 1")
        if self.num_sets < 1 or self.num_resamples < 100:
            raise UsageError(
                f"--sets {self.num_sets} and --resamples {self.num_resamples}: 1 and 100 are needed at least"
            )


@dataclass(frozen=True)
class Choice:
    """What the held-out problems of one run chose for one N.

    Attributes:
        forward: normalisation of the forward likelihood alone.
        combined: normalisation of both terms of the reward.
        reverse_weight: lambda.
        held_out_accuracy: of the combined reward there.
    """

    forward: Normalize
    combined: Normalize
    reverse_weight: float
    held_out_accuracy: float

    def to_record(self) -> dict[str, Any]:
        """As it is written in JSON."""
        return {
            "lambda": self.reverse_weight,
            "normalize": str(self.combined),
            "forward_normalize": str(self.forward),
            "held_out_accuracy": self.held_out_accuracy,
        }


def evaluate_files(paths: Sequence[Path], settings: EvaluationSettings) -> dict[str, Any]:
    """Evaluate ranked files that belong to one experiment, one file a run.

    Args:
        paths: written by tools/rerank.py; their lines carry gold answers.
        settings: everything else.

    Returns:
        The report, ready for JSON; docs/reverse_reward.md describes it.

    Raises:
        InputError: a file that cannot be evaluated, or too few problems on a side of the split.
        UsageError: a setting out of its range.
    """
    settings.check()
    checker = AnswerChecker(settings.answer_pattern)
    runs = [read_outcomes(path, checker, answer_field=settings.answer_field) for path in paths]
    sizes = build_sizes(min(run.num_samples for run in runs))
    strategies = [s for s in STRATEGIES if s != GREEDY or not any(np.isnan(run.greedy_right).any() for run in runs)]
    evaluated = [{size: _evaluate_run(run, size, strategies, settings) for size in sizes} for run in runs]
    credits = [{size: credit_PK for size, (_, credit_PK) in run.items()} for run in evaluated]
    choices = [{size: choice for size, (choice, _) in run.items()} for run in evaluated]
    problems = [
        [p for p, is_out in zip(run.problems, run.is_held_out(settings.held_out_share), strict=True) if not is_out]
        for run in runs
    ]
    pooled = {size: _mean_by_problem(problems, [credit[size] for credit in credits]) for size in sizes}
    return {
        "runs": [_describe_run(r, c, p) for r, c, p in zip(runs, choices, problems, strict=True)],
        "num_problems": len(pooled[sizes[0]]),
        "held_out_share": settings.held_out_share,
        "sizes": list(sizes),
        "num_sets": settings.num_sets,
        "num_resamples": settings.num_resamples,
        "seed": settings.seed,
        "strategies": strategies,
        "accuracy": {str(size): _intervals(pooled[size], strategies, settings) for size in sizes},
        "differences": {str(size): _differences(pooled[size], strategies, settings) for size in sizes},
        "differences_by_run": [_differences(c[sizes[-1]], strategies, settings) for c in credits],
        "accuracy_by_run": [_intervals(c[sizes[-1]], strategies, settings) for c in credits],
        "lambdas": list(LAMBDAS),
        "lambda_curve": [_lambda_curve(run, sizes[-1], settings) for run in runs],
    }


def build_sizes(num_samples: int) -> tuple[int, ...]:
    """Powers of two up to N, and N.

    >>> build_sizes(16), build_sizes(6)
    ((1, 2, 4, 8, 16), (1, 2, 4, 6))
    """
    powers = [2**k for k in range(num_samples.bit_length()) if 2**k < num_samples]
    return (*powers, num_samples)


def reward(run: Outcomes, reverse_weight: float, normalize: Normalize) -> np.ndarray:
    """Reverse Reward of every sample; float64 [P, N]."""
    return (1 - reverse_weight) * run.forward[normalize] + reverse_weight * run.reverse[normalize]


def choose(run: Outcomes, size: int, is_held_out: np.ndarray, settings: EvaluationSettings) -> Choice:
    """Choose lambda and normalisation by the accuracy on held-out problems.

    Among equally good values of lambda the middle one is taken, among normalisations the first.
    """
    sets = draw_sets(run.num_samples, size, settings.num_sets, settings.seed)
    right = run.right[is_held_out]
    found: dict[Normalize, list[float]] = {}
    for normalize in [n for n in Normalize if n in run.forward and n in run.reverse]:
        rewards = [reward(run, weight, normalize)[is_held_out] for weight in LAMBDAS]
        found[normalize] = [float(credit_best(r, right, sets).mean()) for r in rewards]
    combined = max(found, key=lambda n: max(found[n]))
    best = max(found[combined])
    tied = [weight for weight, accuracy in zip(LAMBDAS, found[combined], strict=True) if accuracy >= best - 1e-12]
    forward = max(found, key=lambda n: found[n][0])
    return Choice(forward, combined, tied[len(tied) // 2], best)


def _evaluate_run(
    run: Outcomes, size: int, strategies: Sequence[str], settings: EvaluationSettings
) -> tuple[Choice, np.ndarray]:
    """Choose on the held-out problems; credits on the others, float [P, K] in the order of `strategies`."""
    is_held_out = run.is_held_out(settings.held_out_share)
    num_held_out, num_test = int(is_held_out.sum()), int((~is_held_out).sum())
    if min(num_held_out, num_test) < MIN_PROBLEMS:
        raise InputError(
            f"{run.path}: {num_held_out} problems to choose lambda on and {num_test} to test; {MIN_PROBLEMS} each are "
            "needed. Give more questions, or another --held-out-share"
        )
    choice = choose(run, size, is_held_out, settings)
    is_test = ~is_held_out
    sets = draw_sets(run.num_samples, size, settings.num_sets, settings.seed)
    right, groups = run.right[is_test], run.groups[is_test]
    combined = reward(run, choice.reverse_weight, choice.combined)[is_test]
    credit = {
        RANDOM: credit_random(right),
        MAJORITY: credit_majority(groups, right, sets),
        FORWARD: credit_best(run.forward[choice.forward][is_test], right, sets),
        REVERSE: credit_best(run.reverse[Normalize.NONE][is_test], right, sets),
        COMBINED: credit_best(combined, right, sets),
        BROKEN_TIES: credit_majority(groups, right, sets, combined),
        ORACLE: credit_oracle(right, sets),
        GREEDY: run.greedy_right[is_test],
    }
    return choice, np.stack([credit[name] for name in strategies], axis=1)


def _mean_by_problem(problems: Sequence[Sequence[str]], credits: Sequence[np.ndarray]) -> np.ndarray:
    """Average the runs' credits problem by problem: a problem that several runs answered counts once; [P, K]."""
    places = {problem: place for place, problem in enumerate(dict.fromkeys(p for run in problems for p in run))}
    total, count = np.zeros((len(places), credits[0].shape[1])), np.zeros((len(places), 1))
    for run, credit_PK in zip(problems, credits, strict=True):
        rows = [places[problem] for problem in run]
        np.add.at(total, rows, credit_PK)
        np.add.at(count, rows, 1)
    return total / count


def _intervals(
    credit_PK: np.ndarray, strategies: Sequence[str], settings: EvaluationSettings
) -> dict[str, dict[str, float]]:
    found = bootstrap(credit_PK, num_resamples=settings.num_resamples, seed=settings.seed)
    return {name: interval.to_record() for name, interval in zip(strategies, found, strict=True)}


def _differences(
    credit_PK: np.ndarray, strategies: Sequence[str], settings: EvaluationSettings
) -> dict[str, dict[str, dict[str, float]]]:
    """Every strategy minus each of the baselines that are there."""
    found = {}
    for baseline in [b for b in COMPARED_WITH if b in strategies]:
        difference_PK = credit_PK - credit_PK[:, [strategies.index(baseline)]]
        found[baseline] = _intervals(difference_PK, strategies, settings)
    return found


def _lambda_curve(run: Outcomes, size: int, settings: EvaluationSettings) -> dict[str, list[float]]:
    """Accuracy on the test problems at every lambda: to read, never to choose by."""
    is_test = ~run.is_held_out(settings.held_out_share)
    sets = draw_sets(run.num_samples, size, settings.num_sets, settings.seed)
    return {
        str(normalize): [
            float(credit_best(reward(run, w, normalize)[is_test], run.right[is_test], sets).mean()) for w in LAMBDAS
        ]
        for normalize in Normalize
        if normalize in run.forward and normalize in run.reverse
    }


def _describe_run(run: Outcomes, choices: dict[int, Choice], problems: Sequence[str]) -> dict[str, Any]:
    return {
        "file": str(run.path),
        "num_problems": len(problems),
        "num_held_out": len(run.problems) - len(problems),
        "num_samples": run.num_samples,
        "num_missing": run.num_missing,
        "ranked_with": run.settings,
        "chosen": {str(size): choice.to_record() for size, choice in choices.items()},
    }
