"""What a worker does with a shard: read, tokenise, reverse, write.

    slice -> batch of records -> ids (natural) -> stored ids -> .bin    ids, as they shall stand in the dataset
                |                                            -> .len    int32, ids per document
                |                                            -> .crc    uint32, CRC-32 of each document's bytes
                |                                            -> .sent   uint32, ids per sentence, where these are turned
                |                                            -> .pair   uint32, ids of the question's part, of pairs
                '- what became no document ------------------> .skip   JSON lines: [slice, row in it, why], if any

No ids travel between processes. Memory: `BLOCK_BYTES` of text at a time, or a document, whatever the shard holds.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from megatron_ledom.data.backends import FAST, Encoder, ReferenceEncoder
from megatron_ledom.data.compression import crc32
from megatron_ledom.data.files import write_refusal
from megatron_ledom.data.manifest import PairRecord
from megatron_ledom.data.pairs import encode_pairs, separator_places
from megatron_ledom.data.records import Batch
from megatron_ledom.data.sentences import SentenceSplitter
from megatron_ledom.data.shards import HashedPart, KeyRecord, Part, ShardRecord, WorkFolder
from megatron_ledom.data.sources import Slice, Source, read_slice, rows_before
from megatron_ledom.data.tokenizers import Answer, Tokenizer
from megatron_ledom.data.workers import Report
from megatron_ledom.direction import Direction, flip, flip_groups, natural_document, stored_batch, stored_document
from megatron_ledom.errors import InputError, TokenizerMismatchError

_COMPARED_BYTES = 8192  # the size of the document of each shard that is compared with the reference


class Sample(NamedTuple):
    """A document and the ids that it was given, in natural order, to be compared with the reference."""

    part: Slice
    row: int
    text: str
    ids: np.ndarray


class Outcome(NamedTuple):
    """What became of a shard: whether it was made here, its bad records, and a document of it if it was made fast."""

    is_made: bool
    bad: int
    sample: Sample | None


@dataclass(kw_only=True)
class EncodeTask:
    """Makes shards of one plan; called in the workers.

    Attributes:
        sources: the input files.
        shards: the slices of each shard.
        json_keys: the fields to make a dataset of; of pairs the two that become one.
        text_unit: what a document of a text file is.
        direction: of the dataset.
        splitter: where sentences end, if these are turned instead of tokens.
        append_eod: whether documents are closed.
        dtype: of the ids on disk.
        max_bad_records: bad records are passed over up to this number; None stops at the first one.
        folder: where shards go.
        tokenizer: the reference.
        encoder: the fastest exact library.
        num_bytes: of all sources together, for progress.
        wait: wait for shards that another process is making.
        pairs: what the pairs are, if documents are questions and answers.
        max_tokens: most ids of a pair with one boundary.
    """

    sources: Sequence[Source]
    shards: Sequence[Sequence[Slice]]
    json_keys: Sequence[str]
    text_unit: str
    direction: Direction
    splitter: SentenceSplitter | None
    append_eod: bool
    dtype: np.dtype
    max_bad_records: int | None
    folder: WorkFolder
    tokenizer: Tokenizer
    encoder: Encoder
    num_bytes: int
    wait: bool = False
    pairs: PairRecord | None = None
    max_tokens: int | None = None

    @property
    def num_outputs(self) -> int:
        """How many datasets are made."""
        return len(self.json_keys) if self.pairs is None else 1

    def __call__(self, shard: int, report: Report) -> Outcome:
        """Make a shard, unless it is finished or another process makes it.

        Raises:
            InputError: an input cannot be read, a record is bad, or the folder is gone.
            OutputError: the file system takes no more.
            OutputExistsError: the folder is of another plan now.
        """
        with self.folder.lock(f"{shard:06d}", wait=self.wait) as is_ours:
            self.folder.check_plan()  # the lock is one by name: it may be that of a folder begun anew
            if not is_ours or (found := self.folder.record(shard)) is not None:
                report(self.num_bytes // len(self.shards))
                return Outcome(False, found.bad if is_ours and found is not None else 0, None)
            maker = _ShardMaker(self, shard)
            record = maker.make(report)
            self.folder.finish(shard, record)
            return Outcome(True, record.bad, maker.sample)

    def place(self, part: Slice, row: int) -> str:
        """Name the file and the row in it of a row of a slice."""
        source = self.sources[part.source]
        return f"{source.path}:{rows_before(source, part) + row}"

    def finished_sample(self, shard: int) -> Sample | None:
        """Return the first document of a shard that the fast library made in a run that may not have compared any.

        None where that is long, or is not what was written (joining says so), or may be another one, since some became
        no document.
        """
        record, part = self.folder.record(shard), self.shards[shard][0]
        if record is None or record.backend != FAST:
            return None
        if record.keys[0].empty_documents or (self.pairs is not None and record.bad):
            return None
        source = self.sources[part.source]
        if source.format == "text" and self.text_unit == "file" and source.num_bytes > _COMPARED_BYTES:
            return None  # a batch is the whole file
        batch = next(read_slice(source, part, self.json_keys, self.text_unit), None)
        if batch is None or not batch.texts[0] or not 0 < len(batch.texts[0][0]) <= _COMPARED_BYTES:
            return None
        length = int(self._first(shard, "len", np.dtype("<i4"), 1).sum())
        stored = self._first(shard, "bin", self.dtype, min(max(length, 0), record.keys[0].tokens))
        if self._first(shard, "crc", np.dtype("<u4"), 1).tolist() != [crc32(stored)] or len(stored) != length:
            return None
        ids = natural_document(stored, self.direction, self.tokenizer.eod_id if self.append_eod else None)
        text = batch.texts[0][0].decode("utf-8")
        if self.pairs is not None:
            text += separator_places(self.pairs.separator, self.direction)[0]
            ids = ids[: self._first(shard, "pair", np.dtype("<u4"), 1)[0]]
        return Sample(part, batch.rows[0], text, ids)

    def _first(self, shard: int, suffix: str, dtype: np.dtype, count: int) -> np.ndarray:
        """The first numbers of a file of a shard's first key; fewer where the file is missing or short."""
        path = self.folder.file(shard, 0, suffix)
        return np.fromfile(path, dtype=dtype, count=count) if path.exists() else np.empty(0, dtype)


class SampleChecks:
    """Compares a document of every shard with the reference, which may be another process: nobody waits for it.

    A context manager: on leaving it waits for what is still to come, also after an error, since finished shards stay.

    Args:
        task: what makes the shards.
        finished: shards that earlier runs have made; nobody knows whether these have compared them.
    """

    def __init__(self, task: EncodeTask, finished: Iterable[int] = ()) -> None:
        self._task = task
        self._waiting: deque[tuple[int, Sample | None]] = deque((shard, None) for shard in finished)
        self._asked: tuple[int, Sample, Answer] | None = None

    def add(self, shard: int, sample: Sample) -> None:
        """Compare this one, too, when the reference has time; what has been answered is compared now.

        Raises:
            TokenizerMismatchError: the fast library departs from the reference; the shard is forgotten.
        """
        self._waiting.append((shard, sample))
        self._go_on(is_last=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):  # not Ctrl-C
            self._go_on(is_last=True)

    def _go_on(self, *, is_last: bool) -> None:
        while self._asked or self._waiting:
            if self._asked is None:
                shard, known = self._waiting.popleft()
                if (taken := known or self._task.finished_sample(shard)) is None:
                    continue
                self._asked = shard, taken, self._task.tokenizer.ask_ahead("encode", taken.text)
            shard, sample, answer = self._asked
            if not is_last and not answer.is_there():
                return
            self._asked = None
            self._compare(shard, sample, answer())

    def _compare(self, shard: int, sample: Sample, right: np.ndarray) -> None:
        if np.array_equal(sample.ids, right):
            return
        task = self._task
        task.folder.forget(shard)
        shorter = min(len(right), len(sample.ids))
        unequal = np.flatnonzero(sample.ids[:shorter] != right[:shorter])
        at = int(unequal[0]) if len(unequal) else shorter
        raise TokenizerMismatchError(
            f"{task.place(sample.part, sample.row)}: {FAST} gave wrong ids: token {at} is "
            f"{sample.ids[at : at + 3].tolist()}, {task.tokenizer.library} gives {right[at : at + 3].tolist()}. Remove "
            f"{task.folder.path} and use --tokenizer-backend {task.tokenizer.library}"
        )


class _ShardMaker:
    """One shard in the making."""

    def __init__(self, task: EncodeTask, shard: int) -> None:
        self._task, self._shard = task, shard
        num_slices = len(task.shards[shard])
        self._record = ShardRecord(
            task.folder.plan_sha256,
            rows=[0] * num_slices,
            bad=0,
            backend=task.encoder.name,
            keys=[KeyRecord(documents=[0] * num_slices) for _ in range(task.num_outputs)],
        )
        self.sample: Sample | None = None
        self._is_sampled = not isinstance(task.encoder, ReferenceEncoder)
        self._eod = task.tokenizer.eod_id if task.append_eod else None
        self._files: list[dict[str, Part]] = []

    def make(self, report: Report) -> ShardRecord:
        """Write the files of the shard and return what they are; on failure none is left."""
        task = self._task
        suffixes = ["bin", "len", "crc", "skip"]
        suffixes += ["sent"] * (task.splitter is not None) + ["pair"] * (task.pairs is not None)
        with ExitStack() as stack:
            try:
                for key in range(task.num_outputs):
                    files = {}
                    for suffix in suffixes:
                        path = task.folder.temporary(task.folder.file(self._shard, key, suffix))
                        files[suffix] = (Part if suffix == "bin" else HashedPart)(path)
                        stack.callback(files[suffix].discard)
                    self._files.append(files)
                for number, part in enumerate(task.shards[self._shard]):
                    source = task.sources[part.source]
                    for batch in read_slice(source, part, task.json_keys, task.text_unit):
                        self._add(number, part, batch)
                        report(batch.input_bytes)
                for files, key_record in zip(self._files, self._record.keys, strict=True):
                    if not files["skip"].num_bytes:  # as in most shards: one file less to make, rename and remove
                        files.pop("skip").discard()
                    key_record.files = {suffix: file.close() for suffix, file in files.items()}
                task.folder.check_plan()
            except OSError as error:
                task.folder.check_plan()  # a folder that is gone is no full disk
                raise write_refusal(task.folder.path, 0, error) from error
            stack.pop_all()
        return self._record

    def _add(self, number: int, part: Slice, batch: Batch) -> None:
        self._record.rows[number] = batch.last_row
        pairs = None
        if self._task.pairs is not None:
            pairs = encode_pairs(
                batch, self._task.pairs, self._task.direction, self._task.encoder, self._task.max_tokens
            )
        if batch.bad:
            self._note_bad(part, batch)
        skipped = [(row, "blank") for row in batch.blank] + [(row, f"bad: {why}") for row, why in batch.bad]
        for key in range(len(self._files)):
            empty = (
                self._add_texts(number, part, key, batch) if pairs is None else self._add_pairs(number, *pairs, batch)
            )
            left_out = skipped + [(batch.rows[i], "empty") for i in empty]
            if left_out:
                lines = [json.dumps([number, row, why], separators=(",", ":")) + "\n" for row, why in sorted(left_out)]
                self._files[key]["skip"].write("".join(lines).encode("ascii"))

    def _note_bad(self, part: Slice, batch: Batch) -> None:
        self._record.bad += len(batch.bad)
        limit = self._task.max_bad_records
        if limit is None or self._record.bad > limit:
            row, why = batch.bad[0]
            more = "" if limit is None else f" (and more than --max-bad-records {limit} are bad)"
            raise InputError(f"{self._task.place(part, row)}: {why}{more}")

    def _add_texts(self, number: int, part: Slice, key: int, batch: Batch) -> list[int]:
        """Write the documents of one key; return the places in the batch of those without a token."""
        task, record, files, texts = self._task, self._record.keys[key], self._files[key], batch.texts[key]
        if not texts:
            return []
        if task.splitter is None:
            natural = task.encoder.encode_batch(texts)
            kept = natural if all(map(len, natural)) else [ids for ids in natural if len(ids)]
            flat = stored_batch(kept, task.direction, self._eod)
            self._take_sample(part, batch.rows[0], texts[0], natural[0])
        else:
            natural, flat = self._encode_sentences(task.splitter, texts, files["sent"])
            kept = [ids for ids in natural if len(ids)]
        self._write(number, part, key, batch, kept, flat)
        record.empty_documents += len(texts) - len(kept)
        record.text_bytes += sum(map(len, texts))
        return [] if len(kept) == len(texts) else [i for i, ids in enumerate(natural) if not len(ids)]

    def _add_pairs(
        self, number: int, natural: list[np.ndarray], question_lengths: np.ndarray, batch: Batch
    ) -> list[int]:
        """Write pairs; none is empty."""
        assert self._task.pairs is not None
        if not natural:
            return []
        part = self._task.shards[self._shard][number]
        self._write(number, part, 0, batch, natural, stored_batch(natural, self._task.direction, self._eod))
        self._files[0]["pair"].write(question_lengths.astype("<u4"))
        self._record.keys[0].text_bytes += sum(len(text) for texts in batch.texts for text in texts)
        after_question, _ = separator_places(self._task.pairs.separator, self._task.direction)
        text, ids = batch.texts[0][0] + after_question.encode(), natural[0][: question_lengths[0]]
        self._take_sample(part, batch.rows[0], text, ids)
        return []

    def _write(
        self, number: int, part: Slice, key: int, batch: Batch, kept: list[np.ndarray], flat: np.ndarray
    ) -> None:
        """Append documents to the files of a key: `kept` in natural order, `flat` as they are stored."""
        task, record, files = self._task, self._record.keys[key], self._files[key]
        if len(flat) and (highest := int(flat.max())) > np.iinfo(task.dtype).max:
            raise InputError(
                f"{task.place(part, batch.rows[0])} and after: the tokenizer gave id {highest}, which does not "
                f"fit {task.dtype.name}, the type for its vocabulary of {task.tokenizer.vocab_size}"
            )
        lengths = np.fromiter(map(len, kept), dtype=np.int32, count=len(kept)) + np.int32(self._eod is not None)
        stored = flat.astype(task.dtype)
        record.eod_in_text += int(np.count_nonzero(stored == task.tokenizer.eod_id))
        record.eod_in_text -= len(kept) if self._eod is not None else 0
        record.documents[number] += len(kept)
        record.tokens += len(flat)
        view = memoryview(stored).cast("B")
        ends = (np.cumsum(lengths, dtype=np.int64) * task.dtype.itemsize).tolist()
        documents = map(view.__getitem__, map(slice, [0, *ends[:-1]], ends))  # twice as fast as a loop in Python
        crcs = np.fromiter(map(crc32, documents), dtype="<u4", count=len(ends))
        files["bin"].write(view)
        files["len"].write(lengths)
        files["crc"].write(crcs)

    def _take_sample(self, part: Slice, row: int, text: bytes, ids: np.ndarray) -> None:
        """Keep a document of the shard for the comparison, where it is made by the fast library."""
        if self._is_sampled and self.sample is None and 0 < len(text) <= _COMPARED_BYTES:
            self.sample = Sample(part, row, text.decode("utf-8"), ids)

    def _encode_sentences(
        self, splitter: SentenceSplitter, texts: list[bytes], file: Part
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the ids of each text in natural order, and the stored ids of all; write the sizes of sentences."""
        natural, stored = [], []
        for text in (text.decode("utf-8") for text in texts):
            ids, starts = self._task.tokenizer.encode_with_starts(text)
            natural.append(ids)
            if len(ids):
                counts = splitter.token_counts(text, starts)
                stored.append(stored_document(flip_groups(ids, counts), Direction.FORWARD, self._eod))
                file.write(flip(counts).astype("<u4"))
        return natural, np.concatenate(stored) if stored else np.empty(0, dtype=np.int32)
