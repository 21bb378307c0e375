"""The arithmetic of Reverse Reward and the order that it gives."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from megatron_ledom.errors import UsageError
from megatron_ledom.rerank.reward import Normalize, TextLogprob, rank_rewards, reverse_reward

FORWARD = TextLogprob(-12.0, num_tokens=4, num_chars=24)
REVERSE = TextLogprob(-30.0, num_tokens=10, num_chars=50)


@pytest.mark.parametrize(
    ("normalize", "forward", "reverse"),
    [(Normalize.NONE, -12.0, -30.0), (Normalize.TOKEN, -3.0, -3.0), (Normalize.CHAR, -0.5, -0.6)],
)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_reward_is_the_weighted_sum_of_normalised_terms(
    normalize: Normalize, forward: float, reverse: float, weight: float
) -> None:
    reward = reverse_reward(FORWARD, REVERSE, reverse_weight=weight, normalize=normalize)
    assert reward == pytest.approx((1 - weight) * forward + weight * reverse, rel=1e-15)


@pytest.mark.parametrize("weight", [-0.1, 1.5, math.nan])
def test_a_lambda_outside_its_range_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match="--lambda is"):
        reverse_reward(FORWARD, REVERSE, reverse_weight=weight, normalize=Normalize.NONE)


def test_the_forward_term_may_be_absent_only_when_it_has_no_weight() -> None:
    assert reverse_reward(None, REVERSE, reverse_weight=1.0, normalize=Normalize.NONE) == -30.0
    with pytest.raises(UsageError, match="needs the forward model's score"):
        reverse_reward(None, REVERSE, reverse_weight=0.9, normalize=Normalize.NONE)


def test_a_division_by_an_unknown_length_is_refused() -> None:
    forward = TextLogprob(-12.0, num_tokens=None, num_chars=24)
    assert reverse_reward(forward, REVERSE, reverse_weight=0.0, normalize=Normalize.CHAR) == -0.5
    with pytest.raises(UsageError, match="--normalize token"):
        reverse_reward(forward, REVERSE, reverse_weight=0.0, normalize=Normalize.TOKEN)


def test_ranks_are_stable_and_descending() -> None:
    assert rank_rewards([-2.0, -1.0, -2.0, -1.0, -math.inf]) == [1, 3, 0, 2, 4]
    rewards = [random.Random(0).choice([-3.0, -2.0, -1.0]) for _ in range(50)]
    order = rank_rewards(rewards)
    assert sorted(order) == list(range(50))
    assert all((-rewards[a], a) < (-rewards[b], b) for a, b in itertools.pairwise(order))
