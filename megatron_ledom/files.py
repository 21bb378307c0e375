"""Large input and output: read ahead, hashed while it is written, folders that get their name last.

It owns how bytes reach the disk and what is said when they cannot; what they mean is
everybody else's business.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ledom.errors import OutputError, OutputExistsError
from megatron_ledom.log import get_logger

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a file system says when it takes no more: no space, no quota, a limit on the size of a file."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_LOCK = "lock"
_MAX_HOLDER_BYTES = 200
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


def _sync_file(path: Path) -> None:
    """Force the bytes of a file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def place_beside(target: Path, *, flag: str, kind: str, check_target: Callable[[], None]) -> Iterator[Path]:
    """Hold the hidden folder `.NAME.partial` beside `target`, in which one process at a time makes what becomes it.

        .NAME.partial/      while it is made; the block decides what stays in it when it fails
          lock              held by the process that writes, which it names
        .NAME.old/          what stood under the name, while `replace_folder` gives the name to another

    No name holds a process's number: what a killed one left is found by the next, whatever number that one has (in
    a container it is often the same). Before the block runs, a target that a kill between the two renames left
    without its name has it again.

    Args:
        target: the final name; a link stands for what it points to.
        flag: how the user named it, for messages.
        kind: "export" or "import", for messages.
        check_target: raises if `target` must not be replaced; called before anything is made (later only where a
            kill left `.NAME.old`), and under the lock.

    Raises:
        OutputExistsError: another process holds the folder.
        OutputError: the folder cannot be made there.
    """
    target = target.resolve()
    if not _old_of(target).exists():
        check_target()
    place = target.with_name(f".{target.name}.partial")
    try:
        lock = _lock(place, f"{flag} {target}", kind)
    except OSError as error:
        raise OutputError(f"{flag} {target} cannot be made there: {error}") from error
    try:
        try:
            _restore_old(target)
            _check_with_old(target, check_target)
        except OSError as error:
            raise OutputError(f"{flag} {target} cannot be made there: {error}") from error
        yield place
    finally:
        with contextlib.suppress(OSError):  # something is kept in it, or a process has just taken it over
            (place / _LOCK).unlink()
            place.rmdir()
        os.close(lock)


@contextmanager
def folder_beside(
    target: Path, *, flag: str, kind: str, needed_bytes: int, check_target: Callable[[], None]
) -> Iterator[Path]:
    """Give an empty hidden folder beside `target`, which becomes `target` if the block succeeds and vanishes if not.

    A kill leaves it; the next process that makes `target` removes it.

    Args:
        target: the final name; what stands there is replaced, if `check_target` lets it.
        flag: see `place_beside`.
        kind: see `place_beside`.
        needed_bytes: refused at once if fewer are free.
        check_target: raises if `target` must not be replaced; called before and after the block.

    Raises:
        OutputExistsError: another process is making it.
        OutputError: the folder cannot be made there, or there is not enough space.
    """
    with place_beside(target, flag=flag, kind=kind, check_target=check_target) as place:
        target = target.resolve()
        temporary = place / target.name
        try:
            _remove_leftovers(place)
            free = shutil.disk_usage(place).free
            if free < needed_bytes:
                raise OutputError(f"{flag} {target}: {needed_bytes:,} bytes are needed there, {free:,} are free")
            temporary.mkdir()
        except OSError as error:
            raise OutputError(f"{flag} {target} cannot be made there: {error}") from error
        try:
            yield temporary
            check_target()
            for folder, _, names in temporary.walk(top_down=False):
                for name in names:
                    _sync_file(folder / name)
                sync_folder(folder)
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
    """Rename `source` to `target`; what stood there is kept until it has the name, and removed then.

    A failure of the second rename gives `target` back what it was; after a kill `place_beside` does.
    """
    if not target.exists():
        source.rename(target)
    else:
        old = _old_of(target)
        target.rename(old)
        try:
            source.rename(target)
        except BaseException:
            if not target.exists():
                old.rename(target)
            raise
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():  # the work is done: what stands in the way now is no reason to call it failed
            get_logger(__name__).warning("%s, which was replaced, cannot be removed: delete %s", target, old)
    sync_folder(target.parent)


def _lock(place: Path, what: str, kind: str) -> int:
    """Make `place` and hold its lock; return the descriptor that holds it."""
    while True:
        place.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the process that held it has just finished
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), (place / _LOCK).stat()):
                with contextlib.suppress(OSError):  # on a full disk: it is only said to others
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, _MAX_HOLDER_BYTES).decode("utf-8", "replace")
            os.close(descriptor)
            raise OutputExistsError(
                f"{what}: another {kind} is writing it now, in {place}{f' ({holder})' if holder else ''}"
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                get_logger(__name__).warning("%s cannot be locked: start no second %s of that name", place, kind)
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _restore_old(target: Path) -> None:
    """Give `target` back what a kill between the two renames of `replace_folder` took from it."""
    old = _old_of(target)
    is_taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if old.is_dir() and not is_taken:
        old.rename(target)  # over an empty folder, too
        sync_folder(target.parent)
        get_logger(__name__).warning("%s has its name back: a process was killed while it replaced it", target)


def _check_with_old(target: Path, check_target: Callable[[], None]) -> None:
    """Call `check_target`; what a kill after the second rename left goes if it agrees, and is named if it does not."""
    old = _old_of(target)
    try:
        check_target()
    except OutputExistsError:
        if old.is_dir():
            get_logger(__name__).warning("%s is left from the time before %s: delete it to have its space", old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(place: Path) -> None:
    """Remove what a killed process left in `place`, whose lock is held here."""
    left = [path for path in place.iterdir() if path.name != _LOCK]
    for path in left:
        path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
    if left:
        get_logger(__name__).warning("removed what a killed process left in %s", place)


def _old_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _refusal(path: Path, num_bytes: int, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path.name} ({num_bytes:,} bytes written): {error.strerror or error}")
