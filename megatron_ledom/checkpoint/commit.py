"""A save becomes a checkpoint: written under another name, hashed, renamed, and only then named by the tracker.

    .iter_0000020.TOKEN.partial/   Megatron's ranks write here; TOKEN is another one at each launch, so that what a
                             killed launch left running cannot write into the next one's
    checksums.json           every file is read back, hashed and forced to disk
    iter_0000020/            one rename: from here on the checkpoint exists
    latest_checkpointed_...  replaced by another rename: from here on a resume takes it
    iter_0000010/            older ones go, by the rules of `Keep`, each renamed before it is deleted

A kill between any two lines leaves the last checkpoint as it was, and something that `clean_leftovers` knows at
the next start. It does not know Megatron; who calls it when is `train.saves`' business.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.checkpoint.integrity import LIST_NAME, read_checksums, write_checksums
from megatron_ledom.checkpoint.locate import (
    TRACKER,
    find_checkpoint,
    finished_steps,
    folder_name,
    read_tracker,
    step_folders,
)
from megatron_ledom.checkpoint.reader import Checkpoint
from megatron_ledom.errors import CheckpointError, OutputError
from megatron_ledom.files import sync_folder

HASHING_THREADS = 8
"""Reading back is bound by storage or by SHA-256 (about 1.5 GB/s a thread), and training goes on meanwhile."""
SPARE = 1.02
"""Next save against the last one: arguments and indices may grow, tensors do not."""
_LEFTOVER = re.compile(r"\.(iter_\d{7,})\.(?:\w+\.)?(partial|old|deleted)")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay.

    Attributes:
        last: the newest so many; None for all.
        every: besides, those whose step is a multiple of it.
    """

    last: int | None = None
    every: int | None = None

    def superseded(self, steps: Sequence[int]) -> list[int]:
        """Of `steps`, ascending, those that may go; never the last one.

        >>> Keep(last=2, every=100).superseded([90, 95, 100, 105, 110])
        [90, 95]
        """
        if self.last is None:
            return []
        return [s for s in steps[: -max(self.last, 1)] if not self.every or s % self.every]


def partial_folder(save: Path, step: int, token: str) -> Path:
    """Where the ranks of the launch `token` write the checkpoint of `step`."""
    return save / f".{folder_name(step)}.{token}.partial"


def begin(folder: Path) -> None:
    """Make the empty folder of a save.

    Raises:
        OutputError: the file system refuses.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror or error}") from error


def commit(folder: Path, step: int) -> int:
    """Turn a finished partial folder into the newest checkpoint.

    Args:
        folder: from `partial_folder`.
        step: its iteration.

    Returns:
        Its size in bytes.

    Raises:
        CheckpointError: what was written is no complete checkpoint; the earlier ones are as they were.
        OutputError: the file system refuses; likewise.
    """
    save = folder.parent
    Checkpoint.open(folder)  # the index is sound, and every data file as long as it says
    try:
        write_checksums(folder, sync=True, num_threads=HASHING_THREADS)
        sync_folder(folder)
        num_bytes, target = size_of(folder), save / folder_name(step)
        _take_name(folder, target)
        sync_folder(save)
        write_tracker(save, step)
        shutil.rmtree(_beside(target, "old"), ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be finished: {error}") from error
    return num_bytes


def _take_name(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; an earlier `target` is kept beside it, and has its name back if that fails."""
    if not target.exists():
        folder.rename(target)
        return
    old = target.rename(_beside(target, "old"))  # an abandoned future, or the step that this run began from
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise


def write_tracker(save: Path, step: int) -> None:
    """Name the newest checkpoint; the file is replaced whole, so that no reader finds half of it."""
    temporary = save / f".{TRACKER}.partial"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(save / TRACKER)
    sync_folder(save)


def prune(save: Path, keep: Keep, newest: int) -> list[int]:
    """Delete checkpoints that the rules let go; call after `newest` was committed.

    Steps beyond `newest` belong to a future that was abandoned: they are left to be replaced, and count for nothing.

    Returns:
        The deleted steps.
    """
    steps = [step for step in finished_steps(save) if step <= newest]
    gone = [step for step in keep.superseded(steps) if step != read_tracker(save)]
    for step in gone:
        folder = save / folder_name(step)
        try:
            doomed = folder.rename(_beside(folder, "deleted"))
        except OSError as error:  # what cannot be deleted is no reason to stop
            raise OutputError(f"{folder} cannot be removed: {error}") from error
        shutil.rmtree(doomed, ignore_errors=True)
    return gone


def clean_leftovers(save: Path) -> list[str]:
    """Finish what a killed process left in `save`; no run may be writing there.

    Returns:
        What was done, for the log.
    """
    done = []
    for path in sorted(save.glob(".iter_*")):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        name, kind = match.groups()
        if kind == "old" and not (save / name).exists():  # killed between the two renames of `commit`
            path.rename(save / name)
            done.append(f"{name} has its name back")
            continue
        shutil.rmtree(path, ignore_errors=True)
        words = {"partial": f"a save of {name} that was not finished", "old": f"the earlier {name}"}
        done.append(f"removed {words.get(kind, f'the rest of {name}')}")
    (save / f".{TRACKER}.partial").unlink(missing_ok=True)
    return done


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that nobody takes it and nothing of it is lost; return where it is."""
    target, number = folder.with_name(f"{folder.name}.damaged"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.damaged-{number}")
    folder.rename(target)
    return target


def candidates(save: Path) -> list[int]:
    """Steps that a resume may take, the best first: what the tracker names and what lies before it.

    Where the tracker is missing, or names nothing that is there, every folder counts, the newest first.
    """
    if not save.is_dir():
        return []
    steps, named = step_folders(save), read_tracker(save)
    before = [step for step in steps if named is not None and step <= named]
    newest_first = sorted(before or steps, reverse=True)
    return newest_first if named is None or named in before else [named, *newest_first]


def structure_faults(folder: Path, *, list_expected: bool) -> list[str]:
    """What is wrong with a checkpoint, without reading its data: names, index, lengths, the list of checksums.

    Args:
        folder: of one step.
        list_expected: whether a missing list is a fault: of a checkpoint that was saved elsewhere it is none.
    """
    if not folder.is_dir():
        return [f"{folder} is missing"]
    try:
        find_checkpoint(folder)
        if read_checksums(folder) is None and list_expected:
            return [f"{folder / LIST_NAME} is missing"]
        Checkpoint.open(folder)
    except CheckpointError as error:
        return [str(error)]
    return []


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def expected_bytes(save: Path) -> int | None:
    """What the next save will take, judged by the newest one; None before the first."""
    steps = finished_steps(save) if save.is_dir() else []
    return round(size_of(save / folder_name(steps[-1])) * SPARE) if steps else None


def check_space(save: Path, needed_bytes: int) -> None:
    """Refuse to begin a save that will not fit.

    Raises:
        OutputError: with both numbers.
    """
    free = shutil.disk_usage(save).free
    if free < needed_bytes:
        raise OutputError(f"{save}: a save takes {needed_bytes:,} bytes, {free:,} are free")


def _beside(folder: Path, kind: str) -> Path:
    path = folder.with_name(f".{folder.name}.{kind}")
    shutil.rmtree(path, ignore_errors=True)
    return path
