"""What becomes of an export, or an import, that is killed, runs out of space, or meets another one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.convert.export_folder import SUMS_NAME
from megatron_ledom.convert.from_hf import ImportOptions, import_folder
from megatron_ledom.convert.hf import ExportOptions, export_checkpoint
from megatron_ledom.errors import CheckpointError, OutputError, OutputExistsError, ParityError
from megatron_ledom.testing import REPOSITORY, tool_environment

SMALL = {"parity": False, "max_shard_bytes": 30_000}
KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from megatron_ledom.convert import safetensors_file
from megatron_ledom.convert.hf import ExportOptions, export_checkpoint
write = safetensors_file.ShardWriter.write
def write_and_die(self, name, tensor):
    write(self, name, tensor)
    if name == "model.layers.1.self_attn.q_proj.weight":
        os.kill(os.getpid(), signal.SIGKILL)
safetensors_file.ShardWriter.write = write_and_die
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), options=ExportOptions(parity=False, max_shard_bytes=30_000))
"""
LIMITED = """
import resource, sys
tool, limit = sys.argv[1], int(sys.argv[2])
from megatron_ledom.errors import run_cli
import runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main = runpy.run_path(tool)["main"]
sys.argv = sys.argv[2:]
run_cli(main)
"""


def export(cases: Path, output: Path, name: str = "gqa_padded", **changes: object) -> None:
    export_checkpoint(cases / name, output, options=ExportOptions(**(SMALL | changes)))  # type: ignore[arg-type]


def python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=tool_environment())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def log(log_of: Callable[[str], pytest.LogCaptureFixture]) -> pytest.LogCaptureFixture:
    """What the export says."""
    return log_of("megatron_ledom.convert.export_folder")


@pytest.fixture(scope="module")
def killed_once(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an export to `hf` leaves that is killed among the weights of the second layer."""
    folder = tmp_path_factory.mktemp("killed")
    done = python(KILLED_IN_THE_MIDDLE, cases / "gqa_padded", folder / "hf")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in folder.iterdir()] == [".hf.partial"]  # nothing under the final name
    return folder / ".hf.partial"


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """A copy of it, so that an export to `tmp_path / "hf"` finds it."""
    place = Path(shutil.copytree(killed_once, tmp_path / ".hf.partial"))
    finished = json.loads((place / "state.json").read_text())["finished"]
    assert len(finished) >= 2 and set(finished) < {path.name for path in (place / "hf").glob("*.safetensors")}
    return place


def test_sha256sum_itself_confirms_every_file(cases: Path, tmp_path: Path) -> None:
    export(cases, tmp_path / "hf")
    command = ["sha256sum", "--check", "--strict", SUMS_NAME]
    done = subprocess.run(command, cwd=tmp_path / "hf", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checked = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
    assert checked == {path.name for path in (tmp_path / "hf").iterdir()} - {SUMS_NAME}
    sums = (tmp_path / "hf" / SUMS_NAME).stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= sums for path in (tmp_path / "hf").iterdir())
    shard = next((tmp_path / "hf").glob("model-00002-of-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = subprocess.run(command, cwd=tmp_path / "hf", capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"{shard.name}: FAILED" in done.stdout


def test_a_killed_export_continues_from_its_finished_files(
    killed: Path, cases: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    finished = json.loads((killed / "state.json").read_text())["finished"]
    before = {name: (killed / "hf" / name).stat() for name in finished}
    (killed / "hf" / "left_over.json").write_text("{}")  # of whatever was being written
    export(cases, tmp_path / "hf")
    assert re.search(r"continuing the export in .*\.hf\.partial: model-00001-of-.* finished before", log.text)
    for name, stat in before.items():
        now = (tmp_path / "hf" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    export(cases, tmp_path / "uninterrupted")
    assert contents(tmp_path / "hf") == contents(tmp_path / "uninterrupted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "uninterrupted"]


@pytest.mark.parametrize("change", ["dtype", "shards", "checkpoint", "state"])
def test_what_an_export_with_other_options_left_is_not_used(
    change: str, killed: Path, cases: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    options: dict[str, object] = {}
    name = "gqa_padded"
    if change == "dtype":
        options = {"dtype": "bfloat16"}
    elif change == "shards":
        options = {"max_shard_bytes": 50_000}
    elif change == "checkpoint":
        name = "rope_linear"
    else:
        (killed / "state.json").write_text("{")
    export(cases, tmp_path / "hf", name, **options)
    assert f"{killed} is left from another checkpoint or other options: started over" in log.text
    export(cases, tmp_path / "uninterrupted", name, **options)
    assert contents(tmp_path / "hf") == contents(tmp_path / "uninterrupted")


def test_a_finished_file_that_was_damaged_meanwhile_is_written_again(killed: Path, cases: Path, tmp_path: Path) -> None:
    shard = next((killed / "hf").glob("model-00001-of-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    export(cases, tmp_path / "hf")
    export(cases, tmp_path / "uninterrupted")
    assert contents(tmp_path / "hf") == contents(tmp_path / "uninterrupted")


def test_ctrl_c_keeps_what_is_finished(cases: Path, tmp_path: Path) -> None:
    program = KILLED_IN_THE_MIDDLE.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise KeyboardInterrupt")
    done = python(program, cases / "gqa_padded", tmp_path / "hf")
    assert done.returncode != 0 and "the same command continues from it" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".hf.partial"]


def test_two_exports_of_one_name_do_not_meet(cases: Path, tmp_path: Path) -> None:
    place = tmp_path / ".hf.partial"
    place.mkdir()
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputExistsError, match=r"--output .*hf: another export is writing it now, in .*partial"):
            export(cases, tmp_path / "hf")
        assert [path.name for path in place.iterdir()] == ["lock"]
    export(cases, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_of_two_exports_at_once_one_is_refused_or_both_succeed_in_turn(cases: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "convert_to_hf.py"), "--load", str(cases / "gqa_padded")]
    command += ["--output", str(tmp_path / "hf"), "--no-parity", "--max-shard-size", "30KB"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=tool_environment()) for _ in range(2)]
    words = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], words
    assert re.search(r"^error: --output .*hf(: another export is writing it now| exists)", "".join(words), re.M)
    export(cases, tmp_path / "uninterrupted")
    assert contents(tmp_path / "hf") == contents(tmp_path / "uninterrupted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "uninterrupted"]


def test_a_failure_removes_also_what_an_earlier_try_finished(cases: Path, tmp_path: Path) -> None:
    """Damage, found while writing: what was kept would wait for a repair that may never come."""
    save = Path(shutil.copytree(cases / "gqa_padded", tmp_path / "save"))
    done = python(KILLED_IN_THE_MIDDLE, save, tmp_path / "hf")
    assert done.returncode == -signal.SIGKILL, done.stderr
    place = Checkpoint.open(save).tensors["output_layer.weight"].chunks[0].stored
    data = save / "iter_0000007" / place.file_name
    before = data.stat()
    with data.open("r+b") as file:
        file.seek(place.start)
        file.write(bytes(place.length))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))  # else the earlier try would not count
    with pytest.raises(CheckpointError, match=r"output_layer\.weight at byte .* is damaged"):
        export(tmp_path, tmp_path / "hf", "save")
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


def test_a_failed_comparison_leaves_nothing(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Path
) -> None:
    """The comparison cannot start: its interpreter is told of a Python that is not there."""
    monkeypatch.setenv("PYTHONHOME", str(tmp_path / "none"))
    with pytest.raises(ParityError, match="could not be compared"):
        export(cases, tmp_path / "hf", "mha", parity=True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_with_what_is_needed(cases: Path, tmp_path: Path) -> None:
    """No file may grow beyond 150 kB: what the disk says then is what a full one says."""
    arguments = ("--load", cases / "gqa_padded", "--output", tmp_path / "hf", "--no-parity")
    done = python(LIMITED, REPOSITORY / "tools" / "convert_to_hf.py", 150_000, *arguments)
    assert done.returncode == 2, done.stderr
    assert re.search(
        r"^error: --output .*hf: 67,\d{3},\d{3} bytes are needed there, [\d,]+ were free at the start; "
        r"cannot write model\.safetensors \([\d,]+ bytes written\): File too large$",
        done.stderr,
        re.M,
    ), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_during_an_import_is_named_with_what_is_needed(cases: Path, tmp_path: Path) -> None:
    """torch's writer turns the refusal into errors of its own; the message is still the file system's."""
    export(cases, tmp_path / "hf")
    arguments = ("--load", tmp_path / "hf", "--save", tmp_path / "megatron", "--no-parity")
    done = python(LIMITED, REPOSITORY / "tools" / "convert_from_hf.py", 150_000, *arguments)
    assert done.returncode == 2, done.stderr
    assert re.search(
        r"^error: --save .*megatron: 67,\d{3},\d{3} bytes are needed there, [\d,]+ were free at the start; "
        r"cannot write __0_0\.distcp \([\d,]+ bytes written\): File too large$",
        done.stderr,
        re.M,
    ), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_too_little_space_is_said_before_anything_is_written(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real amount of free space, less what the test pretends that others have taken."""
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1_000_000))
    with pytest.raises(OutputError, match=r"--output .*hf: 67,\d{3},\d{3} bytes are needed there, 1,000,000 are free"):
        export(cases, tmp_path / "hf")
    with pytest.raises(OutputError, match=r"--save .*: \d+,\d{3},\d{3} bytes are needed there, 1,000,000 are free"):
        monkeypatch.undo()
        export(cases, tmp_path / "hf")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1_000_000))
        import_folder(tmp_path / "hf", tmp_path / "megatron", options=ImportOptions(parity=False))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
