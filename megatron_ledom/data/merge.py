"""Finished shards to a dataset: joined by several processes, hashed, and given its names.

Every shard's place in the final files follows from the sizes in the records of those before it, so
workers copy shards to their places in any order, comparing each with its hash on the way, while others
hash the whole files by reading the shards in order. Only what was skipped is written in one piece.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ledom import __version__
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
    load_manifest,
    manifest_hash,
    manifest_path,
    stage_manifest,
)
from megatron_ledom.data.shards import KeyRecord, ShardRecord, WorkFolder
from megatron_ledom.data.workers import Report, run_parallel
from megatron_ledom.direction import Direction
from megatron_ledom.errors import InputError, OutputExistsError
from megatron_ledom.files import hash_file
from megatron_ledom.log import Progress

_BLOCK_BYTES = 4 << 20
_PARTS = {
    "bin": "bin",
    "crc": "crc32",
    "sent": "sentences",
    "pair": "pairs",
}  # files of a shard that are joined as they are
_SUFFIXES = (".bin", ".idx", ".crc32", ".skipped.jsonl", ".sentences", ".pairs", ".punkt.json", ".manifest.json")


def dataset_prefixes(output_prefix: str, json_keys: Sequence[str]) -> list[str]:
    """The datasets of a run, in the order of the keys; Megatron's names."""
    return [f"{output_prefix}_{key}_document" for key in json_keys]


def check_not_there(prefixes: Sequence[str]) -> None:
    """Raise OutputExistsError where a file of one of the datasets is there."""
    existing = [path for prefix in prefixes for s in _SUFFIXES if Path(path := f"{prefix}{s}").exists()]
    if existing:
        raise OutputExistsError(f"{existing[0]} exists; choose another --output-prefix or pass --overwrite")


def finish_publishing(work: WorkFolder, prefixes: Sequence[str]) -> list[Manifest] | None:
    """Return the manifests, and clear up, where a killed run had published everything; None elsewhere."""
    work.sweep()
    if not work.is_publishing or not all(manifest_path(prefix).exists() for prefix in prefixes):
        return None
    manifests = [load_manifest(prefix) for prefix in prefixes]
    if [manifest_hash(manifest) for manifest in manifests] != work.publishing_hashes():
        return None  # those of an older dataset, which was to be replaced
    work.remove()
    return manifests


def merge_shards(output_prefix: str, *, workers: int, overwrite: bool, trusted: Collection[int] = ()) -> list[Manifest]:
    """Join the finished shards in `PREFIX.shards/`, publish the datasets and remove the folder.

    Args:
        output_prefix: as for preprocessing.
        workers: processes that copy and hash.
        overwrite: replace datasets of the same name.
        trusted: shards that this run has just made, so that they need not be compared with their hashes.

    Returns:
        The manifests, in the order of the keys.

    Raises:
        InputError: there is no such folder, a shard is unfinished or damaged, too many records
            are bad, or a key has no text at all.
        OutputError: the file system takes no more.
        OutputExistsError: a dataset of that name is there, or another process is joining.
    """
    work = WorkFolder(output_prefix)
    plan = work.plan()
    if plan is None:
        raise InputError(f"{work.path} is not there: nothing to join. Has preprocess_data.py run with this prefix?")
    prefixes = dataset_prefixes(output_prefix, plan["json_keys"])
    with work.lock("merge", wait=True) as is_there:
        done = finish_publishing(work, prefixes)
        if done is not None:
            return done
        if not is_there:  # another process has joined them while this one waited
            return [load_manifest(prefix) for prefix in prefixes]
        if not overwrite and not work.is_publishing:
            check_not_there(prefixes)
        return _Merge(work, plan, prefixes, workers, trusted).run()


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
        for suffix, found in item.record.files.items():
            if suffix in _PARTS:
                self._copy(item, suffix, found, starts[suffix], report)
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
        path, expected = self.work.file(item.shard, item.key, suffix), item.record.files[suffix]
        data = path.read_bytes() if path.exists() else b""
        self._check(item.shard, path, WrittenFile(len(data), hashlib.sha256(data).hexdigest()), expected)
        return data

    def _copy(self, item: _Place, suffix: str, expected: WrittenFile, offset: int, report: Report) -> None:
        path, target = self.work.file(item.shard, item.key, suffix), self.partials[item.key, _PARTS[suffix]]
        digest, start = hashlib.sha256(), offset
        if not path.exists():
            self._check(item.shard, path, WrittenFile(0, ""), expected)
        with path.open("rb", buffering=0) as source, target.open("r+b", buffering=0) as file:
            if item.shard in self.trusted and copy_at(source.fileno(), file.fileno(), offset, expected.bytes):
                os.posix_fadvise(file.fileno(), start, expected.bytes, os.POSIX_FADV_DONTNEED)
                report(expected.bytes)
                return
            while data := source.read(_BLOCK_BYTES):
                digest.update(data)
                try:
                    offset = write_at(file.fileno(), data, offset)
                except OSError as error:
                    raise write_refusal(target, offset, error) from error
                report(len(data))
            # lets the disk begin now; publishing waits for it
            os.posix_fadvise(file.fileno(), start, offset - start, os.POSIX_FADV_DONTNEED)
        self._check(item.shard, path, WrittenFile(offset - start, digest.hexdigest()), expected)

    def _check(self, shard: int, path: Path, found: WrittenFile, expected: WrittenFile) -> None:
        if found != expected:
            self.work.forget(shard)
            raise InputError(
                f"{path} is damaged ({found.bytes:,} bytes, {expected.bytes:,} expected, or another hash). The shard "
                "was thrown away: give the command of preprocess_data.py again, which makes it anew"
            )


class _Merge:
    def __init__(
        self, work: WorkFolder, plan: dict[str, Any], prefixes: list[str], workers: int, trusted: Collection[int]
    ) -> None:
        self._work, self._plan, self._prefixes, self._workers = work, plan, prefixes, workers
        self._trusted = frozenset(trusted)
        self._dtype = np.dtype(plan["dtype"])
        self._records = self._load_records()

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
                stack.enter_context(stage_manifest(manifest, prefix))
                for prefix, manifest in zip(self._prefixes, manifests, strict=True)
            ]
            self._work.mark_publishing([manifest_hash(manifest) for manifest in manifests])
            for key, manifest_file in enumerate(staged_manifests):
                for suffix in (".manifest.json", *_SUFFIXES):  # new data never stands beside an old manifest
                    if suffix == ".manifest.json" or (key, suffix[1:]) not in staged:
                        Path(f"{self._prefixes[key]}{suffix}").unlink(missing_ok=True)
                for (owner, _), file in staged.items():
                    if owner == key:
                        file.publish()
                manifest_file.publish()
            progress.close()
        self._work.remove()
        return manifests

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
                self._work.remove()
                raise InputError(f"the corpus is empty: no text under the key {name!r} in {inputs}")

    def _stage(self, stack: ExitStack) -> dict[tuple[int, str], StagedFile]:
        """Make the final files under their temporary names, at their final sizes."""
        staged: dict[tuple[int, str], StagedFile] = {}
        for key, prefix in enumerate(self._prefixes):
            keys = [record.keys[key] for record in self._records]
            for suffix in keys[0].files:
                if suffix in _PARTS:
                    file = stack.enter_context(StagedFile(Path(f"{prefix}.{_PARTS[suffix]}")))
                    file.reserve(sum(k.files[suffix].bytes for k in keys))
                    staged[key, _PARTS[suffix]] = file
            count = sum(sum(k.documents) for k in keys)
            file = stack.enter_context(StagedFile(Path(f"{prefix}.idx")))
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
        items = [*indexes]
        for item, written in run_parallel(task, items, self._workers, on_report=on_report, doing="files were hashed"):
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
        file = stack.enter_context(HashedFile(Path(f"{self._prefixes[key]}.skipped.jsonl")))
        staged[key, "skipped.jsonl"] = file
        rows = [0] * len(self._plan["sources"])
        for shard, record in enumerate(self._records):
            parts = self._plan["shards"][shard]
            before = []
            for (source, _, _), num_rows in zip(parts, record.rows, strict=True):
                before.append(rows[source])
                rows[source] += num_rows
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
        file = stack.enter_context(HashedFile(Path(f"{prefix}.punkt.json")))
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
        return Manifest(
            direction=Direction(plan["direction"]),
            append_eod=plan["append_eod"],
            tokenizer=TokenizerRecord(**plan["tokenizer"], backend=" ".join(backends)),
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
            created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            megatron_ledom_version=__version__,
            reverse_unit=plan["reverse_unit"],
            pairs=None if plan.get("pairs") is None else PairRecord(**plan["pairs"]),
            format_version=PLAIN_VERSION if plan.get("pairs") is None else FORMAT_VERSION,
        )
