"""Paired bootstrap: how far an accuracy, or a difference of two, may lie from what was measured.

Problems are drawn with replacement, the same ones for every strategy (and every run of an experiment), so that
a difference is judged on the problems on which the two really differ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

_BLOCK = 500  # resamples at a time: 500 x 10,000 problems are 40 MB


@dataclass(frozen=True)
class Interval:
    """A mean over problems and its percentile interval.

    Attributes:
        mean: what was measured.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    def to_record(self) -> dict[str, float]:
        """As it is written in JSON."""
        return asdict(self)


def bootstrap(values_PK: np.ndarray, *, num_resamples: int, seed: int, confidence: float = 0.95) -> list[Interval]:
    """Intervals of the means of K columns of values, one row a problem.

    Args:
        values_PK: credits or differences of credits; float [P, K].
        num_resamples: how often P problems are drawn.
        seed: of the draw.
        confidence: share of the resampled means within the interval.

    Returns:
        One interval a column. The same seed and P give the same resamples, whatever the columns are.
    """
    num_problems = len(values_PK)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, num_resamples, _BLOCK):
        rows = min(_BLOCK, num_resamples - start)
        weights = generator.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=rows)
        means.append(weights @ values_PK / num_problems)
    tail = (1 - confidence) / 2
    low_K, high_K = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return [
        Interval(float(m), float(a), float(b)) for m, a, b in zip(values_PK.mean(axis=0), low_K, high_K, strict=True)
    ]
