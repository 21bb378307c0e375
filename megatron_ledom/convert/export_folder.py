"""The folder that an export makes: hidden until it is whole, continued after a kill, sealed with checksums.

    .NAME.partial/      beside the target, while the export runs
      lock              held by the process that writes (`files.place_beside`)
      state.json        which export this is, and the SHA-256 of every file of weights that is finished
      NAME/             takes the target's name, in one rename, when everything is in it

A failure removes all of this. A kill cannot, and Ctrl-C does not: the same command then
continues with the first file of weights that is not finished. What the files contain is
none of this module's business.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ledom.errors import OutputError
from megatron_ledom.files import HashingFile, as_output_error, hash_file, place_beside, replace_folder, sync_folder
from megatron_ledom.log import get_logger

SUMS_NAME = "SHA256SUMS"
STATE_FORMAT_VERSION = 1


@dataclass
class ExportFolder:
    """An export under construction.

    Attributes:
        path: where its files are written.
        finished: SHA-256 in hexadecimal by name of the files that are complete, an earlier try's included.
    """

    path: Path
    finished: dict[str, str] = field(default_factory=dict)
    _identity: dict[str, Any] = field(default_factory=dict)

    def finish_file(self, name: str, sha256: str) -> None:
        """Note that a file is complete and on disk: a later try will keep it."""
        self.finished[name] = sha256
        content = {"format_version": STATE_FORMAT_VERSION, "identity": self._identity, "finished": self.finished}
        state = _state_path(self.path)
        temporary = state.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        _write_durably(temporary, json.dumps(content, indent=1))
        sync_folder(self.path)
        temporary.replace(state)
        sync_folder(state.parent)


@contextmanager
def export_folder(
    output: Path, *, identity: dict[str, Any], needed_bytes: int, check_target: Callable[[], None]
) -> Iterator[ExportFolder]:
    """Give a folder that becomes `output`, with its checksums, if the block succeeds and vanishes if it fails.

    Args:
        output: the final name; what stands there is replaced, if `check_target` lets it.
        identity: what the files of weights depend on, as JSON: an unfinished export is continued if it has the same.
        needed_bytes: for all files; refused at once if fewer are free.
        check_target: raises if `output` must not be replaced; called before and after the block.

    Raises:
        OutputExistsError: another process is writing the same folder.
        OutputError: the folder cannot be made there, or there is not enough space.
    """
    with place_beside(output, flag="--output", kind="export", check_target=check_target) as place:
        output = output.resolve()
        needed = f"--output {output}: {needed_bytes:,} bytes are needed there"
        try:
            folder = _continue_or_begin(place / output.name, identity)
            present = sum((folder.path / name).stat().st_size for name in folder.finished)
            free = shutil.disk_usage(place).free
            needed += f", {free + present:,} were free at the start"
            if free + present < needed_bytes:
                raise OutputError(
                    f"--output {output}: {needed_bytes:,} bytes are needed there, {free + present:,} are free"
                )
            yield folder
            check_target()  # it may have appeared meanwhile
            write_sums(folder.path, folder.finished)
            replace_folder(folder.path, output)
        except KeyboardInterrupt:
            get_logger(__name__).warning("what is finished stays in %s; the same command continues from it", place)
            raise
        except BaseException as error:
            _remove(place, output.name)
            refusal = as_output_error(error, needed)
            if refusal is None:
                raise
            raise refusal from error
        else:
            _remove(place, output.name)


def write_sums(folder: Path, known: dict[str, str]) -> None:
    """Write `SHA256SUMS` for every other file of `folder`, as `sha256sum -c` reads it, and force all of them to disk.

    Args:
        folder: flat and complete.
        known: hashes of files that were hashed while they were written, and are on disk.

    Raises:
        OutputError: the list cannot be written.
    """
    lines = []
    for path in sorted(path for path in folder.iterdir() if path.name != SUMS_NAME):
        lines.append(f"{known.get(path.name) or hash_file(path, sync=True)}  {path.name}\n")
    _write_durably(folder / SUMS_NAME, "".join(lines))
    sync_folder(folder)


def _continue_or_begin(path: Path, identity: dict[str, Any]) -> ExportFolder:
    """Take over what an earlier try with the same `identity` finished; remove everything else."""
    place, log = path.parent, get_logger(__name__)
    folder = ExportFolder(path, _identity=identity)
    try:
        state = json.loads(_state_path(path).read_text(encoding="utf-8"))
        is_same = state["format_version"] == STATE_FORMAT_VERSION and state["identity"] == identity
        finished = {str(name): str(sha256) for name, sha256 in state["finished"].items()} if is_same else {}
    except FileNotFoundError:
        is_same, finished = True, {}
    except (ValueError, KeyError, TypeError, AttributeError):
        is_same, finished = False, {}
    if not is_same:
        log.warning("%s is left from another checkpoint or other options: started over", place)
    for name, sha256 in finished.items():
        part = path / name
        if part.name == name and part.is_file() and not part.is_symlink() and hash_file(part, sync=True) == sha256:
            folder.finished[name] = sha256
    if path.is_dir():
        for left in path.iterdir():
            if left.name not in folder.finished:
                left.unlink() if left.is_symlink() or not left.is_dir() else shutil.rmtree(left)
    else:
        path.mkdir()
    if folder.finished:
        log.info("continuing the export in %s: %s finished before", place, ", ".join(sorted(folder.finished)))
    else:
        _state_path(path).unlink(missing_ok=True)
    return folder


def _remove(place: Path, name: str) -> None:
    """Remove what `export_folder` makes in `place`, which goes with its lock."""
    shutil.rmtree(place / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        for left in ("state.json", "state.new"):
            (place / left).unlink(missing_ok=True)


def _state_path(path: Path) -> Path:
    return path.with_name("state.json")


def _write_durably(path: Path, text: str) -> None:
    file = HashingFile(path)
    try:
        file.write(text.encode("utf-8"))
        file.finish()
    finally:
        file.abandon()
