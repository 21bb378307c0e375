"""The folder of unfinished work: what is to be done, what is done, and who is doing what.

    PREFIX.shards/
        plan.json               what is made of which files; another plan is refused
        000007.lock             held by the process that makes shard 7
        000007.0.bin .len .crc (.skip .sent .pair)     shard 7 of the first key; see `encode.py`
        000007.json             its sizes, hashes and counts; gets its name last: the shard is finished
        *.HOST-PID.*.partial    the final files while they are joined
        fingerprint             of the tokenizer: what the manifests say of it; made while the shards are
        created                 the time that the manifests name: that of the first process that joined
        publishing              the final files are being given their names; holds the hashes of their manifests

Every name is given by a rename, so that a kill at any moment leaves a shard either finished or not begun.
Several processes and nodes may share the folder. A record names the plan that it was made for, and a process that
finds another plan in its folder stops: `--overwrite` may start over while workers of the earlier command live.
Shards are not forced to disk: the hashes in their records are compared when they are joined, and one that a power
failure has emptied is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ledom.data.files import WrittenFile, is_of_dead_process, process_mark, write_refusal
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
    """A finished shard: the plan, rows per slice, bad records passed over, the library that tokenised, its keys."""

    plan_sha256: str
    rows: list[int]
    bad: int
    backend: str
    keys: list[KeyRecord]

    @classmethod
    def from_json(cls, text: str) -> ShardRecord:
        """Read what `WorkFolder.finish` wrote; KeyError for a record of a version that named no plan."""
        value = json.loads(text)
        keys = [
            KeyRecord(**{**k, "files": {s: WrittenFile(**f) for s, f in k["files"].items()}}) for k in value["keys"]
        ]
        return cls(value["plan_sha256"], rows=value["rows"], bad=value["bad"], backend=value["backend"], keys=keys)


def plan_hash(plan: dict[str, Any]) -> str:
    """Return the SHA-256 of what decides the bytes of a plan's shards."""
    kept = {name: value for name, value in plan.items() if name not in CHANGEABLE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode("ascii")).hexdigest()


class WorkFolder:
    """`PREFIX.shards/`.

    Attributes:
        path: the folder.
        adopted: the plan that this process works on, once `open` or `adopt` was called.
        plan_sha256: its hash.
    """

    def __init__(self, prefix: str) -> None:
        self.path = Path(f"{prefix}.shards")
        self.adopted: dict[str, Any] = {}
        self.plan_sha256 = ""
        self._seen: tuple[int, ...] | None = None

    def adopt(self, plan: dict[str, Any]) -> None:
        """Work on this plan from now on."""
        self.adopted, self.plan_sha256, self._seen = plan, plan_hash(plan), None

    def check_plan(self) -> None:
        """Assure that the folder is there and still of the plan that this process works on.

        Raises:
            InputError: it is gone.
            OutputExistsError: it is of another plan now.
        """
        try:
            stat = (self.path / "plan.json").stat()
        except FileNotFoundError:
            raise InputError(
                f"{self.path} vanished while this process worked in it: another process that shared it has failed or "
                "finished, or somebody removed it. See what the others say, then give the command again"
            ) from None
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen == self._seen:  # a plan of many files takes a while to read
            return
        found = self.plan()
        if found is None or plan_hash(found) != self.plan_sha256:
            raise OutputExistsError(
                f"{self.path} was begun anew for another command while this one worked in it; nothing of this one goes "
                "there any more. Stop the one that is not wanted, or give each its own --output-prefix"
            )
        self._seen = seen

    def open(self, plan: dict[str, Any], *, start_over: bool, is_share: bool = False) -> None:
        """Make the folder for `plan`, or go on in one that was made for the same plan.

        Args:
            plan: what is to be made.
            start_over: remove what was made for another plan.
            is_share: this process does a share of the work, and others the other shares: it never starts over.

        Raises:
            OutputExistsError: it was made for another plan, and `start_over` is not set.
            OutputError: it cannot be made.
        """
        self.adopt(plan)
        text = json.dumps(plan, indent=1)
        found, asked = self.plan(), json.loads(text)
        differing = [] if found is None else [name for name in asked if found.get(name) != asked[name]]
        if differing and set(differing) <= CHANGEABLE:
            self._replace("plan.json", text)
        elif differing:
            if is_share or not start_over:
                raise self._refusal(differing, is_share)
            self.remove()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_first("plan.json", text)
        except OSError as error:
            if not (self.path / "plan.json").exists():
                shutil.rmtree(self.path, ignore_errors=True)
            raise OutputError(f"cannot write {self.path}: {error.strerror}; choose another --output-prefix") from error
        if self.plan() != asked:
            raise OutputExistsError(f"{self.path} was made for another command at this moment; see its plan.json")

    def _refusal(self, differing: list[str], is_share: bool) -> OutputExistsError:
        start_over = "pass --overwrite to start over"
        if is_share:
            start_over = (
                f"remove {self.path} to start over (--overwrite does not, as other shares may be at work there)"
            )
        done = ""
        if self.is_publishing:
            done = ", killed while it gave the finished datasets their names, or just after"
        return OutputExistsError(
            f"{self.path} holds unfinished work of another command ({', '.join(differing)} differ){done}. Give that "
            f"command again to {'end it' if done else 'go on'}, {start_over}, or choose another --output-prefix"
        )

    def _write_first(self, name: str, text: str) -> None:
        """Write a file of the folder unless another process was first."""
        temporary = self.temporary(self.path / name)
        temporary.write_text(text, encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(temporary, self.path / name)
        temporary.unlink()

    def created_utc(self, now: str) -> str:
        """Return the time that the manifests name, `now` where no process has joined before.

        Without it two processes that join at once would write manifests that differ.
        """
        self._write_first("created", now)
        return (self.path / "created").read_text(encoding="utf-8") or now  # a power failure may empty it

    def note_fingerprint(self, fingerprint: str) -> None:
        """Keep the fingerprint of the tokenizer that the shards were made with.

        Raises:
            InputError: the folder is gone.
            OutputError: it takes no file.
            OutputExistsError: another process has made shards of this plan with a tokenizer that is not the same.
        """
        try:
            self._write_first("fingerprint", fingerprint)
            found = self.fingerprint()
            if not found:  # a power failure has emptied it
                self._replace("fingerprint", fingerprint)
        except OSError as error:
            self.check_plan()
            raise write_refusal(self.path / "fingerprint", 0, error) from error
        if found and found != fingerprint:
            raise OutputExistsError(
                f"{self.path} holds shards of a tokenizer {found}, which was read from the same files as that of this "
                f"process, {fingerprint}: do all nodes have one version of the tokenizer's library? Remove {self.path} "
                "to start over"
            )

    def fingerprint(self) -> str | None:
        """Return what `note_fingerprint` was told; None before, empty where a power failure has emptied it."""
        try:
            return (self.path / "fingerprint").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _replace(self, name: str, text: str) -> None:
        path = self.path / name
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
            except OSError:  # a file system without locks: two may do the same, each under names of its own
                pass
            yield (self.path / "plan.json").exists()

    def file(self, shard: int, key: int, suffix: str) -> Path:
        """Return where a file of a finished shard lies."""
        return self.path / f"{shard:06d}.{key}.{suffix}"

    def temporary(self, path: Path) -> Path:
        """Return a name that is this process's alone."""
        return path.with_name(f"{path.name}.{process_mark()}.tmp")

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
            self.check_plan()
            raise write_refusal(path, 0, error) from error

    def record(self, shard: int) -> ShardRecord | None:
        """Return the record of a finished shard; None where there is none, or it was cut off or is of another plan."""
        try:
            record = ShardRecord.from_json((self.path / f"{shard:06d}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None
        return record if record.plan_sha256 == self.plan_sha256 else None

    def is_finished(self, shard: int) -> bool:
        """Whether the shard needs no work."""
        return self.record(shard) is not None

    def num_finished(self) -> int:
        """Count the finished shards."""
        return sum(map(self.is_finished, range(len(self.adopted["shards"]))))

    def is_shared(self) -> bool:
        """Whether another process is seen at work: it holds the lock of a shard, or has a temporary file.

        Only true is certain; the latter shows other nodes where the file system has no locks.
        """
        for shard in range(len(self.adopted["shards"])):
            if (self.path / f"{shard:06d}.lock").exists():
                with self.lock(f"{shard:06d}", wait=False) as is_free:
                    if not is_free:
                        return True
        ours = f".{process_mark()}."
        names = [p.name for pattern in ("*.tmp", "*.partial") for p in self.path.glob(pattern)]
        return any(ours not in name and not is_of_dead_process(name) for name in names)

    def sweep_partials(self) -> None:
        """Remove the final files that processes of this node left half written when they were killed."""
        for path in self.path.glob("*.partial"):
            if is_of_dead_process(path.name):
                path.unlink(missing_ok=True)

    def forget(self, shard: int) -> None:
        """Let a shard be made again."""
        (self.path / f"{shard:06d}.json").unlink(missing_ok=True)

    def mark_publishing(self, manifest_hashes: list[str]) -> None:
        """Say that final files of this plan may stand under their names from now on, and which are the new ones."""
        self._replace("publishing", json.dumps(manifest_hashes))

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
