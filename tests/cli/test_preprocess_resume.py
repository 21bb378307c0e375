"""Killed at any moment, divided among processes, joined: the bytes are those of one undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ledom.testing import REPOSITORY, code_documents, run_tool, tool_environment, write_jsonl

NUM_KILLS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("corpus")
    texts = code_documents(160)
    return [write_jsonl(folder / "a.jsonl", texts[:100]), write_jsonl(folder / "b.jsonl", ["", *texts[100:]])]


def arguments(inputs: list[Path], prefix: Path, tokenizer_folder: Path, *more: object) -> list[str]:
    fixed = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder, "--append-eod"]
    return [*map(str, ["--input", *inputs, "--output-prefix", prefix, *fixed, *more])]


def contents(prefix: Path) -> dict[str, bytes]:
    """The files of a dataset but for the manifest, which holds the time."""
    found = sorted(prefix.parent.glob(f"{prefix.name}_*"))
    return {p.name.removeprefix(prefix.name): p.read_bytes() for p in found if ".manifest" not in p.name}


@pytest.fixture(scope="module")
def expected(inputs: list[Path], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    prefix = tmp_path_factory.mktemp("expected") / "x"
    done = run_tool("preprocess_data.py", *arguments(inputs, prefix, tokenizer_folder, "--workers", 1))
    assert done.returncode == 0, done.stderr
    found = contents(prefix)
    assert set(found) == {f"_text_document{s}" for s in (".bin", ".idx", ".crc32", ".skipped.jsonl")}
    return found


def start(command: list[str]) -> subprocess.Popen[bytes]:
    tool = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), *command]
    return subprocess.Popen(tool, env=tool_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_killed_at_twenty_moments_the_same_command_ends_with_the_same_bytes(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """The parent is killed with SIGKILL, the workers are left to themselves; now and then all is begun anew."""
    rng = random.Random(7)
    prefix, work = tmp_path / "x", tmp_path / "x.shards"
    more = ("--workers", 2, "--shard-mb", 0.2, "--tokenizer-backend", "tokenizers")
    command = arguments(inputs, prefix, tokenizer_folder, *more)
    began = time.monotonic()
    assert start(command).wait() == 0
    whole_s = time.monotonic() - began
    kills = kept = 0
    while kills < NUM_KILLS or (kept < 5 and kills < 3 * NUM_KILLS):  # on a busy machine more fall into the start
        for path in tmp_path.glob("x_*"):
            path.unlink()
        if rng.random() < 0.4:
            shutil.rmtree(work, ignore_errors=True)
        process = start(command)
        deadline = time.monotonic() + rng.uniform(0.2, 0.8) * whole_s
        workers: set[int] = set()
        while process.poll() is None and time.monotonic() < deadline:
            workers |= set(children_of(process.pid))
            time.sleep(0.01)
        process.kill()
        if process.wait() == -signal.SIGKILL:  # else it was finished just before
            kills += 1
            kept += any(work.glob("0*.json"))
            limit = time.monotonic() + 60
            while any(is_running(pid) for pid in workers):
                assert time.monotonic() < limit, "a worker outlives its parent"
                time.sleep(0.02)
        else:
            assert process.returncode == 0
            assert contents(prefix) == expected
        if kills % 5 == 0 and process.returncode and not (tmp_path / "x_text_document.manifest.json").exists():
            assert start(command).wait() == 0
            assert contents(prefix) == expected
            assert not work.exists()
            assert list(tmp_path.glob("*.partial")) == []
    assert kept >= 5  # these fell where there was something to keep


# Runs the tool's work in forks of one process, each ended by force at another of its changes to the file system.
AT_EVERY_CHANGE = """
import os, shutil, sys
from pathlib import Path
from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
from megatron_ledom.testing import watch_file_system

folder, source, tokenizer = map(Path, sys.argv[1:])
config = PreprocessConfig(
    inputs=[source], output_prefix=str(folder / "x"), tokenizer_type="HuggingFaceTokenizer",
    tokenizer_model=str(tokenizer), append_eod=True, shard_mb=0.02,
)

def contents():
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and ".manifest" not in p.name}

def in_fork(last_change):
    pid = os.fork()
    if pid == 0:
        watch_file_system(lambda number: os._exit(9) if number == last_change else None)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        preprocess(config)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert in_fork(0) == 0
right = contents()
changes = 0
while True:
    shutil.rmtree(folder); folder.mkdir()
    changes += 1
    if in_fork(changes) == 0:
        break
    names = {p.name for p in folder.iterdir()}
    if "x_text_document.manifest.json" in names:  # published: the manifest came last
        assert all(name in names for name in right), names
    if not (names >= set(right) and "x.shards" not in names):  # else it was finished already
        assert in_fork(0) == 0, (changes, names)
    assert contents() == right, changes
print(changes)
"""


def test_ended_at_every_change_of_the_file_system_the_same_command_ends_with_the_same_bytes(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*code_documents(6), ""])
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", AT_EVERY_CHANGE, str(tmp_path / "out"), str(source), str(tokenizer_folder)]
    environment = {**tool_environment(), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 60  # so many places it was ended at


def test_three_shares_by_three_processes_are_joined_to_the_same_bytes(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    prefix = tmp_path / "x"
    share = ("--num-shards", 3, "--workers", 1, "--shard-mb", 0.3, "--shard-index")
    processes = [start(arguments(inputs, prefix, tokenizer_folder, *share, i)) for i in (0, 1)]
    assert [p.wait() for p in processes] == [0, 0]
    early = run_tool("merge_data.py", prefix)
    assert early.returncode == 2
    assert "shards in" in early.stderr and "are not finished (the first: 2)" in early.stderr
    last = run_tool("preprocess_data.py", *arguments(inputs, prefix, tokenizer_folder, *share, 2))
    assert last.returncode == 0, last.stderr
    assert last.stdout == f"share 2 of 3 is done; then: tools/merge_data.py {prefix}\n"
    assert contents(prefix) == {}
    done = run_tool("merge_data.py", prefix, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert contents(prefix) == expected
    assert not (tmp_path / "x.shards").exists()
    assert "x_text_document.manifest.json: 160 documents" in done.stdout
    again = run_tool("merge_data.py", prefix)
    assert again.returncode == 2
    assert "x.shards is not there: nothing to join" in again.stderr


def test_several_nodes_may_run_the_very_same_command_at_once(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    prefix = tmp_path / "x"
    command = arguments(inputs, prefix, tokenizer_folder, "--workers", 1, "--shard-mb", 0.3)
    processes = [start([*command, "--tokenizer-backend", "tokenizers"]) for _ in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    assert contents(prefix) == expected
    assert not (tmp_path / "x.shards").exists()


def test_unfinished_work_of_another_command_is_refused_or_started_over(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    prefix = tmp_path / "x"
    share = ("--num-shards", 2, "--shard-index", 0, "--shard-mb", 0.3)
    assert run_tool("preprocess_data.py", *arguments(inputs, prefix, tokenizer_folder, *share)).returncode == 0
    other = arguments(inputs, prefix, tokenizer_folder, "--direction", "forward", "--shard-mb", 0.3)
    refused = run_tool("preprocess_data.py", *other)
    assert refused.returncode == 2
    assert "x.shards holds unfinished work of another command (direction differ)" in refused.stderr
    stat = inputs[0].stat()
    try:
        os.utime(inputs[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        refused = run_tool("preprocess_data.py", *arguments(inputs, prefix, tokenizer_folder, "--shard-mb", 0.3))
        assert "of another command (sources differ)" in refused.stderr
    finally:
        os.utime(inputs[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run_tool("preprocess_data.py", *other, "--overwrite").returncode == 0
    over = run_tool("preprocess_data.py", *arguments(inputs, prefix, tokenizer_folder, "--overwrite"))
    assert over.returncode == 0, over.stderr
    assert contents(prefix) == expected


def test_a_damaged_shard_is_found_at_joining_and_made_anew(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    prefix = tmp_path / "x"
    share = ("--num-shards", 1, "--shard-index", 0, "--shard-mb", 0.3)
    more = arguments(inputs, prefix, tokenizer_folder, "--shard-mb", 0.3)
    assert run_tool("preprocess_data.py", *arguments(inputs, prefix, tokenizer_folder, *share)).returncode == 0
    for suffix in ("bin", "len", "crc", "skip"):
        path = next(p for p in sorted((tmp_path / "x.shards").glob(f"*.0.{suffix}")) if p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(content)
        done = run_tool("merge_data.py", prefix)
        assert done.returncode == 2
        assert f"{path} is damaged" in done.stderr
        assert contents(prefix) == {}
        if suffix != "skip":
            assert run_tool("preprocess_data.py", *arguments(inputs, prefix, tokenizer_folder, *share)).returncode == 0
    assert run_tool("preprocess_data.py", *more).returncode == 0
    assert contents(prefix) == expected
