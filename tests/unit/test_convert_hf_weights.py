"""The strict reader of safetensors: equal to the library on good files, and what it says to every kind of bad one."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

from megatron_ledom.convert.hf_weights import HfWeights
from megatron_ledom.convert.safetensors_file import INDEX_NAME
from megatron_ledom.convert.safetensors_reader import DTYPES, MAX_HEADER_BYTES
from megatron_ledom.errors import CheckpointError

GOOD = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.arange(4, dtype=torch.bfloat16)}


def pack(header: Any, num_bytes: int = 0) -> bytes:
    """A file with that header (an object, or bytes as they are) and that many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(i % 251 for i in range(num_bytes))


def entry(start: Any, end: Any, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def folder_of(folder: Path, content: bytes) -> Path:
    (folder / "model.safetensors").write_bytes(content)
    return folder


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and flat[0].equal(flat[1])


@pytest.mark.parametrize("dtype", sorted(DTYPES.values()))
def test_what_the_library_writes_is_read_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (3, 5, 2 * kind.itemsize), dtype=torch.uint8)
    tensors = {
        "full": raw.view(kind),
        "scalar": raw[0, 0, : kind.itemsize].contiguous().view(kind)[0].clone(),
        "empty": torch.empty(0, dtype=kind),
        "hollow": torch.empty(4, 0, 2, dtype=kind),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = HfWeights.open(tmp_path)
    assert sorted(weights.names()) == sorted(tensors)
    assert weights.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert (weights.shape(name), weights.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert same_bits(weights.read(name), tensor) and same_bits(tensor, tensors[name])
    with pytest.raises(CheckpointError, match="holds no tensor other"):
        weights.read("other")


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    assert HfWeights.open(folder_of(tmp_path, save({}))).names() == []


DEEP = b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"
NEARLY_DEEP = b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"
HUGE_NUMBER = b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'
BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", r"truncated or no safetensors file: 0 bytes"),
    "seven bytes": (b"1234567", r"truncated or no safetensors file: 7 bytes"),
    "header beyond the end": (struct.pack("<Q", 99) + b"{}", r"its header alone claims 99"),
    "header of 2^64 - 1": (b"\xff" * 8 + b"{}", r"its header alone claims 18,446,744,073,709,551,615"),
    "not JSON": (pack(b"{]"), r"model\.safetensors is damaged or of another kind: this is not JSON"),
    "not UTF-8": (pack(b'{"\xff":1}'), r"this is not JSON"),
    "nested deeply": (pack(DEEP), r"this is not JSON"),
    "nested nearly as deeply": (pack(NEARLY_DEEP), r"a is damaged: expected dtype, shape and data_offsets"),
    "a number of 5000 digits": (pack(HUGE_NUMBER, 4), r"this is not JSON"),
    "a list": (pack([]), r"its header is \[\], expected an object"),
    "a space first": (pack(b" {}"), r"expected an object"),
    "metadata that is none": (pack({"__metadata__": {"a": 1}}), r"__metadata__ should hold strings"),
    "twins": (pack(b'{"a":1,"a":1}'), r"names 'a' twice"),
    "twins inside": (pack(b'{"a":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', 1), r"'dtype' twice"),
    "a name that moves the cursor": (pack({"\x1b[2J": entry(0, 4)}, 4), r"'\\x1b\[2J' is no name of a tensor"),
    "half a surrogate": (pack(b'{"\\ud800":1}'), r"is no name of a tensor"),
    "an entry that is a number": (pack({"a": 3}), r"a is damaged: expected dtype, shape and data_offsets, found 3"),
    "no dtype": (pack({"a": {"shape": [], "data_offsets": [0, 0]}}), r"a is damaged: expected dtype"),
    "more than is known": (pack({"a": entry(0, 4) | {"code": "x"}}, 4), r"a is damaged: expected dtype"),
    "unknown dtype": (pack({"a": entry(0, 4, dtype="F7")}, 4), r"a has dtype 'F7', which is not read; known ones: F64"),
    "a dtype that is a list": (pack({"a": entry(0, 4, dtype=["U8"] * 999)}, 4), r"a has dtype \['U8'.{0,80}\.\.\."),
    "negative shape": (pack({"a": entry(0, 4, [-2, -2])}, 4), r"a is damaged: shape \[-2, -2\]"),
    "a shape of truths": (pack({"a": entry(0, 1, [True])}, 1), r"a is damaged: shape \[True\]"),
    "a shape of fractions": (pack({"a": entry(0, 4, [4.0])}, 4), r"a is damaged: shape \[4\.0\]"),
    "a shape that is a number": (pack({"a": entry(0, 4, 4)}, 4), r"a is damaged: shape 4"),
    "not a number": (pack(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', 4), r"shape \[nan\]"),
    "huge shape": (pack({"a": entry(0, 4, [2**62, 4])}, 4), r"a is damaged: shape"),
    "a product that wraps": (pack({"a": entry(0, 0, [2**32, 2**32])}), r"a is refused: shape"),
    "huge, but empty": (pack({"a": entry(0, 0, [2**55, 2**55, 0])}), r"a is refused: shape"),
    "axes without end": (pack({"a": entry(0, 1, [1] * 100_000)}, 1), r"a is refused: shape"),
    "negative offsets": (pack({"a": entry(-4, 0)}, 4), r"a is damaged: shape \[4\] at bytes \[-4, 0\]"),
    "offsets backwards": (pack({"a": entry(4, 0, [4])}, 4), r"a is damaged: shape \[4\] at bytes \[4, 0\]"),
    "three offsets": (pack({"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, 4), r"at bytes \[0, 4, 4\]"),
    "offsets of truths": (pack({"a": entry(False, True, [1])}, 1), r"at bytes \[False, True\]"),
    "shape against offsets": (pack({"a": entry(0, 4, [1], "F64")}, 4), r"F64 \[1\] needs 8 bytes, its offsets give 4"),
    "overlap": (pack({"a": entry(0, 4), "b": entry(2, 6)}, 6), r"b overlaps a \(-2 bytes\)"),
    "the same bytes twice": (pack({"a": entry(0, 4), "b": entry(0, 4)}, 4), r"b overlaps a \(-4 bytes\)"),
    "gap": (pack({"a": entry(0, 4), "b": entry(5, 9)}, 9), r"b leaves a gap after a \(\+1 bytes\)"),
    "gap at the start": (pack({"a": entry(1, 5)}, 5), r"a leaves a gap after the header"),
    "beyond the end": (pack({"a": entry(0, 2**50)}, 4), r"is truncated: a ends at byte 1,125,899,"),
    "one byte short": (save(GOOD)[:-1], r"is truncated: b ends at byte"),
    "one byte more": (save(GOOD) + b"\0", r"1 bytes follow the last tensor"),
    "data without tensors": (pack({}, 8), r"8 bytes follow the last tensor"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_the_format_forbids_is_refused_by_file_and_tensor(kind: str, tmp_path: Path) -> None:
    content, words = BAD[kind]
    with pytest.raises(CheckpointError, match=words) as caught:
        HfWeights.open(folder_of(tmp_path, content))
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert len(str(caught.value)) < 800


def test_an_oversized_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    os.truncate(path, MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match=r"its header claims 100,000,001 bytes, the format's limit is 1e8"):
        HfWeights.open(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "model.safetensors")
    weights = HfWeights.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 3)
    with pytest.raises(CheckpointError, match=r"is truncated: b ends at byte"):
        weights.read("b")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a cannot be read: "):
        weights.read("a")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and their index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    for name, tensor in GOOD.items():
        save_file({name: tensor}, folder / f"model-{name}.safetensors")
    write_index(folder, {name: f"model-{name}.safetensors" for name in GOOD})
    (tmp_path / "elsewhere.safetensors").write_bytes(save({"b": GOOD["b"]}))
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def test_shards_are_read_as_one(sharded: Path) -> None:
    weights = HfWeights.open(sharded)
    assert weights.names() == ["a", "b"] and weights.nbytes == 24 + 8
    assert all(same_bits(weights.read(name), GOOD[name]) for name in GOOD)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../elsewhere.safetensors", r"names the file '\.\./elsewhere\.safetensors', outside the folder"),
        ("/etc/passwd.safetensors", r"names the file '/etc/passwd\.safetensors', outside the folder"),
        ("sub/model.safetensors", r"names the file 'sub/model\.safetensors', outside the folder"),
        ("..", r"names the file '\.\.', outside the folder"),
        ("", r"names the file '', outside the folder"),
        ("model-b.bin", r"names the file 'model-b\.bin', outside the folder"),
        ("x" * 5000 + ".safetensors", r"is refused: it names 'xxx"),
        ("none.safetensors", r"none\.safetensors is missing: the folder was not copied whole"),
        ("zero\0.safetensors", r"is missing"),
        ("\ud800.safetensors", r"is missing"),
    ],
)
def test_an_index_names_files_of_its_own_folder_only(name: str, words: str, sharded: Path) -> None:
    write_index(sharded, {"a": "model-a.safetensors", "b": name})
    with pytest.raises(CheckpointError, match=words):
        HfWeights.open(sharded)


def link_away(folder: Path) -> None:
    (folder / "model-b.safetensors").unlink()
    (folder / "model-b.safetensors").symlink_to("../elsewhere.safetensors")


def link_in_a_circle(folder: Path) -> None:
    (folder / "model-b.safetensors").unlink()
    (folder / "model-b.safetensors").symlink_to("model-b.safetensors")


def replace_by_a_folder(folder: Path) -> None:
    (folder / "model-b.safetensors").unlink()
    (folder / "model-b.safetensors").mkdir()


def replace_by_a_pipe(folder: Path) -> None:
    (folder / "model-b.safetensors").unlink()
    os.mkfifo(folder / "model-b.safetensors")


def index_is_a_pipe(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    os.mkfifo(folder / INDEX_NAME)


def index_too_large(folder: Path) -> None:
    os.truncate(folder / INDEX_NAME, MAX_HEADER_BYTES + 1)


def index_not_json(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("weights")


def index_deep(folder: Path) -> None:
    (folder / INDEX_NAME).write_bytes(b"[" * 200_000)


def index_is_a_list(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("[]")


def index_without_map(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("{}")


def index_with_twins(folder: Path) -> None:
    (folder / INDEX_NAME).write_text('{"weight_map":{"a":"model-a.safetensors","a":"model-b.safetensors"}}')


def index_of_numbers(folder: Path) -> None:
    write_index(folder, {"a": 1, "b": 2})


def index_empty(folder: Path) -> None:
    write_index(folder, {})


def index_swapped(folder: Path) -> None:
    write_index(folder, {"a": "model-b.safetensors", "b": "model-a.safetensors"})


def index_names_more(folder: Path) -> None:
    write_index(folder, {"a": "model-a.safetensors", "b": "model-b.safetensors", "c": "model-b.safetensors"})


def index_names_less(folder: Path) -> None:
    save_file(GOOD, folder / "model-a.safetensors")
    write_index(folder, {"a": "model-a.safetensors"})


def tensor_in_two_files(folder: Path) -> None:
    save_file(GOOD, folder / "model-b.safetensors")


def single_beside_index(folder: Path) -> None:
    save_file(GOOD, folder / "model.safetensors")


def index_lost(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()


def only_a_pickle(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    torch.save(GOOD, folder / "pytorch_model.bin")


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


REFUSALS: dict[Callable[[Path], None], str] = {
    link_away: r"model-b\.safetensors is refused: it leads to .*elsewhere\.safetensors, outside the folder",
    link_in_a_circle: r"model-b\.safetensors is missing",
    replace_by_a_folder: r"model-b\.safetensors is refused: it is no file",
    replace_by_a_pipe: r"model-b\.safetensors is refused: it is no file",
    index_is_a_pipe: r"index\.json is refused: no file",
    index_too_large: r"index\.json is refused: .*too large",
    index_not_json: r"index\.json is damaged or of another kind: this is not JSON",
    index_deep: r"index\.json is damaged or of another kind: this is not JSON",
    index_is_a_list: r"index\.json is damaged: it should hold a weight_map",
    index_without_map: r"index\.json is damaged: it should hold a weight_map",
    index_with_twins: r"index\.json is refused: it names 'a' twice",
    index_of_numbers: r"weight_map should give a file for every tensor",
    index_empty: r"index\.json names no tensor",
    index_swapped: r"disagrees with the files: a should be in model-b\.safetensors, is in model-a\.safetensors",
    index_names_more: r"disagrees with the files: c should be in model-b\.safetensors, is in no file",
    index_names_less: r"disagrees with the files: b should be in no file, is in model-a\.safetensors",
    tensor_in_two_files: r"a is in model-a\.safetensors and in model-b\.safetensors",
    single_beside_index: r"holds model\.safetensors and model\.safetensors\.index\.json: which of them counts",
    index_lost: r"holds model-a\.safetensors, model-b\.safetensors but neither .* the index is missing",
    only_a_pickle: r"holds pytorch_model\.bin: pickled weights are not read, because reading them runs what",
    nothing: r"holds no weights: neither",
}


@pytest.mark.parametrize("damage", REFUSALS, ids=lambda damage: damage.__name__)
def test_a_folder_that_contradicts_itself_is_refused(damage: Callable[[Path], None], sharded: Path) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=REFUSALS[damage]):
        HfWeights.open(sharded)


def test_a_folder_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        HfWeights.open(tmp_path / "none")


def test_a_download_cache_keeps_its_files_beside_the_folder(tmp_path: Path) -> None:
    """There, and only there, a link may leave the folder: to the same model's files."""
    cache = tmp_path / "models--someone--model"
    folder = cache / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (cache / "blobs").mkdir()
    save_file(GOOD, cache / "blobs" / "4567")
    (folder / "model.safetensors").symlink_to("../../blobs/4567")
    assert HfWeights.open(folder).read("a").equal(GOOD["a"])
    (folder / "model.safetensors").unlink()
    save_file(GOOD, tmp_path / "secret.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="outside the folder"):
        HfWeights.open(folder)


WHOLE = save(GOOD, metadata={"format": "pt"})
NUM_HEAD_BYTES = 8 + struct.unpack("<Q", WHOLE[:8])[0]
DAMAGES = st.lists(
    st.tuples(st.integers(0, NUM_HEAD_BYTES - 1), st.integers(0, 255) | st.sampled_from(list(b'0123456789[]{},:"'))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(damages=DAMAGES)
def test_a_damaged_header_gives_a_refusal_or_what_the_library_reads(
    damages: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(WHOLE)
    for place, value in damages:
        content[place] = value
    folder = folder_of(tmp_path_factory.getbasetemp(), bytes(content))
    try:
        weights = HfWeights.open(folder)
        found = {name: weights.read(name) for name in weights.names()}
    except CheckpointError:
        return
    expected = load(bytes(content))
    assert set(found) == set(expected) and all(same_bits(found[name], expected[name]) for name in found)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(length=st.integers(0, len(WHOLE) - 1))
def test_a_file_cut_anywhere_is_refused(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(CheckpointError):
        HfWeights.open(folder_of(tmp_path_factory.getbasetemp(), WHOLE[:length]))
    with pytest.raises(SafetensorError):
        load(WHOLE[:length])
