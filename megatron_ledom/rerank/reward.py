"""Reverse Reward: the arithmetic, and nothing else.

    R(x, y) = (1 - lambda) * log P_F(y given x) + lambda * log P_R(x given y)

x is the question, y the candidate answer, P_F a forward model, P_R a reverse one.
The paper publishes neither lambda nor whether the logarithms are divided by a
length, so both are options here and are written beside every result
(docs/reverse_reward.md).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ledom.errors import UsageError


class Normalize(enum.StrEnum):
    """What a text's log-probability is divided by before it enters the reward."""

    NONE = "none"
    TOKEN = "token"
    CHAR = "char"


@dataclass(frozen=True)
class TextLogprob:
    """The log-probability of a text, and the lengths that it may be divided by.

    Attributes:
        logprob: total, natural logarithm.
        num_tokens: of the scored text, under the model that scored it; None where unknown.
        num_chars: of the scored text.
    """

    logprob: float
    num_tokens: int | None
    num_chars: int

    def normalized(self, normalize: Normalize) -> float:
        """The log-probability, as a total or per token or character.

        Raises:
            UsageError: a division by tokens, and their number is not known.
        """
        if normalize is Normalize.NONE:
            return self.logprob
        if normalize is Normalize.CHAR:
            return self.logprob / self.num_chars
        if self.num_tokens is None:
            raise UsageError("--normalize token: the number of tokens behind a log-probability is not known")
        return self.logprob / self.num_tokens


def check_reverse_weight(reverse_weight: float) -> None:
    """Refuse a lambda outside [0, 1].

    Raises:
        UsageError: it is outside, or not a number.
    """
    if not 0.0 <= reverse_weight <= 1.0:
        raise UsageError(f"--lambda is {reverse_weight}, it must be between 0 (forward only) and 1 (reverse only)")


def reverse_reward(
    answer_given_question: TextLogprob | None,
    question_given_answer: TextLogprob,
    *,
    reverse_weight: float,
    normalize: Normalize,
) -> float:
    """Reverse Reward of one candidate.

    Args:
        answer_given_question: forward score of the answer; may be None where its weight is 0.
        question_given_answer: reverse score of the question.
        reverse_weight: lambda, in [0, 1].
        normalize: each score is divided by the length of its own text.

    Raises:
        UsageError: lambda is outside [0, 1], or a length that is needed is not known.

    >>> forward, reverse = TextLogprob(-6.0, 3, 12), TextLogprob(-10.0, 5, 20)
    >>> reverse_reward(forward, reverse, reverse_weight=0.25, normalize=Normalize.NONE)
    -7.0
    >>> reverse_reward(forward, reverse, reverse_weight=0.25, normalize=Normalize.TOKEN)
    -2.0
    """
    check_reverse_weight(reverse_weight)
    reward = reverse_weight * question_given_answer.normalized(normalize)
    if reverse_weight < 1.0:
        if answer_given_question is None:
            raise UsageError(f"--lambda {reverse_weight} needs the forward model's score of every candidate")
        reward += (1.0 - reverse_weight) * answer_given_question.normalized(normalize)
    return reward


def rank_rewards(rewards: Sequence[float]) -> list[int]:
    """Indices of the rewards from the highest to the lowest; equal ones keep their order.

    >>> rank_rewards([-3.0, -1.0, -3.0])
    [1, 0, 2]
    """
    return sorted(range(len(rewards)), key=lambda i: -rewards[i])
