"""Two sets of tensors compared: names, shapes, dtypes, and how far apart the values are, down to the bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from megatron_ledom.checkpoint import diff
from megatron_ledom.checkpoint.diff import TensorsDiff, diff_tensors, diff_values
from megatron_ledom.errors import CheckpointError

Box = tuple[tuple[int, ...], tuple[int, ...]]


class Memory:
    """Tensors in memory; `cuts` gives the rows at which each is cut into boxes."""

    def __init__(self, tensors: dict[str, torch.Tensor], cuts: dict[str, Sequence[int]] | None = None) -> None:
        self.tensors, self.cuts = tensors, cuts or {}
        self.boxes_read: list[tuple[str, Box]] = []

    def tensor_names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def boxes(self, name: str) -> list[Box]:
        shape = self.shape(name)
        if name not in self.cuts:
            return [((0,) * len(shape), shape)]
        rows = [0, *self.cuts[name], shape[0]]
        rest = shape[1:]
        return [((a, *(0 for _ in rest)), (b - a, *rest)) for a, b in itertools.pairwise(rows)]

    def read_box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        self.boxes_read.append((name, (tuple(offsets), tuple(sizes))))
        return self.tensors[name][tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


def table(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(1.0, 25.0).reshape(6, 4).to(dtype)


def compare(one: torch.Tensor, other: torch.Tensor) -> tuple[TensorsDiff, float, float, bool]:
    """The diff of two tensors of one name; and largest difference, relative difference, equality."""
    found = diff_tensors(Memory({"w": one}), Memory({"w": other}))
    value = found.values["w"]
    return found, value["max_abs_difference"], value["relative_frobenius"], value["bitwise_equal"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_equal_tensors_are_equal_to_the_bit(dtype: torch.dtype) -> None:
    found, largest, relative, is_equal = compare(table(dtype), table(dtype))
    assert (largest, relative, is_equal, found.is_equal) == (0.0, 0.0, True, True)


def test_one_changed_value_is_measured() -> None:
    other = table()
    other[5, 3] += 3.0
    found, largest, relative, is_equal = compare(table(), other)
    assert largest == 3.0 and not is_equal and not found.is_equal
    assert relative == pytest.approx(3.0 / table().norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_full(dtype: torch.dtype) -> None:
    """In bfloat16 itself, 256 - 1 would be 256."""
    one, other = torch.full((2, 2), 256.0, dtype=dtype), torch.full((2, 2), 1.0, dtype=dtype)
    assert compare(one, other)[1:3] == (255.0, pytest.approx(255 / 256))


def test_the_last_bit_counts_and_so_does_the_sign_of_zero() -> None:
    one = torch.tensor([0.0, 1.0])
    for other in (torch.tensor([-0.0, 1.0]), torch.tensor([0.0, 1.0 + 2**-23])):
        found, largest, _, is_equal = compare(one, other)
        assert not is_equal and not found.is_equal and largest <= 2**-23


def test_nan_equals_the_same_nan_and_no_other() -> None:
    one = torch.tensor([1.0, math.nan, math.inf])
    found, largest, relative, is_equal = compare(one, one.clone())
    assert is_equal and found.is_equal and (largest, relative) == (0.0, 0.0)
    other = one.clone()
    other.view(torch.int32)[1] ^= 1  # another NaN
    found, largest, relative, is_equal = compare(one, other)
    assert not is_equal and not found.is_equal and math.isnan(largest) and math.isnan(relative)


def test_nan_once_met_is_not_forgotten() -> None:
    """The box with the NaN is followed by one with an ordinary difference."""
    other = table()
    other[0, 0], other[5, 0] = math.nan, 0.0
    found = diff_tensors(Memory({"w": table()}, {"w": [3]}), Memory({"w": other}))
    assert math.isnan(found.values["w"]["max_abs_difference"]) and not found.is_equal


def test_against_zeros_the_relative_difference_is_infinite() -> None:
    assert compare(torch.zeros(3), torch.ones(3))[1:] == (1.0, math.inf, False)
    assert compare(torch.zeros(3), torch.zeros(3))[1:] == (0.0, 0.0, True)


def test_values_whose_square_no_float_holds_are_compared() -> None:
    one = torch.full((2,), 1e200, dtype=torch.float64)
    _, largest, _, is_equal = compare(one, 2 * one)
    assert largest == 1e200 and not is_equal


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_scalars_and_empty_tensors_are_compared(shape: tuple[int, ...]) -> None:
    assert compare(torch.zeros(shape), torch.zeros(shape))[1:] == (0.0, 0.0, True)
    assert compare(torch.zeros(()), torch.ones(()))[1:] == (1.0, math.inf, False)


def test_names_of_one_side_alone_are_listed_in_order() -> None:
    same = {"both": table()}
    first = Memory({"z": table(), **same, "a": table()})
    found = diff_tensors(first, Memory({**same, "b": table()}))
    assert (found.only_first, found.only_second, list(found.values)) == (["a", "z"], ["b"], ["both"])
    assert found.values["both"]["bitwise_equal"] and not found.is_equal
    assert not diff_tensors(Memory(same), first).is_equal and not diff_tensors(first, Memory(same)).is_equal
    assert {name for name, _ in first.boxes_read} == {"both"}  # nothing is read that cannot be compared


def test_another_shape_is_named_and_not_read() -> None:
    first, second = Memory({"w": table(), "v": table()}), Memory({"w": table().reshape(4, 6), "v": table()})
    found = diff_tensors(first, second)
    assert found.shapes == {"w": [[6, 4], [4, 6]]} and list(found.values) == ["v"] and not found.is_equal
    assert {name for name, _ in [*first.boxes_read, *second.boxes_read]} == {"v"}


def test_another_dtype_is_named_and_its_values_are_compared() -> None:
    found, largest, relative, is_equal = compare(table(), table(torch.bfloat16))
    assert found.dtypes == {"w": ["float32", "bfloat16"]} and not is_equal and not found.is_equal
    assert (largest, relative) == (0.0, 0.0)  # these numbers are exact in bfloat16
    assert compare(torch.full((1,), 1 + 2**-10), torch.ones(1, dtype=torch.bfloat16))[1] == 2**-10


@pytest.mark.parametrize("cuts", [[3], [1, 2, 5], []])
def test_the_boxes_of_the_first_are_compared_whatever_the_second_is_cut_into(cuts: list[int]) -> None:
    other = table()
    other[4, 1] += 0.5
    first, second = Memory({"w": table()}, {"w": cuts}), Memory({"w": other}, {"w": [2, 4]})
    value = diff_tensors(first, second).values["w"]
    assert (value["max_abs_difference"], value["bitwise_equal"]) == (0.5, False)
    assert value["relative_frobenius"] == pytest.approx(0.5 / table().norm().item(), rel=1e-6)
    assert first.boxes_read == second.boxes_read and len(first.boxes_read) == len(cuts) + 1
    assert diff_tensors(first, Memory({"w": table()}, {"w": [5]})).is_equal


def test_a_source_that_is_a_view_is_not_written_to() -> None:
    one, other = table(), table() + 1
    compare(one.T, other.T)
    assert one.equal(table()) and other.equal(table() + 1)


def test_a_tensor_that_cannot_be_read_stops_the_comparison() -> None:
    class Damaged(Memory):
        def read_box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
            raise CheckpointError(f"{name} is damaged")

    with pytest.raises(CheckpointError, match="w is damaged"):
        diff_tensors(Memory({"w": table()}), Damaged({"w": table()}))


def test_work_grows_with_the_number_of_names_and_not_with_its_square() -> None:
    class Counted(str):
        num_hashed = 0

        def __hash__(self) -> int:
            Counted.num_hashed += 1
            return super().__hash__()

    tensors = {Counted(f"layer.{i}"): torch.zeros(0) for i in range(300)}
    assert diff_tensors(Memory(dict(tensors)), Memory(dict(tensors))).is_equal
    assert Counted.num_hashed < 300 * 50


def test_large_sources_show_their_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = Memory({"w": table()})
    diff_tensors(source, source)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(diff, "_QUIET_BYTES", 1)
    diff_tensors(source, source)
    assert capsys.readouterr().err.startswith("compare: 0 MB in ")


def test_values_that_differ_are_given_with_both_sides() -> None:
    first = {"same": 1, "lr": 1e-3, "gone": "x", "sizes": [1, 2]}
    second = {"same": 1, "lr": 1e-4, "new": True, "sizes": [1, 3]}
    assert diff_values(first, second) == {
        "gone": ["x", None],
        "lr": [1e-3, 1e-4],
        "new": [None, True],
        "sizes": [[1, 2], [1, 3]],
    }
    assert list(diff_values(first, second)) == ["gone", "lr", "new", "sizes"]
    assert diff_values(first, dict(reversed(first.items()))) == {}
    assert diff_values({"a": None}, {}) == {}  # a key that is not there counts as None
