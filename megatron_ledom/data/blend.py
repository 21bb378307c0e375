"""What a run reads of each of its sources: tokens, samples, epochs.

Plain arithmetic over sizes, so that it can be looked at before anything starts. Which source sample n comes
from is Megatron's choice (`build_blending_indices`): always the source that is furthest behind its weight,
so that after n samples a source has given its share of n, to within a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlendSource:
    """One source of a blend.

    Attributes:
        prefix: path of the dataset without suffix.
        weight: its share, as given; only the ratio to the others counts.
        num_tokens: tokens of its training split, once through.
        budget_tokens: tokens that it was given by `--data-budget`, or None.
        num_samples: samples of its training split, once through, where these are not cut out of a stream of
            tokens but hold whole pairs and padding; None elsewhere.
    """

    prefix: str
    weight: float
    num_tokens: int
    budget_tokens: int | None = None
    num_samples: int | None = None


@dataclass(frozen=True)
class SourcePlan:
    """What is read of one source: its share of the samples, to within one, and how often that is the whole of it."""

    source: BlendSource
    share: float
    samples: int
    tokens: int
    epochs: float


def plan_blend(sources: Sequence[BlendSource], num_samples: int, seq_length: int) -> list[SourcePlan]:
    """Divide `num_samples` samples of `seq_length` tokens among the sources.

    >>> plan = plan_blend([BlendSource("a", 3, 400), BlendSource("b", 1, 400)], num_samples=100, seq_length=8)
    >>> [(p.samples, p.tokens, p.epochs) for p in plan]
    [(75, 600, 1.5), (25, 200, 0.5)]
    """
    total = sum(source.weight for source in sources)
    plans = []
    for source in sources:
        share = source.weight / total
        samples = round(num_samples * share)
        tokens = samples * seq_length
        epochs = tokens / source.num_tokens if source.num_tokens else float("inf") if tokens else 0.0
        if source.num_samples:
            epochs = samples / source.num_samples
            tokens = round(epochs * source.num_tokens)
        plans.append(SourcePlan(source, share, samples, tokens, epochs))
    return plans


def format_plan(plans: Sequence[SourcePlan], *, num_samples: int, seq_length: int, batch_size: int | None) -> str:
    """Write the plan as a table, with one line above it that says what the whole run reads."""
    steps = f"{num_samples / batch_size:,.0f} steps of {batch_size:,} samples, " if batch_size else ""
    rows: list[tuple[str, ...]] = [("source", "share", "tokens", "to read", "samples", "epochs", "of its budget")]
    for plan in plans:
        budget = plan.source.budget_tokens
        rows.append(
            (
                plan.source.prefix,
                f"{100 * plan.share:.2f} %",
                count_text(plan.source.num_tokens),
                count_text(plan.tokens),
                f"{plan.samples:,}",
                f"{plan.epochs:.3g}",
                f"{100 * plan.tokens / budget:.1f} % of {count_text(budget)}" if budget else "",
            )
        )
    if not any(plan.source.budget_tokens for plan in plans):
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    num_tokens = num_samples * seq_length
    if any(plan.source.num_samples for plan in plans):
        num_tokens = sum(plan.tokens for plan in plans)
    lines = [f"data: {count_text(num_tokens)} tokens ({steps}{num_samples:,} samples of {seq_length:,})"]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def count_text(count: int) -> str:
    """Write a number of tokens for people, with the letters that `--data-budget` takes.

    >>> [count_text(n) for n in (999, 1_500, 284_000_000_000)]
    ['999', '1.5K', '284B']
    """
    for letter, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return str(count)
