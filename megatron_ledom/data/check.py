"""Is a dataset what its manifest says? Every byte of it is read, and what is wrong is named by document.

It owns the verification; reading single documents is `documents.py`. It reads front to
back in blocks, so memory does not grow with the dataset, and it raises no error of Python's whatever
the files hold: what cannot be read is a fault like others.

    .idx     lengths, offsets and boundaries must be those of documents that lie end to end
    .bin     ids inside the vocabulary; the end-of-document id last; CRC-32 of every document
    all      size and SHA-256 as in the manifest, and the manifest's own hash
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_ledom.data.compression import crc32
from megatron_ledom.data.documents import describe_origin, open_raw, read_at, read_lengths, read_skipped, take_sentences
from megatron_ledom.data.files import WrittenFile
from megatron_ledom.data.indexed import DTYPES, HEADER, index_bytes, optimal_dtype, read_index_header
from megatron_ledom.data.manifest import Manifest, has_right_hash, load_manifest, manifest_path
from megatron_ledom.data.pairs import SIDECAR
from megatron_ledom.data.tokenizers import Tokenizer
from megatron_ledom.errors import InputError, LedomError
from megatron_ledom.files import hash_file

BLOCK_BYTES = 8 << 20
MAX_FAULTS = 20  # of one kind that are listed; the others are counted


@dataclass
class Report:
    """What was found: `faults` in words, and how many documents and ids were looked at."""

    prefix: str
    faults: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    manifest: Manifest | None = None
    _kinds: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, text: str) -> None:
        """Note a fault; more than `MAX_FAULTS` of a kind are only counted."""
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        if self._kinds[kind] <= MAX_FAULTS:
            self.faults.append(text)

    def close(self) -> None:
        """Tell how many were not listed."""
        self.faults += [f"{n - MAX_FAULTS:,} more faults: {kind}" for kind, n in self._kinds.items() if n > MAX_FAULTS]


def check_dataset(
    prefix: str, tokenizer: Tokenizer | None = None, on_read: Callable[[int], None] = lambda num_bytes: None
) -> Report:
    """Verify a dataset.

    Args:
        prefix: the path without suffix.
        tokenizer: the one that it is said to be made with, to compare fingerprints.
        on_read: told the bytes after each piece, for progress; twice the size of the dataset in all.

    Raises:
        LedomError: there is no manifest, or it cannot be understood, so that nothing can be said.
    """
    report = Report(prefix)
    manifest = report.manifest = load_manifest(prefix)
    if not has_right_hash(prefix):
        report.add("manifest", f"{manifest_path(prefix)} was changed after it was written: its own hash does not fit")
    _check_statements(report, manifest, tokenizer)
    _check_hashes(report, manifest, on_read)
    try:
        num_documents = _check_header(report, manifest)
        if num_documents is not None:
            _check_documents(report, manifest, num_documents, on_read)
        if "skipped.jsonl" in manifest.sidecars:
            _check_skipped(report, manifest)
        if manifest.pairs is not None and num_documents is not None:
            _check_pairs(report, num_documents)
    except (OSError, LedomError) as error:
        report.add("reading", f"{prefix}: {error}")
    report.close()
    return report


def _check_statements(report: Report, manifest: Manifest, tokenizer: Tokenizer | None) -> None:
    """What the manifest says must fit together, and fit the tokenizer."""
    made_with, prefix = manifest.tokenizer, report.prefix
    if tokenizer is not None and tokenizer.fingerprint != made_with.fingerprint:
        report.add(
            "tokenizer",
            f"{prefix} was made with {made_with.type} {made_with.model} ({made_with.fingerprint}), "
            f"not with {tokenizer.model} ({tokenizer.fingerprint})",
        )
    if manifest.dtype not in DTYPES or manifest.dtype != optimal_dtype(made_with.vocab_size).name:
        report.add("dtype", f"{prefix}: ids of {manifest.dtype} do not fit a vocabulary of {made_with.vocab_size:,}")
    documents = sum(source.documents for source in manifest.sources)
    if documents != manifest.counts.documents:
        report.add(
            "counts", f"{prefix}: {manifest.counts.documents:,} documents, but {documents:,} in the list of sources"
        )


def _check_hashes(report: Report, manifest: Manifest, on_read: Callable[[int], None]) -> None:
    for suffix, expected in sorted((manifest.files | manifest.sidecars).items()):
        path = Path(f"{report.prefix}.{suffix}")
        try:
            found = WrittenFile(path.stat().st_size, hash_file(path, on_read=on_read))
        except (OSError, ValueError) as error:  # a name with a zero in it is a ValueError
            report.add("missing", f"{path}: {error}")
            continue
        if found.bytes != expected.bytes:
            report.add("size", f"{path} has {found.bytes:,} bytes, the manifest says {expected.bytes:,}")
        elif found.sha256 != expected.sha256:
            report.add("hash", f"{path} is not the file that was written: SHA-256 {found.sha256[:16]}... found")


def _check_header(report: Report, manifest: Manifest) -> int | None:
    """Return the number of documents if the index can be read at all."""
    path = Path(f"{report.prefix}.idx")
    if manifest.dtype not in DTYPES:
        return None
    header = read_index_header(path)
    found = (header.dtype, header.num_sequences, header.num_boundaries)
    count = manifest.counts.documents
    if found != (manifest.dtype, count, count + 1):
        report.add(
            "index and data differ",
            f"{path} says {found} (dtype, sequences, boundaries), the manifest {manifest.dtype}, {count:,}",
        )
        return None
    if path.stat().st_size != index_bytes(count):
        report.add(
            "index and data differ",
            f"{path} has {path.stat().st_size:,} bytes, {count:,} documents need {index_bytes(count):,}",
        )
        return None
    return count


def _check_documents(report: Report, manifest: Manifest, num_documents: int, on_read: Callable[[int], None]) -> None:
    prefix, dtype = report.prefix, np.dtype(manifest.dtype)
    data_bytes = Path(f"{prefix}.bin").stat().st_size
    eod_in_text = 0
    with ExitStack() as stack:
        idx = stack.enter_context(open_raw(f"{prefix}.idx"))
        data = stack.enter_context(open_raw(f"{prefix}.bin"))
        has_crcs = "crc32" in manifest.sidecars and Path(f"{prefix}.crc32").is_file()
        crcs = stack.enter_context(open_raw(f"{prefix}.crc32")) if has_crcs else None
        sentences = _SentenceReader(report, stack) if "sentences" in manifest.sidecars else None
        offset = 0
        for first, lengths in read_lengths(idx, num_documents):
            _check_index_block(report, idx, num_documents, first, lengths, offset, dtype.itemsize)
            if (lengths < 1).any() or offset + int(lengths.sum(dtype=np.int64)) * dtype.itemsize > data_bytes:
                where = first + int(np.argmax(lengths < 1)) if (lengths < 1).any() else first
                report.add(
                    "index and data differ",
                    f"{prefix}.idx: document {where} or one after it has an impossible length; stopped here",
                )
                return
            stored = None
            if crcs is not None:
                content = crcs.read(4 * len(lengths))
                stored = np.frombuffer(content[: len(content) // 4 * 4], dtype="<u4")
            if sentences is not None:
                sentences.check(first, lengths - int(manifest.append_eod))
            for start, ends, ids in _chunks(data, lengths, dtype, on_read):
                part = None if stored is None else stored[start : start + len(ends)]
                eod_in_text += _check_chunk(report, manifest, first + start, ends, ids, part)
            offset += int(lengths.sum(dtype=np.int64)) * dtype.itemsize
        if sentences is not None:
            sentences.close()
    if offset != data_bytes:
        report.add("index and data differ", f"{prefix}.bin has {data_bytes:,} bytes, its index accounts for {offset:,}")
    counts = manifest.counts
    for name, found, stated in (
        ("tokens", report.tokens, counts.tokens),
        ("eod_in_text", eod_in_text, counts.eod_in_text),
    ):
        if found != stated:
            report.add("counts", f"{prefix}: {name} is {found:,}, the manifest says {stated:,}")


def _check_index_block(
    report: Report, idx: BinaryIO, total: int, first: int, lengths: np.ndarray, offset: int, itemsize: int
) -> None:
    sizes = lengths * itemsize
    right = offset + np.cumsum(sizes) - sizes
    found = read_at(idx, HEADER.size + 4 * total + 8 * first, len(lengths), "<i8")
    for i in np.flatnonzero(found != right)[:MAX_FAULTS]:
        report.add(
            "index and data differ",
            f"{report.prefix}.idx: document {first + i} is said to lie at byte {found[i]}, not {right[i]}",
        )
    count = len(lengths) + (first + len(lengths) == total)
    bounds = read_at(idx, HEADER.size + 12 * total + 8 * first, count, "<i8")
    for i in np.flatnonzero(bounds != np.arange(first, first + count))[:MAX_FAULTS]:
        report.add(
            "index and data differ",
            f"{report.prefix}.idx: boundary {first + i} is {bounds[i]}, documents are one sequence each",
        )


def _chunks(
    data: BinaryIO, lengths: np.ndarray, dtype: np.dtype, on_read: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (number of the first in the block, where each document ends, stored ids), some megabytes at a time."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK_BYTES // dtype.itemsize, side="right")))
        count = int(ends[stop - 1]) - before
        content = data.read(count * dtype.itemsize)
        on_read(len(content))
        if len(content) != count * dtype.itemsize:
            raise InputError(f"{data.name} ends in the middle of a document")
        yield start, ends[start:stop] - before, np.frombuffer(content, dtype=dtype.newbyteorder("<"))
        start = stop


def _check_chunk(
    report: Report, manifest: Manifest, first: int, ends: np.ndarray, ids: np.ndarray, crcs: np.ndarray | None
) -> int:
    """Check whole documents that lie end to end; return the end-of-document ids that are not their last."""
    report.documents += len(ends)
    report.tokens += len(ids)
    eod_id, vocab_size = manifest.tokenizer.eod_id, manifest.tokenizer.vocab_size
    where = f"{report.prefix}.bin: document"
    if crcs is not None:
        view, bounds = memoryview(ids).cast("B"), (ends * ids.itemsize).tolist()
        found = [crc32(view[start:end]) for start, end in zip([0, *bounds], bounds, strict=False)]
        crcs = crcs if len(crcs) == len(found) else np.zeros(len(found), dtype=np.uint32)
        for i in np.flatnonzero(np.array(found, dtype=np.uint32) != crcs):
            origin = describe_origin(report.prefix, manifest, first + int(i))
            text = f"{where} {first + i} ({origin}) does not fit its CRC-32: its ids, or the .crc32 file, were changed"
            report.add("document and CRC-32 differ", text)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        for at in wrong[:MAX_FAULTS]:
            document = first + int(np.searchsorted(ends, at, side="right"))
            report.add("id outside the vocabulary", f"{where} {document} holds id {ids[at]}, outside the vocabulary")
    num_eod = int(np.count_nonzero(ids == eod_id))
    if not manifest.append_eod:
        return num_eod
    is_closed = ids[ends - 1] == eod_id
    for i in np.flatnonzero(~is_closed):
        text = f"{where} {first + i} ends with id {ids[ends[i] - 1]}, not with the end-of-document id {eod_id}"
        report.add("document not closed", text)
    return num_eod - int(np.count_nonzero(is_closed))


class _SentenceReader:
    """Compares the sizes of sentences with the documents; reads as it goes."""

    def __init__(self, report: Report, stack: ExitStack) -> None:
        self._report = report
        self._file = stack.enter_context(open_raw(f"{report.prefix}.sentences"))
        self._held: deque[int] = deque()
        self._is_broken = False

    def check(self, first: int, lengths: np.ndarray) -> None:
        """Compare the sentences of the documents from `first` on with their lengths; int32 [documents]."""
        if self._is_broken:
            return
        for number, length in enumerate(lengths.tolist()):
            if take_sentences(self._file, self._held, length) is None:
                self._is_broken = True
                self._report.add(
                    "sentences", f"{self._file.name}: the sentences of document {first + number} do not add up to it"
                )
                return

    def close(self) -> None:
        if not self._is_broken and (self._held or self._file.read(1)):
            self._report.add("sentences", f"{self._file.name} holds more than the documents")


def _check_pairs(report: Report, num_documents: int) -> None:
    """Both parts of every pair must have an id."""
    path = Path(f"{report.prefix}.{SIDECAR}")
    if path.stat().st_size != 4 * num_documents:
        report.add("pairs", f"{path} has {path.stat().st_size:,} bytes, {4 * num_documents:,} belong to the documents")
        return
    with open_raw(f"{report.prefix}.idx") as idx, open_raw(str(path)) as file:
        for first, lengths in read_lengths(idx, num_documents):
            questions = read_at(file, 4 * first, len(lengths), "<u4").astype(np.int64)
            for i in np.flatnonzero((questions < 1) | (questions > lengths - 2)):
                text = (
                    f"{path}: document {first + i} is said to have {questions[i]} ids of {lengths[i]} in its question"
                )
                report.add("pairs", text)


def _check_skipped(report: Report, manifest: Manifest) -> None:
    """Every row of every source must be a document or be listed, once, in order."""
    path = f"{report.prefix}.skipped.jsonl"
    listed = [0] * len(manifest.sources)
    last = (0, 0)
    for number, entry in enumerate(read_skipped(path), start=1):
        source, row = entry
        if not 0 <= source < len(listed) or not last < (source, row) or not 0 < row <= manifest.sources[source].rows:
            report.add("skipped", f"{path}:{number}: source {source}, row {row} cannot stand here")
            return
        listed[source] += 1
        last = (source, row)
    for number, (found, source_record) in enumerate(zip(listed, manifest.sources, strict=True)):
        if found + source_record.documents != source_record.rows:
            report.add(
                "skipped",
                f"{path}: source {number} has {source_record.rows:,} rows, but {source_record.documents:,} documents "
                f"and {found:,} listed here",
            )
