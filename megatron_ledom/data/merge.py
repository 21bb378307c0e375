"""Finished shards to a dataset: joined by several processes, hashed, and given its names.

Every shard's place in the final files follows from the sizes in the records of those before it, so
workers copy shards to their places in any order, comparing each with its hash on the way, while others
hash the whole files by reading the shards in order. Only what was skipped is written in one piece.

Where the file system has no locks several processes may join at once. Each writes under names of its own, and all
write the same bytes, the manifest included, so that it does not matter in which order their renames mix.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ledom import __version__
from megatron_ledom.data.compression import crc32
from megatron_ledom.data.files import HashedFile, StagedFile, WrittenFile, copy_at, write_at, write_refusal
from megatron_ledom.data.indexed import index_bytes, write_index_header, write_index_part
from megatron_ledom.data.manifest import (
    FORMAT_VERSION,
    PLAIN_VERSION,
    Counts,
    Manifest,
    PairRecord,
    SourceRecord,
    TokenizerRecord,
    manifest_hash,
    stage_manifest,
)
from megatron_ledom.data.publishing import (
    SUFFIXES,
    check_not_there,
    dataset_prefixes,
    described_tokenizer,
    finish_publishing,
    joined_meanwhile,
    standing_manifests,
)
from megatron_ledom.data.shards import KeyRecord, ShardRecord, WorkFolder
from megatron_ledom.data.workers import Report, run_parallel
from megatron_ledom.direction import Direction
from megatron_ledom.errors import InputError
from megatron_ledom.files import hash_file
from megatron_ledom.log import Progress

_BLOCK_BYTES = 4 << 20
_PARTS = {
    "bin": "bin",
    "crc": "crc32",
    "sent": "sentences",
    "pair": "pairs",
}  # files of a shard that are joined as they are


def merge_shards(
    output_prefix: str,
    *,
    workers: int,
    overwrite: bool,
    trusted: Collection[int] = (),
    work: WorkFolder | None = None,
) -> list[Manifest]:
    """Join the finished shards in `PREFIX.shards/`, publish the datasets and remove the folder.

    Args:
        output_prefix: as for preprocessing.
        workers: processes that copy and hash.
        overwrite: replace datasets of the same name.
        trusted: shards that this run has just made, so that they need not be compared with their hashes.
        work: the folder of this run, whose plan alone may be joined; None joins whatever plan is there.

    Returns:
        The manifests, in the order of the keys.

    Raises:
        InputError: there is no such folder, a shard is unfinished or damaged, too many records
            are bad, or a key has no text at all.
        OutputError: the file system takes no more.
        OutputExistsError: a dataset of that name is there, or the folder is of another plan now.
    """
    if work is None:
        work = WorkFolder(output_prefix)
        plan = work.plan()
        if plan is None:
            raise InputError(f"{work.path} is not there: nothing to join. Has preprocess_data.py run with this prefix?")
        work.adopt(plan)
    prefixes = dataset_prefixes(output_prefix, work.adopted["json_keys"])
    before, fingerprint = standing_manifests(prefixes), work.fingerprint()
    try:
        with work.lock("merge", wait=True):
            work.check_plan()
            work.sweep_partials()
            done = finish_publishing(work, prefixes)
            if done is not None:
                return done
            if not overwrite and not work.is_publishing:
                check_not_there(prefixes)
            return _Merge(work, work.adopted, prefixes, workers, trusted).run()
    except _EmptyCorpusError:
        work.remove()
        raise
    except Exception:  # whatever a process meets from under which the folder is taken
        done = joined_meanwhile(work, prefixes, before, fingerprint)
        if done is not None:
            return done
        work.check_plan()
        raise


class _EmptyCorpusError(InputError):
    """Of a plan that will never give a dataset, so that its folder is of no use."""


@dataclass(frozen=True)
class _Place:
    """Where a shard of a key goes."""

    key: int
    shard: int
    document: int
    offset: int
    sentence_offset: int
    record: KeyRecord


@dataclass(frozen=True)
class _Whole:
    """A final file that is hashed by reading its parts, the files of that suffix, in order."""

    key: int
    suffix: str
    num_shards: int


@dataclass(frozen=True)
class _CopyTask:
    """Copies a shard of one key into the staged files, or hashes one of them."""

    work: WorkFolder
    partials: dict[tuple[int, str], Path]
    num_documents: list[int]
    dtype: np.dtype
    trusted: frozenset[int]

    def __call__(self, item: _Place | _Whole | Path, report: Report) -> WrittenFile | None:
        if isinstance(item, Path):
            return WrittenFile(item.stat().st_size, hash_file(item, on_read=report, sync=True))
        if isinstance(item, _Whole):
            return self._hash(item, report)
        per_document = 4 * item.document
        starts = {"bin": item.offset, "crc": per_document, "pair": per_document, "sent": item.sentence_offset}
        for suffix in item.record.files:
            if suffix in _PARTS:
                self._copy(item, suffix, starts[suffix], report)
        lengths = np.frombuffer(self._read(item, "len"), dtype="<i4").astype(np.int32, copy=False)
        target = self.partials[item.key, "idx"]
        with target.open("r+b", buffering=0) as file:
            try:
                write_index_part(
                    file.fileno(),
                    lengths,
                    first=item.document,
                    num_documents=self.num_documents[item.key],
                    offset_bytes=item.offset,
                    itemsize=self.dtype.itemsize,
                )
            except OSError as error:
                raise write_refusal(target, 0, error) from error
        return None

    def _hash(self, item: _Whole, report: Report) -> WrittenFile:
        digest, num_bytes = hashlib.sha256(), 0
        for shard in range(item.num_shards):
            path = self.work.file(shard, item.key, item.suffix)
            if not path.exists():
                continue  # the worker that copies it tells
            with path.open("rb", buffering=0) as source:
                while data := source.read(_BLOCK_BYTES):
                    digest.update(data)
                    num_bytes += len(data)
                    report(len(data))
        return WrittenFile(num_bytes, digest.hexdigest())

    def _read(self, item: _Place, suffix: str) -> bytes:
        with self._open(item, suffix) as source:
            return b"".join(self._hashed(item, suffix, source))

    def _copy(self, item: _Place, suffix: str, offset: int, report: Report) -> None:
        target, num_bytes = self.partials[item.key, _PARTS[suffix]], item.record.files[suffix].bytes
        with self._open(item, suffix) as source, target.open("r+b", buffering=0) as file:
            if item.shard in self.trusted and copy_at(source.fileno(), file.fileno(), offset, num_bytes):
                report(num_bytes)
            else:
                place = offset
                for data in self._documents(item, source) if suffix == "bin" else self._hashed(item, suffix, source):
                    try:
                        place = write_at(file.fileno(), data, place)
                    except OSError as error:
                        raise write_refusal(target, place, error) from error
                    report(len(data))
            # lets the disk begin now; publishing waits for it
            os.posix_fadvise(file.fileno(), offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def _open(self, item: _Place, suffix: str) -> BinaryIO:
        path = self.work.file(item.shard, item.key, suffix)
        found = path.stat().st_size if path.exists() else 0
        expected = item.record.files[suffix].bytes
        if not path.exists() or found != expected:
            raise self._damaged(item, suffix, f"{found:,} bytes, {expected:,} expected")
        return path.open("rb", buffering=0)

    def _hashed(self, item: _Place, suffix: str, source: BinaryIO) -> Iterator[bytes]:
        """Yield a file of a shard block by block; at the end its hash is compared."""
        digest = hashlib.sha256()
        while data := source.read(_BLOCK_BYTES):
            digest.update(data)
            yield data
        if digest.hexdigest() != item.record.files[suffix].sha256:
            raise self._damaged(item, suffix, "another hash")

    def _documents(self, item: _Place, source: BinaryIO) -> Iterator[bytes | memoryview]:
        """Yield the bytes of a shard's `.bin`, some documents at a time, each compared with its CRC."""
        ends = np.cumsum(np.frombuffer(self._read(item, "len"), dtype="<i4"), dtype=np.int64) * self.dtype.itemsize
        crcs = np.frombuffer(self._read(item, "crc"), dtype="<u4").tolist()
        first = start = 0
        while first < len(ends):
            last = max(int(np.searchsorted(ends, start + _BLOCK_BYTES, side="right")), first + 1)
            data = memoryview(source.read(int(ends[last - 1]) - start))
            bounds = [0, *(ends[first:last] - start).tolist()]
            if [crc32(data[a:b]) for a, b in pairwise(bounds)] != crcs[first:last]:
                raise self._damaged(item, "bin", "another CRC of a document")
            yield data
            first, start = last, int(ends[last - 1])

    def _damaged(self, item: _Place, suffix: str, found: str) -> InputError:
        self.work.forget(item.shard)
        return InputError(
            f"{self.work.file(item.shard, item.key, suffix)} is damaged ({found}). The shard was thrown away: give the "
            "command of preprocess_data.py again, which makes it anew"
        )


class _Merge:
    def __init__(
        self, work: WorkFolder, plan: dict[str, Any], prefixes: list[str], workers: int, trusted: Collection[int]
    ) -> None:
        self._work, self._plan, self._prefixes, self._workers = work, plan, prefixes, workers
        self._trusted = frozenset(trusted)
        self._dtype = np.dtype(plan["dtype"])
        self._records = self._load_records()
        self._fingerprint = self._load_fingerprint()

    def _load_records(self) -> list[ShardRecord]:
        records, missing = [], []
        for shard in range(len(self._plan["shards"])):
            record = self._work.record(shard)
            if record is None:
                missing.append(shard)
            else:
                records.append(record)
        if missing:
            raise InputError(
                f"{len(missing)} of {len(self._plan['shards'])} shards in {self._work.path} are not finished (the "
                f"first: {missing[0]}): give the command of preprocess_data.py again, without --shard-index or with "
                "those left out"
            )
        return records

    def _load_fingerprint(self) -> str:
        found = self._work.fingerprint()
        if not found:
            raise InputError(
                f"all shards in {self._work.path} are finished, but the process that made the last ones was killed "
                "before it ended: give its command again"
            )
        return found

    def run(self) -> list[Manifest]:
        """Join the shards, publish the datasets and return their manifests."""
        self._check_counts()
        with ExitStack() as stack:
            staged = self._stage(stack)
            progress = Progress("join", 2 * sum(file.num_bytes for file in staged.values()) / 1e6, "MB")
            hashes = self._fill(staged, progress)
            manifests = []
            for key, prefix in enumerate(self._prefixes):
                skipped, rows = self._write_skipped(stack, staged, key)
                hashes[key, "skipped.jsonl"] = skipped
                if self._plan["punkt"] is not None:
                    hashes[key, "punkt.json"] = self._write_punkt(stack, staged, key, prefix)
                manifests.append(self._describe(key, rows, {s: f for (k, s), f in hashes.items() if k == key}))
            staged_manifests = [
                stack.enter_context(stage_manifest(manifest, prefix, self._work.path))
                for prefix, manifest in zip(self._prefixes, manifests, strict=True)
            ]
            self._work.check_plan()
            self._work.mark_publishing([manifest_hash(manifest) for manifest in manifests])
            for key, manifest_file in enumerate(staged_manifests):
                self._clear_away(key, staged, manifest_file)
                for (owner, _), file in staged.items():
                    if owner == key:
                        file.publish()
                manifest_file.publish()
            progress.close()
        self._work.remove()
        return manifests

    def _clear_away(self, key: int, staged: Collection[tuple[int, str]], manifest_file: StagedFile) -> None:
        """Remove the manifest of an older dataset, so that new data never stands beside it, and what the new one lacks.

        One that is the new manifest already is another joiner's, and stays: its files may all stand.
        """
        old = manifest_file.path
        if old.is_file():
            taken = self._work.temporary(self._work.path / "old")
            old.replace(taken)  # looked at when no other joiner can replace it any more
            if taken.read_bytes() == manifest_file.partial.read_bytes():
                taken.replace(old)
                return
            taken.unlink()
        for suffix in SUFFIXES:
            if suffix != ".manifest.json" and (key, suffix[1:]) not in staged:
                Path(f"{self._prefixes[key]}{suffix}").unlink(missing_ok=True)

    def _check_counts(self) -> None:
        bad = sum(record.bad for record in self._records)
        limit = self._plan["max_bad_records"]
        if limit is None and bad:  # passed over by an earlier command that allowed it
            raise InputError(
                f"{bad:,} records are bad (listed in the .skip files of {self._work.path}): mend the corpus, or pass "
                "--on-bad-record skip"
            )
        if limit is not None and bad > limit:
            raise InputError(
                f"{bad:,} records are bad, more than --max-bad-records {limit:,}; they are listed in the .skip files "
                f"of {self._work.path}. Mend the corpus, or allow more"
            )
        for key, name in enumerate(self._plan["json_keys"]):
            if not sum(sum(record.keys[key].documents) for record in self._records):
                inputs = ", ".join(self._plan["inputs"])
                raise _EmptyCorpusError(f"the corpus is empty: no text under the key {name!r} in {inputs}")

    def _stage(self, stack: ExitStack) -> dict[tuple[int, str], StagedFile]:
        """Make the final files under their temporary names, at their final sizes."""
        staged: dict[tuple[int, str], StagedFile] = {}
        for key, prefix in enumerate(self._prefixes):
            keys = [record.keys[key] for record in self._records]
            for suffix in keys[0].files:
                if suffix in _PARTS:
                    file = stack.enter_context(StagedFile(Path(f"{prefix}.{_PARTS[suffix]}"), self._work.path))
                    file.reserve(sum(k.files[suffix].bytes for k in keys))
                    staged[key, _PARTS[suffix]] = file
            count = sum(sum(k.documents) for k in keys)
            file = stack.enter_context(StagedFile(Path(f"{prefix}.idx"), self._work.path))
            file.reserve(index_bytes(count))
            with file.partial.open("r+b", buffering=0) as raw:
                write_index_header(raw.fileno(), self._dtype, count)
            staged[key, "idx"] = file
        return staged

    def _fill(
        self, staged: dict[tuple[int, str], StagedFile], progress: Progress
    ) -> dict[tuple[int, str], WrittenFile]:
        """Copy all shards to their places, then hash the files."""
        places, num_documents = [], []
        for key in range(len(self._prefixes)):
            document = offset = sentence_offset = 0
            for shard, record in enumerate(self._records):
                part = record.keys[key]
                places.append(_Place(key, shard, document, offset, sentence_offset, part))
                document += sum(part.documents)
                offset += part.files["bin"].bytes
                sentence_offset += part.files["sent"].bytes if "sent" in part.files else 0
            num_documents.append(document)
        task = _CopyTask(
            self._work, {name: f.partial for name, f in staged.items()}, num_documents, self._dtype, self._trusted
        )

        def on_report(num_bytes: int) -> None:
            progress.update(num_bytes / 1e6)

        found: dict[tuple[int, str], WrittenFile] = {}
        wholes = [
            _Whole(key, suffix, len(self._records))
            for suffix in _PARTS
            for key in range(len(self._prefixes))
            if (key, _PARTS[suffix]) in staged
        ]
        items: list[_Place | _Whole | Path] = [*wholes, *places]
        for item, written in run_parallel(task, items, self._workers, on_report=on_report, doing="shards were joined"):
            if isinstance(item, _Whole) and written is not None:
                found[item.key, _PARTS[item.suffix]] = written
        indexes = {file.partial: name for name, file in staged.items() if name[1] == "idx"}
        items, workers = [*indexes], min(self._workers, len(indexes))  # of a single one no other process need begin
        for item, written in run_parallel(task, items, workers, on_report=on_report, doing="files were hashed"):
            if isinstance(item, Path) and written is not None:
                found[indexes[item]] = written
        for name, file in staged.items():
            file.check_size(found[name].bytes)
            file.sync()
        return found

    def _write_skipped(
        self, stack: ExitStack, staged: dict[tuple[int, str], StagedFile], key: int
    ) -> tuple[WrittenFile, list[int]]:
        """Write the list of what became no document; rows are counted from the beginning of each source now."""
        file = stack.enter_context(HashedFile(Path(f"{self._prefixes[key]}.skipped.jsonl"), self._work.path))
        staged[key, "skipped.jsonl"] = file
        rows = [0] * len(self._plan["sources"])
        for shard, record in enumerate(self._records):
            parts = self._plan["shards"][shard]
            before = []
            for (source, _, _), num_rows in zip(parts, record.rows, strict=True):
                before.append(rows[source])
                rows[source] += num_rows
            if "skip" not in record.keys[key].files:
                continue
            path, lines = self._work.file(shard, key, "skip"), []
            if not path.exists() or hash_file(path) != record.keys[key].files["skip"].sha256:
                self._work.forget(shard)
                raise InputError(f"{path} is damaged; give the command of preprocess_data.py again")
            with path.open("rb") as listed:
                for line in listed:
                    number, row, why = json.loads(line)
                    entry = {"source": parts[number][0], "row": before[number] + row, "why": why}
                    lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
                    if len(lines) == 10_000:
                        file.write("".join(lines).encode("utf-8", errors="backslashreplace"))
                        lines = []
            file.write("".join(lines).encode("utf-8", errors="backslashreplace"))
        return file.close(), rows

    def _write_punkt(
        self, stack: ExitStack, staged: dict[tuple[int, str], StagedFile], key: int, prefix: str
    ) -> WrittenFile:
        file = stack.enter_context(HashedFile(Path(f"{prefix}.punkt.json"), self._work.path))
        staged[key, "punkt.json"] = file
        file.write(self._plan["punkt"].encode("utf-8"))
        return file.close()

    def _describe(self, key: int, rows: list[int], files: dict[str, WrittenFile]) -> Manifest:
        plan, keys = self._plan, [record.keys[key] for record in self._records]
        documents = [0] * len(plan["sources"])
        for parts, found in zip(plan["shards"], keys, strict=True):
            for (source, _, _), count in zip(parts, found.documents, strict=True):
                documents[source] += count
        backends = sorted({record.backend for record in self._records})
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return Manifest(
            direction=Direction(plan["direction"]),
            append_eod=plan["append_eod"],
            tokenizer=TokenizerRecord(**described_tokenizer(plan, self._fingerprint), backend=" ".join(backends)),
            counts=Counts(
                documents=sum(documents),
                tokens=sum(k.tokens for k in keys),
                text_bytes=sum(k.text_bytes for k in keys),
                empty_documents=sum(k.empty_documents for k in keys),
                eod_in_text=sum(k.eod_in_text for k in keys),
                bad_records=sum(record.bad for record in self._records),
            ),
            dtype=plan["dtype"],
            files={suffix: files[suffix] for suffix in ("bin", "idx")},
            sidecars={suffix: files[suffix] for suffix in sorted(set(files) - {"bin", "idx"})},
            sources=[
                SourceRecord(path=s["path"], bytes=s["bytes"], documents=count, rows=num_rows, format=s["format"])
                for s, count, num_rows in zip(plan["sources"], documents, rows, strict=True)
            ],
            json_key=plan["json_keys"][key],
            created_utc=self._work.created_utc(now),
            megatron_ledom_version=__version__,
            reverse_unit=plan["reverse_unit"],
            pairs=None if plan.get("pairs") is None else PairRecord(**plan["pairs"]),
            format_version=PLAIN_VERSION if plan.get("pairs") is None else FORMAT_VERSION,
        )
