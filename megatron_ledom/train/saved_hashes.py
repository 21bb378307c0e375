"""The checksums of what a run saves, written while it trains on.

Megatron names a save in its tracker file when all ranks have finished it, with
`--async-save` too. A thread of rank 0 looks at that file every few seconds and writes
`checksums.json` into the folder that it names: training does not wait, no collective is
added and nothing of Megatron is patched. What is listed is what lies on the shared file
system a moment after the save; `checkpoint.integrity` says what that finds.

    tracker: 4 ......... 8 .................... end of the run
    thread:     hash 4 ....  hash 8 ...........  last look, joined
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from megatron_ledom.checkpoint.integrity import LIST_NAME, write_checksums
from megatron_ledom.checkpoint.locate import TRACKER, finished_steps
from megatron_ledom.errors import CheckpointError, OutputError
from megatron_ledom.log import get_logger

_EVERY_S = 2.0


class SavedHashes:
    """Writes checksums of every save while its block runs; the last ones before it is left.

    Args:
        save: Megatron's `--save` folder, which need not exist yet; None: there is nothing to do.
        start: the iteration that the run goes on from. Later steps in `save` will be written
            again, so their lists, which would then be wrong, are removed first.
        every_s: how often the tracker is looked at.
    """

    def __init__(self, save: Path | None, start: int, *, every_s: float = _EVERY_S) -> None:
        self._save, self._start, self._every_s = save, start, every_s
        self._done: set[int] = set()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="checksums", daemon=True)

    def __enter__(self) -> SavedHashes:
        if self._save is not None:
            for step in self._steps():
                if step > self._start:
                    (self._save / f"iter_{step:07d}" / LIST_NAME).unlink(missing_ok=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        has_ended_well = kind is None or issubclass(kind, SystemExit)  # Megatron leaves early by sys.exit
        if self._save is not None and has_ended_well:
            self._thread.join()

    def _watch(self) -> None:
        seen = self._tracker()
        while not self._is_over.wait(self._every_s):
            seen = self._look(seen)
        self._look(seen)

    def _look(self, seen: tuple[int, int] | None) -> tuple[int, int] | None:
        """Hash what was saved since the tracker was as `seen`; return what it is now."""
        tracker = self._tracker()
        if tracker is None or tracker == seen:
            return seen
        for step in self._steps():
            if self._start < step <= tracker[0] and step not in self._done:
                self._hash(step)
                self._done.add(step)
        return tracker

    def _hash(self, step: int) -> None:
        assert self._save is not None
        folder = self._save / f"iter_{step:07d}"
        try:
            write_checksums(folder)
        except (CheckpointError, OutputError, OSError) as error:  # removed to make room, or a disk that is full
            get_logger(__name__).warning("%s has no checksums: %s", folder, error)

    def _steps(self) -> list[int]:
        assert self._save is not None
        try:
            return finished_steps(self._save)
        except OSError:  # not made yet
            return []

    def _tracker(self) -> tuple[int, int] | None:
        """The iteration that the tracker names, and when it was written: a step may be saved again."""
        assert self._save is not None
        path = self._save / TRACKER
        try:
            written_ns, word = path.stat().st_mtime_ns, path.read_text(encoding="utf-8").strip()
        except OSError:
            return None
        return (int(word), written_ns) if word.isascii() and word.isdigit() else None
