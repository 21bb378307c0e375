"""Where a finished checkpoint is: from a `--load` path to one `iter_NNNNNNN` folder.

    SAVE/                                  Megatron's --save
      latest_checkpointed_iteration.txt    written last: names the newest finished checkpoint
      iter_0000020/
        .metadata                          what is where in the data files
        metadata.json                      written after the data
        __0_0.distcp ...                   the data files
        checksums.json                     see `integrity`
      .iter_0000025.partial/               a save that is not finished: `commit` gives it its name
      iter_0000015.damaged/                set aside at a resume: no checkpoint any more

It reads names and the two small text files only; what is inside `.metadata` is the
reader's business.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_ledom.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
INDEX = ".metadata"
SEAL = "metadata.json"
BACKEND_VERSION = 1
RELEASE = "release"
"""Megatron's word, in the tracker and as a folder's name, for weights that no run saved: no optimizer, iteration 0."""
_TRACKER_CHARACTERS = 100
_STEP_FOLDER = re.compile(r"iter_(\d{7,})")


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """Return the folder of one finished checkpoint.

    Args:
        path: Megatron's `--save` folder, or an `iter_NNNNNNN` folder itself.
        step: take this iteration instead of the last finished one.

    Raises:
        CheckpointError: nothing is there, the checkpoint is unfinished or of another format, or
            `step` is not among the finished ones.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give Megatron's --save folder (RUN/checkpoints)")
    if _is_step_folder(path):
        if step is not None and _step_of(path) != step:
            raise CheckpointError(f"{path} was given, and step {step}: give the folder above it, or leave the step out")
        return _check_finished(path)
    if step is not None:
        folder = path / folder_name(step)
        if not folder.is_dir():
            raise CheckpointError(f"{path} holds no step {step}; finished steps: {_words(finished_steps(path))}")
        return _check_finished(folder)
    return _check_finished(_latest(path))


def finished_steps(path: Path) -> list[int]:
    """Return the iterations of which the `--save` folder `path` holds a finished checkpoint, in order."""
    return [step for step in step_folders(path) if not _what_is_missing(path / folder_name(step))]


def step_folders(path: Path) -> list[int]:
    """Return the iterations of which `path` holds a folder, finished or not, in order."""
    return sorted(_step_of(folder) for folder in path.iterdir() if folder.is_dir() and _step_of(folder) >= 0)


def folder_name(step: int) -> str:
    """The name that Megatron gives to the checkpoint of an iteration.

    >>> folder_name(20)
    'iter_0000020'
    """
    return f"iter_{step:07d}"


def read_tracker(path: Path) -> int | None:
    """The iteration that the tracker file in `path` names; None without one, or where it holds another word."""
    try:
        with (path / TRACKER).open(encoding="utf-8", errors="replace") as file:
            word = file.read(_TRACKER_CHARACTERS).strip()
    except OSError:
        return None
    return int(word) if word.isascii() and word.isdigit() and len(word) < _TRACKER_CHARACTERS // 2 else None


def _latest(path: Path) -> Path:
    """The folder that the tracker file names."""
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(_why_no_tracker(path))
    with tracker.open(encoding="utf-8", errors="replace") as file:
        word = file.read(_TRACKER_CHARACTERS).strip()
    if word != RELEASE and not (word.isascii() and word.isdigit() and len(word) < _TRACKER_CHARACTERS // 2):
        raise CheckpointError(f"{tracker} holds {word[:40]!r}, where the number of an iteration should be")
    folder = path / (RELEASE if word == RELEASE else f"iter_{word:0>7}")
    if not folder.is_dir():
        raise CheckpointError(
            f"{tracker} names step {word}, but {folder.name} is not there; finished steps: "
            f"{_words(finished_steps(path))} (choose one with --step)"
        )
    return folder


def _why_no_tracker(path: Path) -> str:
    """The message for a folder without a tracker file: what it is instead."""
    inner = path / "checkpoints"
    if (inner / TRACKER).is_file():
        return f"{path} is a run directory; its checkpoints are in {inner}"
    steps = [folder_name(step) for step in step_folders(path)]
    if not steps:
        return f"{path} holds no checkpoint: no {TRACKER} and no iter_NNNNNNN folder"
    return (
        f"{path} holds no finished checkpoint: {', '.join(steps)} without {TRACKER}, which Megatron writes when a save "
        f"is complete. Steps whose own files are complete: {_words(finished_steps(path))} (choose one with --step)"
    )


def _check_finished(folder: Path) -> Path:
    """Return `folder` if a save into it was completed and the format is ours to read."""
    if (folder / "mp_rank_00").exists() or any(folder.glob("mp_rank_00_*")):
        raise CheckpointError(f"{folder} is in the old format of one file a rank; save with --ckpt-format torch_dist")
    missing = _what_is_missing(folder)
    if missing:
        raise CheckpointError(
            f"{folder} is not a finished checkpoint: {missing} is missing, so the save into it was interrupted. "
            f"Finished steps beside it: {_words(finished_steps(folder.parent))} (choose one with --step)"
        )
    seal = folder / SEAL
    try:
        content = json.loads(seal.read_text(encoding="utf-8"))
        backend, version = content["sharded_backend"], content.get("sharded_backend_version", BACKEND_VERSION)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{seal} is damaged: it should name a sharded_backend ({error})") from error
    if backend != "torch_dist":
        raise CheckpointError(f"{folder} is in format {backend!r}; this reads torch_dist (--ckpt-format torch_dist)")
    if not isinstance(version, int) or version > BACKEND_VERSION:
        raise CheckpointError(
            f"{seal} says torch_dist version {version!r}, this version of megatron_ledom reads {BACKEND_VERSION}"
        )
    return folder


def _what_is_missing(folder: Path) -> str:
    return " and ".join(name for name in (INDEX, SEAL) if not (folder / name).is_file())


def _is_step_folder(path: Path) -> bool:
    return path.is_dir() and (_STEP_FOLDER.fullmatch(path.name) is not None or (path / INDEX).is_file())


def _step_of(folder: Path) -> int:
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def _words(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if steps else "none"
