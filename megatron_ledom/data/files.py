"""Files that appear whole or not at all: written under a temporary name, hashed on the way, renamed last."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_ledom.errors import OutputError, OutputExistsError


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and "sha256" in hex of a finished file."""

    bytes: int
    sha256: str


class HashedFile:
    """A file under a temporary name that is hashed while it is written, and renamed when it is whole.

    The temporary name is `NAME.partial`, locked, so that what a killed run left behind is
    reused and two runs cannot write the same output. A context manager: what was not
    published is removed on leaving.

    Raises:
        OutputExistsError: another process is writing it.
        OutputError: the file system refuses (no space left, no permission, a size limit).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.num_bytes = 0
        self._hash = hashlib.sha256()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("ab")
        except OSError as error:
            raise self._refusal(error) from error
        if not self._lock():
            self._file.close()
            raise OutputExistsError(f"another process is writing {self.partial}; wait for it or stop it")
        self._file.truncate(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        # the other process may have published the file after it was opened here
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.partial.stat())
        except FileNotFoundError:
            return False

    def write(self, data: bytes) -> None:
        """Append `data`."""
        try:
            self._file.write(data)
        except OSError as error:
            raise self._refusal(error) from error
        self._hash.update(data)
        self.num_bytes += len(data)

    def close(self) -> WrittenFile:
        """Force the bytes to disk and return their size and hash; the file still has its temporary name."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refusal(error) from error
        return WrittenFile(self.num_bytes, self._hash.hexdigest())

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

    def _refusal(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self.path} ({self.num_bytes:,} bytes written): {error.strerror}; nothing new "
            "stands under that name. Make room or choose another --output-prefix"
        )
