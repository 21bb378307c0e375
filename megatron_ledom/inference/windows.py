"""Sequences longer than a model's context, cut into overlapping windows in which every wanted id is scored once.

    E a b c d e f g E         context 4, stride 2, all ids wanted
    E a b c                   reads 4 ids, scores a b c d
        b c d e               scores e f
            d e f g           scores g E

An id is scored in the first window that reaches it, so one of a later window is conditioned on at least
context - stride + 1 ids before it. A later window has no boundary in front: training cuts documents into
sequences the same way. Windows count in the model's order, from a document's end in a reverse model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_ledom.direction import ConditionedIds


def cut_windows(
    ids: Sequence[int], context_tokens: int, stride_tokens: int, *, target_start: int = 1
) -> Iterator[ConditionedIds]:
    """Cut a sequence into windows so that every id from `target_start` on is scored exactly once.

    Args:
        ids: in the model's order, the boundary first; [n], n >= 2.
        context_tokens: most ids that the model reads in a window.
        stride_tokens: how far each window lies behind the one before; 1 to context_tokens.
        target_start: the first id to score, 1 or more; windows before it are left out.

    >>> [(w.ids, w.target_start) for w in cut_windows([0, 1, 2, 3, 4, 5, 6], 4, 2)]
    [([0, 1, 2, 3, 4], 1), ([2, 3, 4, 5, 6], 3)]
    >>> [(w.ids, w.target_start) for w in cut_windows([0, 1, 2, 3, 4, 5, 6], 4, 2, target_start=6)]
    [([2, 3, 4, 5, 6], 4)]
    """
    begin, end, scored_until = 0, min(len(ids), context_tokens + 1), target_start
    while True:
        if end > scored_until:
            yield ConditionedIds(list(ids[begin:end]), target_start=scored_until - begin)
            scored_until = end
        if end == len(ids):
            return
        begin += stride_tokens
        end = min(len(ids), begin + context_tokens + 1)
