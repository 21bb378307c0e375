"""Documents read in the other direction: the ids of the other file, part by part, and what cannot be turned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ledom.data import dataset as guard
from megatron_ledom.data.dataset import CheckedDataset, check_datasets
from megatron_ledom.data.manifest import load_manifest, manifest_path, save_manifest
from megatron_ledom.data.megatron_dataset import TurnedDataset
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DirectionError, InputError

EOD = 0


def write_megatron(prefix: Path, documents: list[list[int]], *, sentences: bool = False) -> Path:
    """Write documents as Megatron's own tool does, without a manifest."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [1, len(ids) - 1] if sentences else [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def messages(log_of: Callable[[str], pytest.LogCaptureFixture]) -> pytest.LogCaptureFixture:
    return log_of(guard.__name__)


def check(prefix: Path, direction: Direction = Direction.REVERSE, vocab_size: int = 100) -> CheckedDataset:
    (found,) = check_datasets(
        [prefix], direction=direction, tokenizer_fingerprint=None, eod_id=EOD, vocab_size=vocab_size
    )
    return found


def test_a_turned_file_holds_what_the_file_of_the_other_direction_holds(prefixes: dict[str, Path]) -> None:
    stored = {name: IndexedDataset(str(prefix)) for name, prefix in prefixes.items()}
    for name, other in (("forward", "reverse"), ("reverse", "forward")):
        turned = TurnedDataset(stored[name], is_closed=True)
        assert len(turned) == len(stored[other]) and turned.path_prefix == str(prefixes[name])
        assert np.array_equal(turned.sequence_lengths, stored[other].sequence_lengths)
        for index in range(len(turned)):
            assert np.array_equal(turned[index], stored[other][index])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), is_closed=st.booleans())
def test_a_part_is_the_part_of_the_whole_and_nothing_else_is_read(data: st.DataObject, is_closed: bool) -> None:
    ids = data.draw(st.lists(st.integers(1, 99), min_size=0, max_size=20))
    document = np.array([*ids, EOD] if is_closed else ids, dtype=np.uint16)
    reads: list[int] = []

    class Stored:
        sequence_lengths = np.array([len(document)], dtype=np.int32)

        def get(self, idx: int, offset: int, length: int) -> np.ndarray:
            reads.append(length)
            assert offset >= 0 and offset + length <= len(document)
            return document[offset : offset + length]

    turned = TurnedDataset(Stored(), is_closed=is_closed)
    whole = [*sorted(range(len(ids)), key=lambda i: -i)]
    expected = [ids[i] for i in whole] + [EOD] * is_closed
    assert turned[0].tolist() == expected
    offset = data.draw(st.integers(0, len(document)))
    length = data.draw(st.integers(0, len(document) - offset))
    reads.clear()
    assert turned.get(0, offset, length).tolist() == expected[offset : offset + length]
    assert sum(reads) == length
    assert turned.get(0, offset).tolist() == expected[offset:]


def test_a_dataset_of_the_other_direction_is_read_backwards_and_that_is_said(
    prefixes: dict[str, Path], messages: pytest.LogCaptureFixture
) -> None:
    for stored, wanted in (("forward", Direction.REVERSE), ("reverse", Direction.FORWARD)):
        found = check(prefixes[stored], wanted)
        assert (found.is_turned, found.is_closed, str(found.direction), found.read_as) == (True, True, stored, wanted)
    lines = [record.getMessage() for record in messages.records]
    assert lines == [f"{prefixes[n]}: {n} documents, read backwards" for n in ("forward", "reverse")]
    assert not check(prefixes["reverse"], Direction.REVERSE).is_turned
    assert len(messages.records) == 2


def test_reversed_sentences_cannot_be_turned(prefixes: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = dataclasses.replace(load_manifest(prefixes["reverse"]), reverse_unit="sentence")
    monkeypatch.setattr(guard, "load_manifest", lambda _: sentences)
    with pytest.raises(DirectionError, match=r"forward model, but .* is reverse with reverse_unit 'sentence'"):
        check(prefixes["reverse"], Direction.FORWARD)
    assert not check(prefixes["reverse"], Direction.REVERSE).is_turned


def test_files_without_a_manifest_are_forward_and_looked_at(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    closed = write_megatron(tmp_path / "closed", [[5, 6, EOD], [7, EOD], [8, 9, 10, EOD]])
    found = check(closed)
    assert (found.direction, found.is_closed, found.is_turned, found.manifest) == (Direction.FORWARD, True, True, None)
    assert (found.num_documents, found.num_tokens, found.bin_bytes) == (3, 9, 18)
    assert "has no manifest: assumed to be forward" in messages.text
    assert "documents end with the end-of-document id 0" in messages.text
    assert TurnedDataset(IndexedDataset(str(closed)), is_closed=True)[2].tolist() == [10, 9, 8, EOD]

    opened = write_megatron(tmp_path / "open", [[5, 6], [7], [8, 9, 10]])
    found = check(opened, Direction.FORWARD)
    assert (found.is_closed, found.is_turned) == (False, False)
    assert "cannot learn where one ends" in messages.text
    with pytest.raises(InputError, match=r"manifest.json does not exist"):
        check_datasets([closed], direction=Direction.REVERSE, tokenizer_fingerprint=None)


def test_files_without_a_manifest_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    other = write_megatron(tmp_path / "other", [[5, 600, EOD], [7, EOD]])
    with pytest.raises(InputError, match=r"holds ids from 0 to 600 \(a sample\), the run's tokenizer has 100"):
        check(other)
    mixed = write_megatron(tmp_path / "mixed", [[5, EOD], [7, 8], [9, EOD]])
    with pytest.raises(InputError, match=r"2 of 3 sampled documents end with the end-of-document id 0"):
        check(mixed)
    split = write_megatron(tmp_path / "split", [[5, 6, EOD], [7, 8, EOD]], sentences=True)
    with pytest.raises(InputError, match=r"4 sequences in 2 documents .*--split-sentences"):
        check(split)
    (tmp_path / "other.bin").write_bytes((tmp_path / "other.bin").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"other.bin has 9 bytes, its index says 5 ids of uint16"):
        check(other)


def test_a_manifest_is_believed_over_the_look_of_the_ids(prefixes: dict[str, Path], tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"copy{suffix}").write_bytes(Path(f"{prefixes['reverse']}{suffix}").read_bytes())
    save_manifest(load_manifest(prefixes["reverse"]), tmp_path / "copy")
    assert check(tmp_path / "copy", vocab_size=2).direction is Direction.REVERSE
    manifest_path(tmp_path / "copy").unlink()
    assert check(tmp_path / "copy", vocab_size=1024).direction is Direction.FORWARD
