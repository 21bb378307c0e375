"""The folder of unfinished work: what is to be done, what is done, and who is doing what.

    PREFIX.shards/
        plan.json               what is made of which files; another plan is refused
        000007.lock             held by the process that makes shard 7
        000007.0.bin .len .crc .skip (.sent)     shard 7 of the first key
        000007.json             its sizes, hashes and counts; gets its name last: the shard is finished
        publishing              the final files are being given their names; holds the hashes of their manifests

Every name is given by a rename, so that a kill at any moment leaves a shard either finished or not begun.
Several processes and nodes may share the folder. Shards are not forced to disk: the hashes in
their records are compared when they are joined, and one that a power failure has emptied is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ledom.data.files import WrittenFile, write_refusal
from megatron_ledom.errors import InputError, OutputError, OutputExistsError

CHANGEABLE = {"max_bad_records"}  # parts of a plan that change no finished shard


@dataclass
class KeyRecord:
    """One key of a finished shard: documents per slice, counts, and its files."""

    documents: list[int]
    tokens: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    eod_in_text: int = 0
    files: dict[str, WrittenFile] = field(default_factory=dict)


@dataclass
class ShardRecord:
    """A finished shard: rows per slice, bad records passed over, the library that tokenised, and its keys."""

    rows: list[int]
    bad: int
    backend: str
    keys: list[KeyRecord]

    @classmethod
    def from_json(cls, text: str) -> ShardRecord:
        """Read what `WorkFolder.finish` wrote."""
        value = json.loads(text)
        keys = [
            KeyRecord(**{**k, "files": {s: WrittenFile(**f) for s, f in k["files"].items()}}) for k in value["keys"]
        ]
        return cls(rows=value["rows"], bad=value["bad"], backend=value["backend"], keys=keys)


class WorkFolder:
    """`PREFIX.shards/`."""

    def __init__(self, prefix: str) -> None:
        self.path = Path(f"{prefix}.shards")

    def open(self, plan: dict[str, Any], *, start_over: bool) -> None:
        """Make the folder for `plan`, or go on in one that was made for the same plan.

        Raises:
            OutputExistsError: it was made for another plan, and `start_over` is not set.
            OutputError: it cannot be made.
        """
        text = json.dumps(plan, indent=1)
        found, asked = self.plan(), json.loads(text)
        differing = [] if found is None else [name for name in asked if found.get(name) != asked[name]]
        if differing and set(differing) <= CHANGEABLE:
            self._replace_plan(text)
        elif differing:
            if not start_over:
                raise OutputExistsError(
                    f"{self.path} holds unfinished work of another command ({', '.join(differing)} differ). Give that "
                    "command again to go on, pass --overwrite to start over, or choose another --output-prefix"
                )
            self.remove()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.path / f"plan.{_process_mark()}.tmp"
            temporary.write_text(text, encoding="utf-8")
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(temporary, self.path / "plan.json")
            temporary.unlink()
        except OSError as error:
            if not (self.path / "plan.json").exists():
                shutil.rmtree(self.path, ignore_errors=True)
            raise OutputError(f"cannot write {self.path}: {error.strerror}; choose another --output-prefix") from error
        if self.plan() != asked:
            raise OutputExistsError(f"{self.path} was made for another command at this moment; see its plan.json")

    def _replace_plan(self, text: str) -> None:
        path = self.path / "plan.json"
        self.temporary(path).write_text(text, encoding="utf-8")
        self.temporary(path).replace(path)

    def plan(self) -> dict[str, Any] | None:
        """Return the plan, or None where there is no folder."""
        try:
            found = json.loads((self.path / "plan.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path / 'plan.json'} cannot be read: {error}; remove {self.path}") from error
        return found if isinstance(found, dict) else {}

    @contextmanager
    def lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold `name.lock`; gives False where another process holds it (unless `wait`), or the folder is gone."""
        try:
            file = (self.path / f"{name}.lock").open("ab")
        except FileNotFoundError:
            yield False
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks: two may do one shard, and give the same bytes
                pass
            yield (self.path / "plan.json").exists()

    def file(self, shard: int, key: int, suffix: str) -> Path:
        """Return where a file of a finished shard lies."""
        return self.path / f"{shard:06d}.{key}.{suffix}"

    def temporary(self, path: Path) -> Path:
        """Return a name that is this process's alone."""
        return path.with_name(f"{path.name}.{_process_mark()}.tmp")

    def finish(self, shard: int, record: ShardRecord) -> None:
        """Give the files of a shard their names, and its record last."""
        path = self.path / f"{shard:06d}.json"
        try:
            for key, found in enumerate(record.keys):
                for suffix in found.files:
                    self.temporary(self.file(shard, key, suffix)).replace(self.file(shard, key, suffix))
            self.temporary(path).write_text(json.dumps(asdict(record)), encoding="utf-8")
            self.temporary(path).replace(path)
        except OSError as error:
            raise write_refusal(path, 0, error) from error

    def record(self, shard: int) -> ShardRecord | None:
        """Return the record of a finished shard; None where it is not finished, or its record was cut off."""
        try:
            return ShardRecord.from_json((self.path / f"{shard:06d}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None

    def is_finished(self, shard: int) -> bool:
        """Whether the shard needs no work."""
        return self.record(shard) is not None

    def num_finished(self) -> int:
        """Count the records."""
        return sum(1 for _ in self.path.glob("[0-9]*.json")) if self.path.is_dir() else 0

    def forget(self, shard: int) -> None:
        """Let a shard be made again."""
        (self.path / f"{shard:06d}.json").unlink(missing_ok=True)

    def mark_publishing(self, manifest_hashes: list[str]) -> None:
        """Say that final files of this plan may stand under their names from now on, and which are the new ones."""
        path = self.path / "publishing"
        self.temporary(path).write_text(json.dumps(manifest_hashes), encoding="utf-8")
        self.temporary(path).replace(path)

    def publishing_hashes(self) -> list[str]:
        """What `mark_publishing` was told."""
        return json.loads((self.path / "publishing").read_text(encoding="utf-8"))

    @property
    def is_publishing(self) -> bool:
        """Whether `mark_publishing` was called for this plan."""
        return (self.path / "publishing").exists()

    def remove(self) -> None:
        """Remove the folder: its name goes at once, what it held after that."""
        self.sweep()
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(self._removed)
        self.sweep()

    def sweep(self) -> None:
        """Remove what a kill during `remove` left."""
        shutil.rmtree(self._removed, ignore_errors=True)

    @property
    def _removed(self) -> Path:
        return self.path.with_name(f"{self.path.name}.removed")


def _process_mark() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


class Part:
    """A file of a shard, written under its temporary name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=1 << 16)
        self.num_bytes = 0

    def write(self, data: Any) -> None:
        """Append the bytes of a buffer."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.num_bytes += len(view)

    def close(self) -> WrittenFile:
        """Close it and return what it is; without a hash, as what vouches for a `.bin` are the CRCs in the `.crc`."""
        self._file.close()
        return WrittenFile(self.num_bytes, "")

    def discard(self) -> None:
        """Close and remove it."""
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)


class HashedPart(Part):
    """A file of a shard that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> None:
        """Append the bytes of a buffer."""
        super().write(data)
        self._hash.update(data)

    def close(self) -> WrittenFile:
        """Close it and return what it is."""
        return WrittenFile(super().close().bytes, self._hash.hexdigest())
