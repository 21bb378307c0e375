"""Files that appear whole or not at all: written under a temporary name, hashed on the way, renamed last.

`StagedFile` owns the temporary name and the renaming; `HashedFile` is written from front to
back by one process, `write_at` by several at once at places that they know. No two processes ever have
a temporary name in common, so that nothing here depends on a file system that locks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_ledom.errors import OutputError

_TEMPORARY = re.compile(r"\.(?P<host>[^./]+)-(?P<pid>\d+)\.(?:tmp|[0-9a-f]+\.partial)$")


def process_mark() -> str:
    """Return what tells this process from all others that may write beside it, on whatever node."""
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    return socket.gethostname().replace(".", "_")


def is_of_dead_process(name: str) -> bool:
    """Whether a temporary name was given by a process of this node that is no more; of other nodes nothing is known."""
    found = _TEMPORARY.search(name)
    if found is None or found["host"] != _host():
        return False
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is there, and another user's
        return False
    return False


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and "sha256" in hex of a finished file."""

    bytes: int
    sha256: str


class StagedFile:
    """A file under a temporary name, renamed when it is whole.

    The temporary name, `NAME.HOST-PID.RANDOM.partial`, is this object's alone: two processes that write the same
    output write two files, and whichever is renamed last stands whole. A context manager: what was
    not published is removed on leaving.

    Args:
        path: the final name.
        folder: where the temporary file lies, on the same file system; beside `path` if not given.

    Raises:
        OutputError: the file system refuses (no space left, no permission, a size limit).
    """

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        self.path = path
        self.partial = (folder or path.parent) / f"{path.name}.{process_mark()}.{os.urandom(4).hex()}.partial"
        self.num_bytes = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("xb")
        except OSError as error:
            raise write_refusal(self.path, self.num_bytes, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def reserve(self, num_bytes: int) -> None:
        """Give the file its final size, for `write_at`."""
        try:
            self._file.truncate(num_bytes)
        except OSError as error:
            raise write_refusal(self.path, 0, error) from error
        self.num_bytes = num_bytes

    def check_size(self, num_bytes: int) -> None:
        """Assert that what was written elsewhere is as long as what was reserved."""
        assert num_bytes == self.num_bytes, (self.path, num_bytes, self.num_bytes)

    def sync(self) -> None:
        """Force the bytes to disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_refusal(self.path, self.num_bytes, error) from error

    def publish(self) -> None:
        """Give the file its final name."""
        self.partial.replace(self.path)
        self._file.close()

    def discard(self) -> None:
        """Remove the temporary file; nothing happens if it was published."""
        if not self._file.closed:
            self.partial.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what could not be flushed is not wanted any more
                self._file.close()


class HashedFile(StagedFile):
    """A staged file that one process writes from front to back, and that is hashed while it is written."""

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        super().__init__(path, folder)
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> None:
        """Append the bytes of a buffer."""
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            raise write_refusal(self.path, self.num_bytes, error) from error
        self._hash.update(view)
        self.num_bytes += len(view)

    def close(self) -> WrittenFile:
        """Force the bytes to disk and return their size and hash; the file still has its temporary name."""
        self.sync()
        return WrittenFile(self.num_bytes, self._hash.hexdigest())


def write_at(descriptor: int, data: Any, offset: int) -> int:
    """Write all of a buffer at a place of an open file; return the place behind it."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    return offset


def copy_at(source: int, target: int, offset: int, num_bytes: int) -> bool:
    """Let the kernel copy the first `num_bytes` of an open file to a place of another; False where it cannot."""
    done = 0
    try:
        while done < num_bytes:
            copied = os.copy_file_range(source, target, num_bytes - done, done, offset + done)
            if copied == 0:
                return False
            done += copied
    except OSError:  # other file systems, or no room: writing the ordinary way works, or tells
        return False
    return True


def write_refusal(path: Path, num_bytes: int, error: OSError) -> OutputError:
    """What to raise where the file system takes no more of an output."""
    return OutputError(
        f"cannot write {path} ({num_bytes:,} bytes written): {error.strerror}; nothing new "
        "stands under that name. Make room or choose another --output-prefix"
    )
