"""Strategies against a slow twin that looks at one set of samples at a time, and the bootstrap against theory."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megatron_ledom.rerank.bootstrap import bootstrap
from megatron_ledom.rerank.strategies import (
    credit_best,
    credit_majority,
    credit_oracle,
    credit_random,
    draw_sets,
)

P, N = 40, 7


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of equal answers (some samples have none), which of them is right, and scores with ties."""
    generator = np.random.default_rng(3)
    groups = generator.integers(-1, 4, size=(P, N))
    right = (groups == generator.integers(0, 4, size=(P, 1))) & (groups >= 0)
    scores = generator.integers(-6, 0, size=(P, N)).astype(float)
    return groups, right, scores


def mean_over_sets(sets: np.ndarray, of: object) -> list[float]:
    return [float(sum(Fraction(of(p, list(s))) for s in sets.tolist()) / len(sets)) for p in range(P)]  # type: ignore[operator]


@pytest.mark.parametrize("size", [1, 2, 4, N])
def test_credits_equal_a_count_by_hand(samples: tuple[np.ndarray, np.ndarray, np.ndarray], size: int) -> None:
    groups, right, scores = samples
    sets = draw_sets(N, size, 9, seed=5)

    def best(p: int, chosen: list[int]) -> Fraction:
        top = [i for i in chosen if scores[p, i] == max(scores[p, j] for j in chosen)]
        return Fraction(int(sum(right[p, top])), len(top))

    def winners(p: int, chosen: list[int]) -> list[int]:
        votes = Counter(int(groups[p, i]) for i in chosen if groups[p, i] >= 0)
        return [g for g, count in votes.items() if count == max(votes.values())]

    def majority(p: int, chosen: list[int]) -> Fraction:
        found = winners(p, chosen)
        return Fraction(sum(bool(right[p][groups[p] == g].all()) for g in found), len(found)) if found else Fraction(0)

    def majority_by_score(p: int, chosen: list[int]) -> Fraction:
        found = [i for i in chosen if groups[p, i] in winners(p, chosen)]
        top = [i for i in found if scores[p, i] == max(scores[p, j] for j in found)]
        return Fraction(int(sum(right[p, top])), len(top)) if top else Fraction(0)

    assert credit_best(scores, right, sets) == pytest.approx(mean_over_sets(sets, best))
    assert credit_majority(groups, right, sets) == pytest.approx(mean_over_sets(sets, majority))
    assert credit_majority(groups, right, sets, scores) == pytest.approx(mean_over_sets(sets, majority_by_score))
    oracle = mean_over_sets(sets, lambda p, chosen: int(right[p, chosen].any()))
    assert credit_oracle(right, sets) == pytest.approx(oracle)


def test_a_single_sample_leaves_no_choice(samples: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    groups, right, scores = samples
    sets = draw_sets(N, 1, 9, seed=5)
    for credit in (credit_best(scores, right, sets), credit_majority(groups, right, sets), credit_oracle(right, sets)):
        assert credit == pytest.approx(credit_random(right))


def test_sets_are_random_distinct_and_reproducible() -> None:
    sets = draw_sets(16, 4, 500, seed=1)
    assert all(len(set(row)) == 4 for row in sets.tolist())
    assert (draw_sets(16, 4, 500, seed=1) == sets).all()
    assert (draw_sets(16, 4, 500, seed=2) != sets).any()
    counts = np.bincount(sets.ravel(), minlength=16)
    assert abs(counts - 125).max() < 5 * math.sqrt(125)


def test_intervals_are_those_of_theory_and_paired_ones_are_narrower() -> None:
    generator = np.random.default_rng(0)
    first = (generator.random(2000) < 0.6).astype(float)
    second = np.where(generator.random(2000) < 0.9, first, 1 - first)  # differ on a tenth of the problems
    columns = np.stack([first, second, first - second], axis=1)
    intervals = bootstrap(columns, num_resamples=4000, seed=1)
    for column, interval in zip(columns.T, intervals, strict=True):
        error = 1.96 * column.std() / math.sqrt(2000)
        assert interval.mean == pytest.approx(column.mean())
        assert interval.low == pytest.approx(column.mean() - error, abs=0.12 * error)
        assert interval.high == pytest.approx(column.mean() + error, abs=0.12 * error)
    unpaired = math.hypot(*(i.high - i.low for i in intervals[:2]))
    assert intervals[2].high - intervals[2].low < 0.6 * unpaired


def test_the_same_seed_gives_the_same_interval_whatever_stands_beside_it() -> None:
    values = np.random.default_rng(0).random((50, 3))
    together = bootstrap(values, num_resamples=700, seed=4)
    (alone,) = bootstrap(values[:, 1:2], num_resamples=700, seed=4)
    assert alone.to_record() == pytest.approx(together[1].to_record())
    assert bootstrap(values, num_resamples=700, seed=5) != together
