"""Properties of direction.py that every other part relies on."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ledom import direction as direction_module
from megatron_ledom.direction import (
    Direction,
    check_same_direction,
    condition,
    describe_direction,
    flip,
    flip_groups,
    natural_document,
    stored_batch,
    stored_document,
    to_model_order,
    to_natural_order,
)
from megatron_ledom.errors import DirectionError

ids_lists = st.lists(st.integers(1, 60_000), max_size=40)
directions = st.sampled_from(list(Direction))


@given(ids_lists)
def test_flip_is_its_own_inverse_and_the_same_for_every_kind_of_sequence(ids: list[int]) -> None:
    assert flip(flip(ids)) == ids
    assert flip(ids) == list(reversed(ids))
    assert flip(tuple(ids)) == tuple(reversed(ids))
    assert flip(np.array(ids)).tolist() == flip(ids)
    assert flip(torch.tensor(ids)).tolist() == flip(ids)


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4))
def test_flip_turns_the_last_axis_only(rows: list[list[int]]) -> None:
    expected = [list(reversed(row)) for row in rows]
    assert flip(np.array(rows)).tolist() == expected
    assert flip(torch.tensor(rows)).tolist() == expected


@given(ids_lists, directions)
def test_model_order_and_natural_order_undo_each_other(ids: list[int], direction: Direction) -> None:
    assert to_natural_order(to_model_order(ids, direction), direction) == ids
    assert to_model_order(ids, Direction.FORWARD) == ids


@given(ids_lists, directions, st.sampled_from([None, 0]), st.sampled_from([np.uint16, np.int32]))
def test_a_stored_document_comes_back(
    ids: list[int], direction: Direction, eod_id: int | None, dtype: type[np.integer]
) -> None:
    natural = np.array(ids, dtype=dtype)
    stored = stored_document(natural, direction, eod_id)
    assert stored.dtype == dtype
    assert len(stored) == len(ids) + (eod_id is not None)
    if eod_id is not None:
        assert stored[-1] == eod_id  # last in both directions
    assert natural_document(stored, direction, eod_id).tolist() == ids


@given(ids_lists)
def test_a_reverse_document_is_the_flipped_forward_document_with_the_end_in_place(ids: list[int]) -> None:
    natural = np.array(ids, dtype=np.int32)
    forward = stored_document(natural, Direction.FORWARD, 0)
    reverse = stored_document(natural, Direction.REVERSE, 0)
    assert reverse[:-1].tolist() == flip(forward[:-1]).tolist()


@pytest.mark.parametrize(("ids", "found"), [([7, 6, 5], "5"), ([], "nothing")])
def test_a_document_that_is_not_closed_is_refused(ids: list[int], found: str) -> None:
    with pytest.raises(DirectionError, match=f"end-of-document id 0, found {found}"):
        natural_document(np.array(ids, dtype=np.int32), Direction.REVERSE, eod_id=0)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=9), st.lists(st.integers(1, 99), max_size=9), directions)
def test_condition_reads_the_given_text_first_and_scores_all_of_the_target(
    target: list[int], given_ids: list[int], direction: Direction
) -> None:
    laid_out = condition(target, given_ids, direction, boundary_id=0)
    assert laid_out.ids[0] == 0
    assert laid_out.ids[1 : laid_out.target_start] == to_model_order(given_ids, direction)
    assert to_natural_order(laid_out.ids[laid_out.target_start :], direction) == target
    closed = condition(target, given_ids, direction, boundary_id=0, closed=True)
    assert closed.ids == [*laid_out.ids, 0]
    assert closed.target_start == laid_out.target_start


def test_condition_with_nothing_to_score_is_refused() -> None:
    with pytest.raises(DirectionError, match="no token"):
        condition([], [1, 2], Direction.REVERSE, boundary_id=0)
    assert condition([], [1, 2], Direction.REVERSE, boundary_id=0, closed=True).ids == [0, 2, 1, 0]


def test_directions_are_parsed_compared_and_described() -> None:
    assert Direction.parse("reverse", where="x") is Direction.REVERSE
    with pytest.raises(DirectionError, match=r"a.json says direction 'sideways'"):
        Direction.parse("sideways", where="a.json")
    check_same_direction(Direction.REVERSE, Direction.REVERSE, expected_by="this run", found_in="the data")
    with pytest.raises(DirectionError, match="this run is a reverse model, but the data is forward"):
        check_same_direction(Direction.REVERSE, Direction.FORWARD, expected_by="this run", found_in="the data")
    assert describe_direction(Direction.REVERSE)["direction"] == "reverse"
    assert "ordinary" in describe_direction(Direction.FORWARD)["usage"]


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(direction_module, extraglobs={"np": np})
    assert result.attempted >= 4
    assert result.failed == 0


@given(st.lists(ids_lists, max_size=8), directions, st.sampled_from([None, 0]))
def test_a_batch_is_its_documents_one_after_the_other(
    documents: list[list[int]], direction: Direction, eod_id: int | None
) -> None:
    arrays = [np.array(ids, dtype=np.uint32) for ids in documents]
    expected = [i for ids in arrays for i in stored_document(ids, direction, eod_id).tolist()]
    assert stored_batch(arrays, direction, eod_id).tolist() == expected


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), max_size=6))
def test_groups_are_turned_and_what_is_in_them_is_not(groups: list[list[int]]) -> None:
    ids, sizes = (
        np.array([i for g in groups for i in g], dtype=np.int32),
        np.array([len(g) for g in groups], dtype=np.int32),
    )
    turned = flip_groups(ids, sizes)
    assert turned.tolist() == [i for g in reversed(groups) for i in g]
    assert flip_groups(turned, flip(sizes)).tolist() == ids.tolist()
