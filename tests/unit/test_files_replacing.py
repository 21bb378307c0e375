"""Folders that get their name last: a kill at every moment, the next process, two processes, a rename that fails."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ledom.convert.export_folder import export_folder
from megatron_ledom.errors import OutputError, OutputExistsError
from megatron_ledom.files import folder_beside, replace_folder
from megatron_ledom.testing import tool_environment

MAKE = """
import os, shutil, signal, sys
from pathlib import Path
from megatron_ledom.convert.export_folder import export_folder
from megatron_ledom.errors import OutputExistsError
from megatron_ledom.files import folder_beside

kind, target, moment = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
os.getpid = lambda: 7  # in a container the number is often the same at the next start
renames = []

def die():
    os.kill(int(os.readlink("/proc/self")), signal.SIGKILL)  # os.getpid is not to be believed here

rename = Path.rename
def counting(self, to):
    if target in (self, Path(to)):
        renames.append(to)
        done = rename(self, to)
        if moment == f"after rename {len(renames)}":
            die()
        return done
    return rename(self, to)
Path.rename = counting

def check():
    if target.exists() and moment == "without --overwrite":
        raise OutputExistsError(f"--save {target} exists")

if kind == "export":
    folder = export_folder(target, identity={}, needed_bytes=0, check_target=check)
else:
    folder = folder_beside(target, flag="--save", kind="import", needed_bytes=0, check_target=check)
with folder as found:
    path = found.path if kind == "export" else found
    (path / "weights").write_text("new")
    if moment == "while writing":
        die()
    if moment == "wait":
        print("holding", flush=True)
        sys.stdin.read()
"""
KINDS = ("import", "export")


def make(kind: str, target: Path, moment: str) -> subprocess.CompletedProcess[str]:
    """Make `target` in a process of its own, killed at `moment`."""
    command = [sys.executable, "-c", MAKE, kind, str(target), moment]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=tool_environment())


def killed(kind: str, target: Path, moment: str) -> None:
    done = make(kind, target, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr


def earlier(target: Path) -> Path:
    target.mkdir()
    (target / "weights").write_text("old")
    return target


def free(_: Path | None = None) -> None:
    """Any target may be replaced."""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ["while writing", "after rename 1", "after rename 2"])
def test_a_kill_at_any_moment_is_made_good_by_the_same_command(kind: str, moment: str, target: Path) -> None:
    killed(kind, earlier(target), moment)
    whole = [path for path in (target, target.with_name(".model.old")) if path.is_dir()]
    assert whole and all((path / "weights").read_text() in {"old", "new"} for path in whole)  # nothing is lost
    done = make(kind, target, "never")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "weights").read_text() == "new"


@pytest.mark.parametrize("kind", KINDS)
def test_what_stood_there_has_its_name_back_also_where_it_may_not_be_replaced(kind: str, target: Path) -> None:
    killed(kind, earlier(target), "after rename 1")
    assert not target.exists()
    target.mkdir()  # an empty folder under the name is no reason to lose what was there
    done = make(kind, target, "without --overwrite")
    assert "exists" in done.stderr and f"{target} has its name back" in done.stderr
    assert (target / "weights").read_text() == "old" and not target.with_name(".model.old").exists()


def test_what_was_replaced_is_named_where_nothing_may_be_replaced_now(target: Path) -> None:
    killed("import", earlier(target), "after rename 2")
    done = make("import", target, "without --overwrite")
    assert f"{target.with_name('.model.old')} is left from the time before {target}: delete it" in done.stderr
    assert (target / "weights").read_text() == "new"


def test_an_import_starts_over_where_a_killed_one_wrote(target: Path) -> None:
    killed("import", target, "while writing")
    assert [path.name for path in target.parent.iterdir()] == [".model.partial"]  # a name without a process's number
    (target.with_name(".model.partial") / "model" / "stale").touch()
    with folder_beside(target, flag="--save", kind="import", needed_bytes=0, check_target=free) as folder:
        assert list(folder.iterdir()) == []
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_process_is_refused_by_name(kind: str, target: Path) -> None:
    command = [sys.executable, "-c", MAKE, kind, str(target), "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=tool_environment()) as first:
        assert first.stdout is not None and first.stdout.readline() == b"holding\n"
        with (
            pytest.raises(
                OutputExistsError, match=r"another import is writing it now, in .*\.partial \(process 7 on .+"
            ),
            folder_beside(target, flag="--save", kind="import", needed_bytes=0, check_target=free),
        ):
            pass
        with (
            pytest.raises(
                OutputExistsError, match=r"another export is writing it now, in .*\.partial \(process 7 on .+"
            ),
            export_folder(target, identity={}, needed_bytes=0, check_target=free),
        ):
            pass
        first.communicate(b"")
    assert first.returncode == 0 and (target / "weights").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.fixture
def log(log_of: Callable[[str], pytest.LogCaptureFixture]) -> pytest.LogCaptureFixture:
    """What is said of folders."""
    return log_of("megatron_ledom.files")


def refusing(method: Callable[..., object], refused: Path) -> Callable[..., object]:
    """`method`, which fails for one path as a file system does that takes no more."""

    def call(path: Path, *arguments: object, **options: object) -> object:
        if path == refused:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return method(path, *arguments, **options)

    return call


def test_a_second_rename_that_fails_gives_the_name_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier(target)
    temporary = target.with_name(".model.partial") / "model"
    monkeypatch.setattr(Path, "rename", refusing(Path.rename, temporary))
    with (
        pytest.raises(OutputError, match=r"--save .*model: 0 bytes are needed there.*No space left"),
        folder_beside(target, flag="--save", kind="import", needed_bytes=0, check_target=free) as folder,
    ):
        (folder / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_what_was_replaced_and_cannot_be_removed_is_named_and_no_failure(
    target: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    earlier(target)
    new = target.with_name("new")
    new.mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    replace_folder(new, target)
    assert re.search(r"model, which was replaced, cannot be removed: delete .*\.model\.old", log.text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stands_for_what_it_points_to(kind: str, is_there: bool, tmp_path: Path) -> None:
    """Else the last rename fails, after all the work, or the link is replaced by a folder on another disk."""
    (tmp_path / "scratch").mkdir()
    link, real = tmp_path / "model", tmp_path / "scratch" / "model"
    if is_there:
        earlier(real)
    link.symlink_to(real)
    done = make(kind, link, "never")
    assert done.returncode == 0, done.stderr
    assert link.is_symlink() and (real / "weights").read_text() == "new"
    assert [path.name for path in real.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "scratch"]


def test_every_file_is_on_disk_before_it_has_the_name(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import's tracker and records are small files that nobody else forces to disk."""
    synced: list[int] = []
    fsync, rename = os.fsync, Path.rename

    def recording(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checking(path: Path, to: Path) -> Path:
        everything = [path, *path.rglob("*")]
        assert len(everything) == 4 and {each.stat().st_ino for each in everything} <= set(synced)
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(Path, "rename", checking)
    with folder_beside(target, flag="--save", kind="import", needed_bytes=0, check_target=free) as folder:
        (folder / "tracker").write_text("release")
        (folder / "release").mkdir()
        (folder / "release" / "weights").write_text("new")
    assert (target / "tracker").read_text() == "release"
