"""Ways to choose one of n samples, and how often each is right: the baselines and Reverse Reward itself.

A *credit* is the probability that the choice is right for one problem, over random sets of n of its N
samples and over ties. Every strategy sees the same sets, so that credits are comparable problem by problem.
Shape letters: P problems, N samples, S sets, n samples in a set.
"""

from __future__ import annotations

import numpy as np

GREEDY, RANDOM, MAJORITY, FORWARD = "greedy", "random of N", "majority vote", "forward likelihood"
REVERSE, COMBINED, BROKEN_TIES, ORACLE = "reverse only", "combined", "majority, ties by combined", "oracle of N"
STRATEGIES = (GREEDY, RANDOM, MAJORITY, FORWARD, REVERSE, COMBINED, BROKEN_TIES, ORACLE)
"""In the order of the tables."""


def draw_sets(num_samples: int, size: int, num_sets: int, seed: int) -> np.ndarray:
    """Draw sets of samples without replacement; the same for every problem.

    Args:
        num_samples: N.
        size: n. With n = N there is one set, with n = 1 each sample is one.
        num_sets: S, in between.
        seed: of the draw.

    Returns:
        Indices of samples, int [S, n].

    >>> draw_sets(3, 1, 100, seed=0).tolist(), draw_sets(3, 3, 100, seed=0).tolist()
    ([[0], [1], [2]], [[0, 1, 2]])
    """
    if size == num_samples:
        return np.arange(num_samples)[None, :]
    if size == 1:
        return np.arange(num_samples)[:, None]
    generator = np.random.default_rng([seed, size])
    return np.stack([np.sort(generator.permutation(num_samples)[:size]) for _ in range(num_sets)])


def credit_best(score_PN: np.ndarray, right_PN: np.ndarray, sets_Sn: np.ndarray) -> np.ndarray:
    """Choose the sample with the highest score; among equal scores one at random.

    Returns:
        Credits, float [P].

    >>> credit_best(np.array([[2.0, 3.0, 3.0]]), np.array([[True, True, False]]), np.array([[0, 1, 2]]))
    array([0.5])
    """
    score_PSn, right_PSn = score_PN[:, sets_Sn], right_PN[:, sets_Sn]
    is_best = score_PSn == score_PSn.max(axis=-1, keepdims=True)
    return ((is_best & right_PSn).sum(axis=-1) / is_best.sum(axis=-1)).mean(axis=-1)


def credit_random(right_PN: np.ndarray) -> np.ndarray:
    """Choose a sample at random: the share of right ones, whatever n is; float [P]."""
    return right_PN.mean(axis=-1)


def credit_oracle(right_PN: np.ndarray, sets_Sn: np.ndarray) -> np.ndarray:
    """Choose a right sample where there is one; float [P]."""
    return right_PN[:, sets_Sn].any(axis=-1).mean(axis=-1)


def count_votes(group_PN: np.ndarray, sets_Sn: np.ndarray) -> np.ndarray:
    """How many samples of the set share each one's answer, 0 for a sample without an answer; int [P, S, n].

    >>> count_votes(np.array([[0, 1, 0, -1]]), np.array([[0, 1, 2, 3]])).tolist()
    [[[2, 1, 2, 0]]]
    """
    group_PSn = group_PN[:, sets_Sn]
    votes = np.zeros(group_PSn.shape, dtype=np.int64)
    for place in range(group_PSn.shape[-1]):  # n comparisons of [P, S, n] instead of one of [P, S, n, n]
        votes += group_PSn == group_PSn[..., place, None]
    return np.where(group_PSn < 0, 0, votes)


def credit_majority(
    group_PN: np.ndarray, right_PN: np.ndarray, sets_Sn: np.ndarray, tie_score_PN: np.ndarray | None = None
) -> np.ndarray:
    """Choose the most frequent final answer.

    Args:
        group_PN: numbers of equal answers.
        right_PN: which samples are right.
        sets_Sn: the sets.
        tie_score_PN: among equally frequent answers the one of the sample with the highest score; None: at random.

    Returns:
        Credits, float [P].
    """
    votes_PSn = count_votes(group_PN, sets_Sn)
    is_chosen = votes_PSn == votes_PSn.max(axis=-1, keepdims=True)
    right_PSn = right_PN[:, sets_Sn]
    if tie_score_PN is not None:
        score_PSn = np.where(is_chosen, tie_score_PN[:, sets_Sn], -np.inf)
        is_chosen &= score_PSn == score_PSn.max(axis=-1, keepdims=True)
    # Answers that tie have equally many samples, so that a sample at random is an answer at random.
    return ((is_chosen & right_PSn).sum(axis=-1) / is_chosen.sum(axis=-1)).mean(axis=-1)
