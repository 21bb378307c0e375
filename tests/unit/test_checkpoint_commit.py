"""How a save becomes a checkpoint, what a kill in between leaves, what damage is found, and which ones stay."""

from __future__ import annotations

import argparse
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ledom.checkpoint import commit
from megatron_ledom.checkpoint.commit import Keep
from megatron_ledom.checkpoint.integrity import LIST_NAME, find_faults, verify_checksums
from megatron_ledom.checkpoint.locate import (
    INDEX,
    SEAL,
    TRACKER,
    find_checkpoint,
    finished_steps,
    folder_name,
    read_tracker,
)
from megatron_ledom.checkpoint.writer import CheckpointWriter
from megatron_ledom.engine.rendezvous import Agreement
from megatron_ledom.errors import CheckpointError, OutputError, UsageError
from megatron_ledom.train.resume import prefer_own, settle_checkpoint
from megatron_ledom.train.run_lock import LOCK
from megatron_ledom.train.saves import Saves


def write(folder: Path, step: int) -> None:
    """What the ranks leave in a partial folder: two data files, the index, the seal."""
    commit.begin(folder)
    with CheckpointWriter(folder, max_file_bytes=1) as writer:
        writer.write_chunk("weight", torch.full((8, 4), float(step)), shape=(8, 4), offsets=(0, 0))
        writer.write_common(argparse.Namespace(direction="reverse"), iteration=step)


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        partial = commit.partial_folder(folder, step, "launch1")
        write(partial, step)
        commit.commit(partial, step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with the checkpoints of steps 5 and 10."""
    save(tmp_path / "run" / "checkpoints", 5, 10)
    return tmp_path / "run"


def settle(run: Path, *flags: object) -> list[str]:
    settled = settle_checkpoint(["--run-dir", str(run), *map(str, flags)], Agreement())
    assert settled.verified is None or settled.verified.is_dir()
    return settled.argv


def test_a_commit_names_hashes_and_tracks(run: Path) -> None:
    checkpoints = run / "checkpoints"
    assert finished_steps(checkpoints) == [5, 10] and read_tracker(checkpoints) == 10
    assert verify_checksums(checkpoints / folder_name(10))
    assert {path.name for path in checkpoints.iterdir()} == {"iter_0000005", "iter_0000010", TRACKER}
    assert commit.candidates(checkpoints) == [10, 5]
    save(checkpoints, 10)  # once more, over the old one
    assert {path.name for path in checkpoints.iterdir()} == {"iter_0000005", "iter_0000010", TRACKER}


@pytest.mark.parametrize("lost", ["__0_1.distcp", INDEX, SEAL])
def test_what_is_not_whole_is_not_committed(lost: str, run: Path) -> None:
    partial = commit.partial_folder(run / "checkpoints", 15, "launch1")
    write(partial, 15)
    (partial / lost).unlink()
    with pytest.raises(CheckpointError):
        commit.commit(partial, 15)
    assert read_tracker(run / "checkpoints") == 10 and finished_steps(run / "checkpoints") == [5, 10]


def stop_after_the_rename(checkpoints: Path) -> None:
    partial = commit.partial_folder(checkpoints, 15, "launch1")
    write(partial, 15)
    commit.commit(partial, 15)
    commit.write_tracker(checkpoints, 10)


def stop_between_the_renames(checkpoints: Path) -> None:
    write(commit.partial_folder(checkpoints, 10, "launch1"), 10)
    (checkpoints / "iter_0000010").rename(checkpoints / ".iter_0000010.old")


def stop_while_writing(checkpoints: Path) -> None:
    commit.begin(commit.partial_folder(checkpoints, 15, "launch1"))
    (checkpoints / ".iter_0000015.launch1.partial" / "__0_0.distcp").write_bytes(b"half")


def stop_while_deleting(checkpoints: Path) -> None:
    (checkpoints / ".iter_0000001.deleted").mkdir()
    (checkpoints / f".{TRACKER}.partial").write_text("1")


@pytest.mark.parametrize(
    "stop", [stop_after_the_rename, stop_between_the_renames, stop_while_writing, stop_while_deleting]
)
def test_a_kill_at_any_line_leaves_the_last_checkpoint(stop: Callable[[Path], None], run: Path) -> None:
    checkpoints = run / "checkpoints"
    stop(checkpoints)
    settle(run)
    assert read_tracker(checkpoints) == 10 and verify_checksums(find_checkpoint(checkpoints))
    assert [path.name for path in checkpoints.glob(".*")] == [LOCK]


def test_a_commit_that_the_disk_refuses_leaves_the_earlier_checkpoint_its_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same step, as after a fallback; the refusal comes between the two renames."""
    checkpoints = run / "checkpoints"
    partial = commit.partial_folder(checkpoints, 10, "launch1")
    write(partial, 10)
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path == partial:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OutputError, match="Input/output error"):
        commit.commit(partial, 10)
    assert read_tracker(checkpoints) == 10 and verify_checksums(find_checkpoint(checkpoints))


@pytest.mark.parametrize("function", ["commit", "prune"])
def test_what_the_file_system_says_after_a_save_ends_no_run(
    function: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of rank 0's thread would come up in rank 0 alone, while the others wait for it."""

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(commit, function, stale)
    saves = Saves(run / "checkpoints", Keep(), 0, "launch1")
    write(commit.partial_folder(run / "checkpoints", 15, "launch1"), 15)
    saves.saved(15, None)
    saves.wait()
    assert commit.candidates(run / "checkpoints")[0] == (10 if function == "commit" else 15)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete(path: Path) -> None:
    path.unlink()


FILES = ["__0_0.distcp", "__0_1.distcp", INDEX, SEAL, LIST_NAME]


@pytest.mark.parametrize("damage", [truncate, flip, delete], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_named_and_the_one_before_is_taken(
    name: str, damage: Callable[[Path], None], run: Path, log_of: Callable[[str], pytest.LogCaptureFixture]
) -> None:
    checkpoints = run / "checkpoints"
    folder = checkpoints / folder_name(10)
    assert sorted(FILES) == sorted(path.name for path in folder.iterdir()), "every file has its turn"
    damage(folder / name)
    log = log_of("megatron_ledom.train.resume")
    settle(run)
    said = log.text
    assert f"{folder} is damaged" in said and name in said, said
    assert "fell back to step 5, the last checkpoint that is sound" in said
    assert read_tracker(checkpoints) == 5 and finished_steps(checkpoints) == [5]
    assert (checkpoints / "iter_0000010.damaged").is_dir(), "what is left of it is kept"


@pytest.mark.parametrize("content", ["", "1", "ten", None])
def test_damage_to_the_tracker_costs_nothing(content: str | None, run: Path) -> None:
    tracker = run / "checkpoints" / TRACKER
    tracker.unlink() if content is None else tracker.write_text(content)
    settle(run)
    assert read_tracker(run / "checkpoints") == 10


def test_a_tracker_set_back_by_hand_is_obeyed(run: Path) -> None:
    (run / "checkpoints" / TRACKER).write_text("5")
    settle(run)
    assert read_tracker(run / "checkpoints") == 5 and finished_steps(run / "checkpoints") == [5, 10]


def test_where_all_are_damaged_all_are_named(run: Path) -> None:
    for step in (5, 10):
        flip(run / "checkpoints" / folder_name(step) / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"no checkpoint is sound") as refusal:
        settle(run)
    assert all(f"{folder_name(step)}/__0_0.distcp has changed" in str(refusal.value) for step in (5, 10))
    assert finished_steps(run / "checkpoints") == [5, 10], "nothing is moved when there is nothing to move to"


def test_of_another_runs_folder_nothing_is_changed(run: Path, tmp_path: Path) -> None:
    flip(run / "checkpoints" / folder_name(10) / "__0_0.distcp")
    argv = settle(tmp_path / "other", "--load", run / "checkpoints")
    assert argv[-2:] == ["--ckpt-step", "5"]
    assert read_tracker(run / "checkpoints") == 10 and finished_steps(run / "checkpoints") == [5, 10]


def test_a_run_that_began_elsewhere_goes_on_from_its_own_checkpoint(run: Path, tmp_path: Path) -> None:
    own = ["--run-dir", str(run), "--lr", "1e-3"]
    other = ["--load", str(tmp_path / "other"), "--ckpt-step=7", "--finetune", "--no-load-optim", "--no-load-rng"]
    assert prefer_own([*other, "--run-dir", str(tmp_path / "new")])[0][:2] == other[:2], "its first start"
    for begun in (other, other[:2], ["--finetune", "--pretrained-checkpoint", "release"]):
        argv, why = prefer_own([*begun, *own])
        kept = begun[1:] if "--pretrained-checkpoint" in begun else []
        assert argv == [*kept, *own, "--load", str(run / "checkpoints")]
        assert why.startswith(f"this run goes on from its own checkpoint of step 10 in {run / 'checkpoints'}; ")
    assert settle(run, *other)[-2:] == ["--load", str(run / "checkpoints")]
    assert prefer_own(own) == (own, "")
    at_step = [*own, "--load", str(run / "checkpoints"), "--ckpt-step", "5"]
    assert prefer_own(at_step) == (at_step, ""), "chosen by hand"
    for more in ([], ["--load", str(run / "checkpoints")]):
        with pytest.raises(UsageError, match=r"every restart would begin anew.*--pretrained-checkpoint"):
            prefer_own([*own, *more, "--finetune"])


def test_old_checkpoints_without_a_list_are_taken_as_they_are(run: Path) -> None:
    for step in (5, 10):
        (run / "checkpoints" / folder_name(step) / LIST_NAME).unlink()
    settle(run)
    assert read_tracker(run / "checkpoints") == 10


def test_a_report_changes_nothing(run: Path) -> None:
    stop_while_writing(run / "checkpoints")
    flip(run / "checkpoints" / folder_name(10) / "__0_0.distcp")
    before = sorted(run.rglob("*"))
    settle(run, "--data-report-only")
    assert sorted(run.rglob("*")) == before and read_tracker(run / "checkpoints") == 10


def test_a_run_without_checkpoints_begins(tmp_path: Path) -> None:
    assert settle(tmp_path / "new") == ["--run-dir", str(tmp_path / "new")]


def test_every_file_is_read_by_one_rank(run: Path) -> None:
    folder = run / "checkpoints" / folder_name(10)
    for path in folder.iterdir():
        if path.name != LIST_NAME:
            flip(path)
    found = [find_faults(folder, share=(rank, 3)) or [] for rank in range(3)]
    names = [fault.split(" has changed")[0].rsplit("/", 1)[1] for some in found for fault in some]
    assert sorted(names) == sorted(set(FILES) - {LIST_NAME})


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        (Keep(), []),
        (Keep(last=1), [5, 10, 15, 20]),
        (Keep(last=2), [5, 10, 15]),
        (Keep(last=2, every=10), [5, 15]),
        (Keep(last=9), []),
    ],
)
def test_pruning(keep: Keep, gone: list[int], tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 20, 25)
    assert commit.prune(tmp_path, keep, 25) == gone
    assert finished_steps(tmp_path) == [step for step in (5, 10, 15, 20, 25) if step not in gone]
    assert not list(tmp_path.glob(".*"))


def test_pruning_counts_neither_an_abandoned_future_nor_what_is_damaged(run: Path) -> None:
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "iter_0000010", checkpoints / "iter_0000099")
    shutil.copytree(checkpoints / "iter_0000010", checkpoints / "iter_0000008.damaged")
    assert commit.prune(checkpoints, Keep(last=2), 10) == []
    assert commit.prune(checkpoints, Keep(last=1), 10) == [5]
    assert finished_steps(checkpoints) == [10, 99]


def test_space_is_judged_by_the_last_save(run: Path) -> None:
    checkpoints = run / "checkpoints"
    size = commit.size_of(checkpoints / folder_name(10))
    needed = commit.expected_bytes(checkpoints)
    assert needed is not None and size <= needed <= 1.1 * size
    commit.check_space(checkpoints, needed)
    with pytest.raises(OutputError, match=rf"a save takes {10**18:,} bytes, [\d,]+ are free"):
        commit.check_space(checkpoints, 10**18)
    assert commit.expected_bytes(run / "none") is None


def test_a_list_says_what_was_committed(run: Path) -> None:
    entries = json.loads((run / "checkpoints" / folder_name(10) / LIST_NAME).read_text())["files"]
    assert sorted(entries) == sorted(set(FILES) - {LIST_NAME})
