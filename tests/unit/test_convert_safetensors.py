"""The streaming writer: files that the safetensors library reads, and shards that are full but not fuller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from megatron_ledom.convert.safetensors_file import ShardWriter, header_bytes, parse_size, plan_shards
from megatron_ledom.errors import UsageError

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "d": (1,), "e": (2, 1)}


def write(folder: Path, tensors: dict[str, torch.Tensor], dtype: str, max_shard_bytes: int) -> list[str]:
    plan = plan_shards({k: tuple(t.shape) for k, t in tensors.items()}, dtype=dtype, max_shard_bytes=max_shard_bytes)
    with ShardWriter(folder, plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return [shard.file_name for shard in plan.shards]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_library_reads_what_was_written(tmp_path: Path, dtype: str) -> None:
    tensors = {name: torch.randn(shape).to(getattr(torch, dtype)) for name, shape in SHAPES.items()}
    files = write(tmp_path, tensors, dtype, 40)
    assert len(files) > 1
    found: dict[str, torch.Tensor] = {}
    for name in files:
        found |= load_file(tmp_path / name)
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert set(found) == set(SHAPES)
    assert all(torch.equal(found[name], tensors[name]) for name in SHAPES)


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {"one": torch.randn(3, 4)}
    write(tmp_path, tensors, "float32", 10**6)
    assert (tmp_path / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_a_tensor_that_is_a_view_is_written_in_row_major_order(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    write(tmp_path, {"t": table.t(), "rows": table[1:]}, "float32", 10**6)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["t"], table.t()) and torch.equal(found["rows"], table[1:])


def test_shards_are_filled_in_order() -> None:
    plan = plan_shards(SHAPES, dtype="float32", max_shard_bytes=90)
    assert [list(shard.shapes) for shard in plan.shards] == [["a", "b"], ["c", "d", "e"]]
    assert [shard.file_name for shard in plan.shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = plan.index()
    assert index is not None
    assert index["metadata"]["total_size"] == plan.tensor_bytes == 4 * (15 + 7 + 8 + 1 + 2)
    assert index["weight_map"]["d"] == plan.shards[1].file_name


def test_a_tensor_larger_than_a_shard_has_one_for_itself() -> None:
    plan = plan_shards(SHAPES, dtype="float32", max_shard_bytes=1)
    assert [list(shard.shapes) for shard in plan.shards] == [["a"], ["b"], ["c"], ["d"], ["e"]]


def test_one_file_has_no_index() -> None:
    plan = plan_shards(SHAPES, dtype="float16", max_shard_bytes=10**6)
    assert [shard.file_name for shard in plan.shards] == ["model.safetensors"] and plan.index() is None


def test_headers_keep_the_data_aligned() -> None:
    for shapes in ({"a": (1,)}, {"ab": (1,)}, {"abc" * 9: (1,)}):
        head = header_bytes(plan_shards(shapes, dtype="float32", max_shard_bytes=9).shards[0], "float32")
        assert len(head) % 8 == 0 and json.loads(head[8:])


def test_the_writer_insists_on_its_plan(tmp_path: Path) -> None:
    plan = plan_shards({"a": (2,), "b": (2,)}, dtype="float32", max_shard_bytes=100)
    for name, tensor in (("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2, dtype=torch.float16))):
        with pytest.raises(AssertionError), ShardWriter(tmp_path, plan) as writer:
            writer.write(name, tensor)
    with pytest.raises(AssertionError, match="b was not given"), ShardWriter(tmp_path, plan) as writer:
        writer.write("a", torch.ones(2))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 MB", 1_500_000), ("300kb", 300_000), ("77", 77)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 TB", "-1", "0", "five"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--max-shard-size"):
        parse_size(text)
