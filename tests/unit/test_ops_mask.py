"""The mask's definition: monotone intervals, documents, windows, padding, and the float64 reference that uses it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.ops.mask import (
    AttentionMask,
    dense_mask,
    documents_from_ends,
    documents_from_lengths,
    intervals,
    model_order_mask,
    natural_order_mask,
)
from megatron_ledom.ops.reference import positions, reference_attention, reference_rope

REVERSE = Direction.REVERSE


def drawn(mask: AttentionMask, seq: int, batch: int = 1) -> list[str]:
    return ["".join("x" if a else "." for a in row) for row in dense_mask(mask, batch, seq)[0].tolist()]


def test_the_drawings_of_the_docstring() -> None:
    two = documents_from_lengths(torch.tensor([0, 3, 5]), 1, 5)
    assert drawn(model_order_mask(), 5) == ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]
    assert drawn(natural_order_mask(REVERSE), 5) == ["xxxxx", ".xxxx", "..xxx", "...xx", "....x"]
    assert drawn(natural_order_mask(REVERSE, window=2), 5) == ["xx...", ".xx..", "..xx.", "...xx", "....x"]
    assert drawn(natural_order_mask(REVERSE, documents=two), 5) == ["xxx..", ".xx..", "..x..", "...xx", "....x"]
    assert natural_order_mask(Direction.FORWARD, 3, two) == model_order_mask(3, two)


def test_tokens_of_no_document_attend_nothing_and_rows_end_documents() -> None:
    documents = documents_from_lengths(torch.tensor([2, 4, 7, 9]), batch=2, seq=6)  # 2-3, 4-6 (cut at 6), 7-8
    assert documents.first.tolist() == [[2, 2, 2, 2, 4, 4], [0, 1, 1, 6, 6, 6]]
    assert documents.last.tolist() == [[1, 1, 3, 3, 5, 5], [0, 2, 2, 5, 5, 5]]
    assert drawn(natural_order_mask(REVERSE, documents=documents), 6, batch=2)[:2] == ["......"] * 2
    ends = torch.tensor([[0, 0, 1, 0, 0]], dtype=torch.bool)
    assert documents_from_ends(ends).last.tolist() == [[2, 2, 2, 4, 4]]


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 5, 3], [-1, 4], [0, 13]])
def test_impossible_documents_are_refused(cu_seqlens: list[int]) -> None:
    with pytest.raises(UsageError, match="cu_seqlens"):
        documents_from_lengths(torch.tensor(cu_seqlens), 2, 6)


def test_impossible_reaches_are_refused() -> None:
    with pytest.raises(UsageError, match="left is -1"):
        AttentionMask(-1, 0)
    with pytest.raises(UsageError, match="window 0"):
        natural_order_mask(REVERSE, window=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.sets(st.integers(0, 20)), *[st.none() | st.integers(0, 22)] * 2)
def test_intervals_never_step_back_and_transpose(seq: int, cuts: set[int], left: int | None, right: int | None) -> None:
    bounds = sorted(c for c in cuts if c <= seq)
    documents = documents_from_lengths(torch.tensor(bounds), 1, seq) if len(bounds) > 1 else None
    mask = AttentionMask(left, right, documents)
    rows = intervals(mask, 1, seq)
    assert bool((rows.first.diff() >= 0).all()) and bool((rows.last.diff() >= 0).all())
    assert torch.equal(dense_mask(mask, 1, seq), dense_mask(AttentionMask(right, left, documents), 1, seq).mT)


def test_the_reference_is_torchs_attention_and_empty_rows_are_defined() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, h, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    documents = documents_from_lengths(torch.tensor([1, 5, 7, 11]), 2, 7)
    mask = natural_order_mask(REVERSE, documents=documents)
    o, lse = reference_attention(q, k, v, mask)
    is_empty = ~dense_mask(mask, 2, 7).any(-1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=dense_mask(mask, 2, 7)[:, None], enable_gqa=True
    ).transpose(1, 2)
    assert is_empty.tolist()[0] == [True] + [False] * 6
    torch.testing.assert_close(o[~is_empty], expected[~is_empty])
    assert bool((o[is_empty] == 0).all()) and bool((lse.transpose(1, 2)[is_empty] == -math.inf).all())
    o.sum().backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in (q, k, v))
    assert bool((q.grad[is_empty] == 0).all())


def test_positions_from_the_end_and_turning_back() -> None:
    documents = documents_from_lengths(torch.tensor([0, 3, 5]), 1, 6)
    assert positions(documents, 1, 6, from_end=True).tolist() == [[2, 1, 0, 1, 0, 0]]
    assert positions(documents, 1, 6, from_end=False).tolist() == [[0, 1, 2, 0, 1, 0]]
    assert positions(None, 1, 3, from_end=True).tolist() == [[2, 1, 0]]
    x = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    frequencies = 10000.0 ** -(torch.arange(3) / 3)
    for interleaved in (False, True):
        at = positions(documents, 1, 6, from_end=True)
        turned = reference_rope(x, at, frequencies, interleaved=interleaved)
        assert not torch.allclose(turned[..., :6], x[..., :6]) and torch.equal(turned[..., 6:], x[..., 6:])
        back = reference_rope(turned, at, frequencies, interleaved=interleaved, inverse=True)
        torch.testing.assert_close(back, x)
