"""Packing and unpacking: each function against its inverse, and against a layout written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ledom.convert import tensors
from megatron_ledom.errors import CheckpointError


@st.composite
def qkv_cases(draw: st.DrawFn) -> tuple[torch.Tensor, dict[str, int]]:
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    head_dim, columns = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    shape = {"num_heads": groups * per_group, "num_query_groups": groups, "head_dim": head_dim}
    rows = groups * (per_group + 2) * head_dim
    return torch.arange(rows * columns).reshape(rows, columns), shape


@settings(max_examples=60, deadline=None)
@given(qkv_cases())
def test_qkv_round_trip(case: tuple[torch.Tensor, dict[str, int]]) -> None:
    packed, shape = case
    query, key, value = tensors.split_qkv(packed, **shape)
    assert query.shape[0] == shape["num_heads"] * shape["head_dim"]
    assert key.shape == value.shape == (shape["num_query_groups"] * shape["head_dim"], packed.shape[1])
    assert torch.equal(tensors.merge_qkv(query, key, value, **shape), packed)


def test_qkv_layout_is_the_drawn_one() -> None:
    rows = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    packed = torch.arange(len(rows) * 3).reshape(-1, 1)  # head size 3
    parts = tensors.split_qkv(packed, num_heads=4, num_query_groups=2, head_dim=3)
    names = [[rows[int(i)] for i in part[::3, 0] // 3] for part in parts]
    assert names == [["q0", "q1", "q2", "q3"], ["k0", "k1"], ["v0", "v1"]]


def test_a_packed_vector_is_taken_apart_too() -> None:
    query, key, value = tensors.split_qkv(torch.arange(12), num_heads=2, num_query_groups=2, head_dim=2)
    assert query.tolist() == [0, 1, 6, 7]
    assert key.tolist() == [2, 3, 8, 9]
    assert value.tolist() == [4, 5, 10, 11]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5))
def test_gate_up_round_trip(rows: int, columns: int) -> None:
    packed = torch.arange(2 * rows * columns).reshape(2 * rows, columns)
    gate, up = tensors.split_gate_up(packed)
    assert gate[0, 0] == 0 and up[0, 0] == rows * columns
    assert torch.equal(tensors.merge_gate_up(gate, up), packed)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9))
def test_vocabulary_padding_round_trip(vocab_size: int, padding: int) -> None:
    table = torch.randn(vocab_size, 3)
    padded = tensors.add_vocabulary_padding(table, vocab_size + padding)
    assert padded.shape[0] == vocab_size + padding and not padded[vocab_size:].any()
    assert torch.equal(tensors.remove_vocabulary_padding(padded, vocab_size), table)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tensors.split_qkv(torch.ones(15, 2), num_heads=4, num_query_groups=2, head_dim=2), "16 rows"),
        (lambda: tensors.split_qkv(torch.ones(16, 2), num_heads=4, num_query_groups=3, head_dim=2), "3 groups"),
        (lambda: tensors.split_gate_up(torch.ones(5, 2)), "even"),
        (lambda: tensors.merge_gate_up(torch.ones(5, 2), torch.ones(4, 2)), "alike"),
        (lambda: tensors.remove_vocabulary_padding(torch.ones(5, 2), 6), "5 rows"),
        (lambda: tensors.add_vocabulary_padding(torch.ones(5, 2), 4), "5 rows"),
        (
            lambda: tensors.merge_qkv(
                torch.ones(8, 2), torch.ones(4, 2), torch.ones(2, 2), num_heads=4, num_query_groups=2, head_dim=2
            ),
            "value",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        call()  # type: ignore[operator]
