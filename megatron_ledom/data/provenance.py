"""From a sample back to its documents: which file, which row, which tokens.

It walks the three indices of a Megatron dataset the way the dataset itself does, whatever the order that they
hold, and reads the manifest for the sources. It knows no run and no step; `train/replay.py` does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ledom.data import order
from megatron_ledom.data.dataset import CheckedDataset
from megatron_ledom.data.manifest import manifest_path
from megatron_ledom.direction import Direction


@dataclass(frozen=True)
class DocumentPart:
    """The part of a document that stands in a sample.

    Attributes:
        document: its number in the dataset, from 0.
        num_tokens: ids in the whole document, with its end-of-document id.
        model_range: [first, last + 1) of the part, counted as the model reads the document.
        natural_range: the same tokens counted in reading order, without an end-of-document id.
        has_eod: whether the part holds the end-of-document id.
        source: the file that the text came from; None where no manifest says.
        row: the record in that file, from 1; None where it is not recorded.
        ids: as the model reads them.
    """

    document: int
    num_tokens: int
    model_range: tuple[int, int]
    natural_range: tuple[int, int]
    has_eod: bool
    source: str | None
    row: int | None
    ids: list[int]


@dataclass(frozen=True)
class SampleOrigin:
    """Where a sample of a run comes from.

    Attributes:
        position: its number in the order in which the run reads.
        prefix: the dataset.
        sample: its number in the stream of that dataset.
        epoch: the epoch of the dataset in which it ends, from 0; None in Megatron's order, which mixes them.
        parts: its documents, in the order of the stream; `--seq-length` + 1 ids together, of pairs fewer.
    """

    position: int
    prefix: str
    sample: int
    epoch: int | None
    parts: list[DocumentPart]

    @property
    def ids(self) -> list[int]:
        """The ids of the sample: all but the last are the batch's tokens, all but the first its labels."""
        return [i for part in self.parts for i in part.ids]


class Tracer:
    """Finds the documents of the samples of one dataset.

    Args:
        dataset: Megatron's `BlendedDataset` or a `GPTDataset`, its indices loaded.
        datasets: what was found out about each prefix.
    """

    def __init__(self, dataset: Any, datasets: Mapping[str, CheckedDataset]) -> None:
        self._dataset, self._datasets = dataset, datasets
        self._sources: dict[str, _Sources] = {}
        self._tokens_per_epoch: dict[str, int] = {}

    def trace(self, position: int) -> SampleOrigin:
        """Find the documents of sample number `position`."""
        source, index = self._dataset, position
        if hasattr(source, "dataset_sample_index"):
            index = int(self._dataset.dataset_sample_index[position])
            source = self._dataset.datasets[int(self._dataset.dataset_index[position])]
        prefix, sample = source.dataset_path, int(source.shuffle_index[index])
        epoch = None
        if hasattr(source, "documents_of"):  # whole pairs
            return SampleOrigin(
                position, prefix, sample, index // (len(source.sample_index) - 1), [*self._pairs(source, sample)]
            )
        if source.config.data_order == order.EPOCHS:
            if prefix not in self._tokens_per_epoch:
                lengths = source.dataset.sequence_lengths[source.indices]
                self._tokens_per_epoch[prefix] = int(lengths.sum(dtype=np.int64))
            epoch = order.epoch_of_sample(sample, self._tokens_per_epoch[prefix], source.config.sequence_length)
        return SampleOrigin(position, prefix, sample, epoch, list(self._parts(source, sample)))

    def _pairs(self, source: Any, sample: int) -> Iterator[DocumentPart]:
        for document in source.documents_of(sample):
            yield self._part(source, document, 0, int(source.dataset.sequence_lengths[document]))

    def _parts(self, source: Any, sample: int) -> Iterator[DocumentPart]:
        (first, first_offset), (last, last_offset) = source.sample_index[sample : sample + 2].tolist()
        extra = int(source.config.add_extra_token_to_sequence)
        for place in range(first, last + 1):
            document = int(source.document_index[place])
            num_tokens = int(source.dataset.sequence_lengths[document])
            start = first_offset if place == first else 0
            end = last_offset + extra if place == last else num_tokens
            if end == start:  # an empty document
                continue
            yield self._part(source, document, start, end)

    def _part(self, source: Any, document: int, start: int, end: int) -> DocumentPart:
        checked = self._datasets[source.dataset_path]
        num_tokens = int(source.dataset.sequence_lengths[document])
        file, row = self._sources.setdefault(checked.prefix, _Sources(checked.prefix)).locate(document)
        return DocumentPart(
            document=document,
            num_tokens=num_tokens,
            model_range=(start, end),
            natural_range=natural_range(start, end, num_tokens - checked.is_closed, checked.read_as),
            has_eod=checked.is_closed and end == num_tokens,
            source=file,
            row=row,
            ids=source.dataset.get(document, offset=start, length=end - start).tolist(),
        )


def natural_range(start: int, end: int, num_ids: int, direction: Direction) -> tuple[int, int]:
    """Count a part of a document in reading order.

    Args:
        start: first id of the part, counted as a model of `direction` reads the document.
        end: one beyond the last.
        num_ids: ids of the document without its end-of-document id, which belongs to no place in reading order.
        direction: of the model.

    >>> natural_range(0, 3, 9, Direction.REVERSE)
    (6, 9)
    """
    start, end = min(start, num_ids), min(end, num_ids)
    return (num_ids - end, num_ids - start) if direction is Direction.REVERSE else (start, end)


class _Sources:
    """The sources of one dataset, from its manifest and from the list of rows that became no document."""

    def __init__(self, prefix: str) -> None:
        path = manifest_path(prefix)
        # Read as JSON and not through `Manifest`: `rows` is newer than some manifests.
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.sources: list[dict[str, Any]] = content.get("sources", [])
        self.ends = np.cumsum([s["documents"] for s in self.sources], dtype=np.int64)
        self._sidecar = Path(f"{prefix}.skipped.jsonl")

    def locate(self, document: int) -> tuple[str | None, int | None]:
        """Return the source file of a document, and its row in it from 1; None for what is not recorded."""
        number = int(np.searchsorted(self.ends, document, side="right"))
        if number >= len(self.sources):
            return None, None
        source = self.sources[number]
        ordinal = document - int(self.ends[number] - source["documents"])
        rows = source.get("rows")
        if not rows:
            return source["path"], None
        skipped = self._skipped.get(number, np.zeros(0, dtype=np.int64))
        if rows != source["documents"] + len(skipped):
            return source["path"], None  # the list does not account for what is missing
        kept_before = skipped - 1 - np.arange(len(skipped))
        return source["path"], ordinal + 1 + int(np.searchsorted(kept_before, ordinal, side="right"))

    @functools.cached_property
    def _skipped(self) -> dict[int, np.ndarray]:
        """Source number -> rows that became no document, ascending."""
        rows: dict[int, list[int]] = {}
        if self._sidecar.is_file():
            with self._sidecar.open(encoding="utf-8") as file:
                for line in file:
                    entry = json.loads(line)
                    rows.setdefault(entry["source"], []).append(entry["row"])
        return {source: np.array(sorted(found), dtype=np.int64) for source, found in rows.items()}
