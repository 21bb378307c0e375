"""Whether a checkpoint's files are those that were saved: sizes and SHA-256 of each, written beside them.

    iter_0000020/checksums.json   {"format_version": 1, "files": {"__0_0.distcp": {"bytes": ..., "sha256": "..."}, ...},
                                   "files_sha256": "..."}

The list holds every file of the folder but itself; `files_sha256` is that of its own entries. It finds what
storage and copying do to files, not what somebody does on purpose: who can change a file can change its hash. A
folder without a list (saved elsewhere, or by an early version) is not refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ledom.errors import CheckpointError
from megatron_ledom.files import HashingFile, hash_file, sync_folder
from megatron_ledom.log import Progress

LIST_NAME = "checksums.json"
FORMAT_VERSION = 1
_PARTIAL = f".{LIST_NAME}."
"""How the name of an unfinished list begins."""
_QUIET_BYTES = 2**30
"""Below this a progress line would be gone before it is read."""


def write_checksums(
    folder: Path, known: Mapping[str, str] | None = None, *, sync: bool = False, num_threads: int = 1
) -> None:
    """Write the list of `folder`'s files.

    Args:
        folder: a finished step folder.
        known: SHA-256 in hexadecimal by file name, of files that were hashed while they were written.
        sync: force each file to disk as well.
        num_threads: files that are read at a time.

    Raises:
        CheckpointError: a file vanished meanwhile or cannot be read.
        OutputError: the list cannot be written.
    """
    known = known or {}
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not _is_list(path.name))
    progress = _progress("hash", [path for path in paths if path.name not in known])

    def describe(path: Path) -> dict[str, Any]:
        try:
            sha256 = known.get(path.name) or hash_file(path, on_read=_counted(progress), sync=sync)
            return {"bytes": path.stat().st_size, "sha256": sha256}
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read for its checksum: {error}") from error

    with ThreadPoolExecutor(num_threads, thread_name_prefix="hash") as threads:
        files = dict(zip((path.name for path in paths), threads.map(describe, paths), strict=True))
    if progress:
        progress.close()
    temporary = folder / f"{_PARTIAL}{os.getpid()}.partial"
    temporary.unlink(missing_ok=True)
    file = HashingFile(temporary)
    try:
        content = {"format_version": FORMAT_VERSION, "files": files, "files_sha256": _sha256_of(files)}
        file.write(json.dumps(content, indent=1).encode())
        file.finish()
        temporary.replace(folder / LIST_NAME)
    finally:
        file.abandon()
        temporary.unlink(missing_ok=True)
    sync_folder(folder)


def read_checksums(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return file name to `bytes` and `sha256`; None where the folder has no list.

    Raises:
        CheckpointError: the list is damaged, of a later version, or names a file outside the folder.
    """
    path = folder / LIST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, files = content["format_version"], content["files"]
        own_sha256 = content.get("files_sha256")
        entries: dict[str, dict[str, Any]] = {
            name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in files.items()
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version!r}, this version of megatron_ledom reads {FORMAT_VERSION}")
    if own_sha256 is not None and own_sha256 != _sha256_of(entries):
        raise CheckpointError(f"{path} is damaged: its entries are not those that were written")
    outside = [name for name in entries if Path(name).name != name or name in {"", ".", ".."}]
    if outside:
        raise CheckpointError(f"{path} is refused: it names {outside[0]!r}, outside the folder")
    return entries


def _sha256_of(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def find_faults(
    folder: Path, *, is_over: threading.Event | None = None, share: tuple[int, int] = (0, 1)
) -> list[str] | None:
    """Compare every file with the list.

    Args:
        folder: a finished step folder.
        is_over: set by another thread that does not want the answer any more; then no progress is shown.
        share: (i, n): read only every n-th file, from the i-th on, the large ones first; i of 0 looks at names too.

    Returns:
        What is wrong, one line a file ([]: nothing); None where the folder has no list.
    """
    entries = read_checksums(folder)
    if entries is None:
        return None
    largest_first = sorted(entries, key=lambda name: (-entries[name]["bytes"], name))
    mine = sorted(largest_first[share[0] :: share[1]])
    progress = None
    if is_over is None:
        progress = _progress("verify", [folder / name for name in mine if (folder / name).is_file()])
    on_read = _counted(progress) if is_over is None else _unless(is_over)
    faults = [fault for name in mine if (fault := _fault(folder / name, entries[name], on_read))]
    if progress:
        progress.close()
    if share[0]:
        return faults
    added = sorted(p.name for p in folder.glob("*.distcp") if p.name not in entries)
    return faults + [f"{folder / name} was not there when the checkpoint was saved" for name in added]


def _fault(path: Path, entry: dict[str, Any], on_read: Callable[[int], None] | None) -> str | None:
    try:
        if not path.is_file():
            return f"{path} is missing"
        num_bytes = path.stat().st_size
        if num_bytes != entry["bytes"]:
            return f"{path} has {num_bytes:,} bytes, it was saved with {entry['bytes']:,}"
        found = hash_file(path, on_read=on_read)
    except OSError as error:
        return f"{path} cannot be read ({error})"
    if found != entry["sha256"]:
        return f"{path} has changed since it was saved: its SHA-256 is {found[:12]}..., was {entry['sha256'][:12]}..."
    return None


def verify_checksums(folder: Path) -> bool:
    """Refuse a checkpoint whose files are not those that were saved.

    Returns:
        Whether there was a list to compare with.

    Raises:
        CheckpointError: naming every file that differs.
    """
    return _refuse(folder, find_faults(folder))


@contextmanager
def verifying_checksums(folder: Path) -> Iterator[Callable[[], bool]]:
    """Do what `verify_checksums` does in a thread while the block runs.

    Hashing takes as long as converting; on the same files at the same time it costs a core and no second reading.

    Yields:
        A function to call before the block's work counts: it waits, and returns or raises as `verify_checksums` does.
    """
    is_over = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as thread:
        faults = thread.submit(find_faults, folder, is_over=is_over)
        try:
            yield lambda: _refuse(folder, faults.result())
        finally:
            is_over.set()


def _refuse(folder: Path, faults: list[str] | None) -> bool:
    if faults:
        raise CheckpointError(
            f"{folder} is damaged: {'; '.join(faults)}. Copy it again from where it was saved, or take an earlier step"
        )
    return faults is not None


def _is_list(name: str) -> bool:
    """Whether it is the list, or what a killed process left of one: neither is a file of the checkpoint."""
    return name == LIST_NAME or name.startswith(_PARTIAL)


def _progress(label: str, paths: list[Path]) -> Progress | None:
    num_bytes = sum(path.stat().st_size for path in paths)
    return Progress(label, num_bytes / 1e6, "MB") if num_bytes >= _QUIET_BYTES else None


def _counted(progress: Progress | None) -> Callable[[int], None] | None:
    return None if progress is None else lambda num_bytes: progress.update(num_bytes / 1e6)


def _unless(is_over: threading.Event) -> Callable[[int], None]:
    def check(num_bytes: int) -> None:
        if is_over.is_set():
            raise CancelledError

    return check
