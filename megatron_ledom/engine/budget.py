"""`--data-budget`: tokens instead of weights for the sources of a blend.

A budget becomes Megatron's `--data-path WEIGHT PREFIX ...`, the tokens being the weights, and the length of
the run where no flag names one. It does not know what the sources hold; the report of `data/blend.py` does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ledom.errors import UsageError

LETTERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?):(.+)")


@dataclass(frozen=True)
class TokenBudget:
    """Tokens to read of one source."""

    tokens: int
    prefix: str


def parse_budgets(words: Sequence[str]) -> list[TokenBudget]:
    """Read `TOKENS:PREFIX` words; K, M, B and T stand for thousands to millions of millions.

    Raises:
        UsageError: a word is of another form, a budget is 0, or a prefix is named twice.

    >>> parse_budgets(["284B:data/general", "1.5M:data/code"])[1]
    TokenBudget(tokens=1500000, prefix='data/code')
    """
    budgets = []
    for word in words:
        match = _BUDGET.fullmatch(word)
        tokens = round(float(match[1]) * LETTERS[match[2]]) if match else 0
        if match is None or tokens == 0:
            raise UsageError(f"--data-budget {word}: write TOKENS:PREFIX, e.g. 284B:data/general_text_document")
        budgets.append(TokenBudget(tokens, match[3]))
    twice = {b.prefix for b in budgets if [other.prefix for other in budgets].count(b.prefix) > 1}
    if twice:
        raise UsageError(f"--data-budget names {', '.join(sorted(twice))} twice: give each source one budget")
    return budgets


def as_data_path(budgets: Sequence[TokenBudget]) -> list[str]:
    """The value of Megatron's `--data-path` that reads the sources in these proportions."""
    return [word for budget in budgets for word in (str(budget.tokens), budget.prefix)]


def check_budget(budgets: Sequence[TokenBudget], num_samples: int, seq_length: int, batch_size: int) -> None:
    """Refuse a run that reads more than its budget; to reach into the last batch is not more.

    Raises:
        UsageError: with both numbers.
    """
    allowed, asked = sum(b.tokens for b in budgets), num_samples * seq_length
    if asked > allowed + batch_size * seq_length:
        steps = budget_steps(budgets, seq_length, batch_size)
        raise UsageError(
            f"the run reads {asked:,} tokens ({num_samples:,} samples of {seq_length:,}), --data-budget allows "
            f"{allowed:,}: lower its length to {steps:,} steps, name none (the budget sets it), or raise the budget"
        )


def budget_steps(budgets: Sequence[TokenBudget], seq_length: int, batch_size: int) -> int:
    """Steps that a budget lasts, rounded up: the last batch may reach beyond it."""
    return -(-sum(b.tokens for b in budgets) // (seq_length * batch_size))
