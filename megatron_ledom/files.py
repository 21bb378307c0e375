"""Large input and output: read ahead, hashed while it is written, folders that get their name last.

It owns how bytes reach the disk and what is said when they cannot; what they mean is
everybody else's business.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ledom.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a file system says when it takes no more: no space, no quota, a limit on the size of a file."""
_BLOCK_BYTES = 8 * 2**20
_LARGE_BYTES = 2**20  # smaller buffers are copied for the thread that hashes
_SYNC_EVERY_BYTES = 2**27  # often enough that the disk never waits, and that little is left to do at the end


class HashingFile:
    """A new file whose SHA-256 is known when it is finished.

    Writing, hashing, and forcing to disk what was written before go on at the same time, in
    three threads, so that `finish` has little to wait for.

    Args:
        path: must not exist.

    Raises:
        OutputError: from every method, where the file system refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")  # in the order in which it is told
        self._hashing: deque[Future[None]] = deque()
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing: Future[None] | None = None
        self._unsynced_bytes = 0
        try:
            self._file = path.open("xb")
        except OSError as error:
            raise _refusal(path, 0, error) from error

    def write(self, data: Any, *, owner: Any = None) -> int:
        """Append a buffer; return its length in bytes.

        Args:
            data: any buffer.
            owner: keeps the memory of `data` as it is while somebody refers to it; then hashing may go on
                after the return, one large buffer behind. Without it the buffer is free on return.
        """
        view = memoryview(data).cast("B")
        is_large = view.nbytes >= _LARGE_BYTES
        hashing = self._hasher.submit(_update, self._hash, view if is_large else bytes(view), owner)
        try:
            self._file.write(view)
        except OSError as error:
            raise _refusal(self.path, self._file.tell(), error) from error
        finally:
            if is_large:
                self._hashing.append(hashing)
            while len(self._hashing) > (0 if owner is None else 1):
                self._hashing.popleft().result()
        self._unsynced_bytes += view.nbytes
        if self._unsynced_bytes >= _SYNC_EVERY_BYTES and (self._syncing is None or self._syncing.done()):
            self._wait_for_sync()
            self.flush()
            self._syncing, self._unsynced_bytes = self._syncer.submit(os.fdatasync, self._file.fileno()), 0
        return view.nbytes

    def tell(self) -> int:
        """The number of bytes written so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        try:
            self._file.flush()
        except OSError as error:
            raise _refusal(self.path, self._file.tell(), error) from error

    def finish(self) -> str:
        """Force the bytes to disk, close, and return the SHA-256 in hexadecimal."""
        self._wait_for_sync()
        self.flush()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _refusal(self.path, self._file.tell(), error) from error
        self.abandon()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._hasher.shutdown()
        self._syncer.shutdown()
        with contextlib.suppress(OSError):  # what could not be flushed is not wanted any more
            self._file.close()

    def _wait_for_sync(self) -> None:
        """Raise what the disk said of an earlier part: it says it once."""
        try:
            if self._syncing is not None:
                self._syncing.result()
        except OSError as error:
            raise _refusal(self.path, self._file.tell(), error) from error
        self._syncing = None


def _update(digest: Any, data: memoryview | bytes, owner: Any) -> None:
    """Hash `data`; `owner` is only held."""
    digest.update(data)


def one_ahead[T](source: Iterator[T]) -> Iterator[T]:
    """Yield what `source` yields, the next item being made in a thread while one is used: two exist at a time."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="one-ahead") as thread:
        pending: Future[Any] = thread.submit(next, source, end)
        while (item := pending.result()) is not end:
            pending = thread.submit(next, source, end)
            yield item


def hash_file(path: Path, *, on_read: Callable[[int], None] | None = None, sync: bool = False) -> str:
    """The SHA-256 of a file in hexadecimal; 8 MiB of it are in memory.

    Args:
        path: the file.
        on_read: told the number of bytes after each piece.
        sync: force the file to disk, too.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if on_read is not None:
                on_read(count)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_beside(target: Path, *, flag: str, needed_bytes: int, check_target: Callable[[], None]) -> Iterator[Path]:
    """Give an empty hidden folder beside `target`, which becomes `target` if the block succeeds and vanishes if not.

    Args:
        target: the final name; what stands there is replaced, if `check_target` lets it.
        flag: how the user named it, for messages.
        needed_bytes: refused at once if fewer are free.
        check_target: raises if `target` must not be replaced; called before and after the block.

    Raises:
        OutputError: the folder cannot be made there, or there is not enough space.
    """
    check_target()
    target = target.absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes:
            raise OutputError(f"{flag} {target}: {needed_bytes:,} bytes are needed there, {free:,} are free")
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"{flag} {target} cannot be made there: {error}") from error
    try:
        yield temporary
        check_target()
        replace_folder(temporary, target)
    except Exception as error:
        needed = f"{flag} {target}: {needed_bytes:,} bytes are needed there, {free:,} were free at the start"
        refusal = as_output_error(error, needed)
        if refusal is None:
            raise
        raise refusal from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_output_error(error: BaseException, needed: str) -> OutputError | None:
    """Find the file system's refusal behind `error`, which a library may have wrapped in another or in a traceback.

    Args:
        error: what was raised.
        needed: which output, and how much it needs; begins the message.

    Returns:
        None where the file system refused nothing.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OutputError):
            return seen if str(seen).startswith("--") else OutputError(f"{needed}; {seen}")
        if isinstance(seen, OSError) and seen.errno in FULL:
            return OutputError(f"{needed}; {seen}")
        seen = seen.__cause__ or seen.__context__
    return None


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; what stood there is kept until it has the name, and removed then."""
    if not target.exists():
        source.rename(target)
    else:
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    sync_folder(target.parent)


def _refusal(path: Path, num_bytes: int, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path.name} ({num_bytes:,} bytes written): {error.strerror or error}")
