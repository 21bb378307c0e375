"""The comparison of losses as a table for people and as a JSON object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ledom.evaluation.loss import LossComparison, TextLoss

HEADERS = ("model", "direction", "tokens", "loss/token", "bits/byte", "unigram loss", "below unigram")


def format_table(comparison: LossComparison) -> str:
    """Return the losses as an aligned Markdown table, one model a row; losses in nats."""
    unigram = comparison.unigram
    rows: list[tuple[str, ...]] = [HEADERS]
    names = _distinct_names([folder for folder, _, _ in comparison.rows])
    for name, (_, direction, loss) in zip(names, comparison.rows, strict=True):
        beside = ("-", "-")
        if unigram is not None:
            beside = (f"{unigram.per_token:.4f}", f"{unigram.per_token - loss.per_token:.4f}")
        figures = (f"{loss.num_tokens:,}", f"{loss.per_token:.4f}", f"{loss.bits_per_byte:.4f}", *beside)
        rows.append((name, str(direction), *figures))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
    lines = [_format_row(row, widths) for row in rows]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if c < 2 else ":") for c, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """Name folders by their last parts, as few as tell them apart; whole where nothing does.

    >>> _distinct_names([Path("runs/a/hf"), Path("runs/b/hf")])
    ['a/hf', 'b/hf']
    """
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _format_row(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [text.ljust(w) if c < 2 else text.rjust(w) for c, (text, w) in enumerate(zip(row, widths, strict=True))]
    return "| " + " | ".join(cells) + " |"


def describe_comparison(comparison: LossComparison) -> dict[str, Any]:
    """Return the comparison as a JSON object; losses in nats per token."""
    return {
        "format_version": 1,
        "num_documents": comparison.num_documents,
        "context_tokens": comparison.context_tokens,
        "stride_tokens": comparison.stride_tokens,
        "unigram": None if comparison.unigram is None else _describe_loss(comparison.unigram),
        "models": [
            {"folder": str(folder), "direction": str(direction), **_describe_loss(loss)}
            for folder, direction, loss in comparison.rows
        ],
    }


def _describe_loss(loss: TextLoss) -> dict[str, Any]:
    return {
        "num_tokens": loss.num_tokens,
        "num_bytes": loss.num_bytes,
        "nll_nats": loss.nll,
        "loss_per_token": loss.per_token,
        "bits_per_byte": loss.bits_per_byte,
    }
