"""scripts/ensure_compiler.sh: finds a compiler that can build the kernels, installs one as root, or says what to do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ledom.testing import REPOSITORY

SCRIPT = REPOSITORY / "scripts/ensure_compiler.sh"
# "Installs" the compiler of this machine, and leaves a trace of what it was asked for.
APT = """#!/bin/sh
echo "$@" >> {log}
case "$1" in install) ln -s {compiler} {folder}/g++ ;; esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The PATH of a machine without a compiler, whose user is no root."""
    for program in ("bash", "grep"):
        (tmp_path / program).symlink_to(Path(shutil.which(program) or "missing").resolve())
    write_program(tmp_path / "id", "#!/bin/sh\necho 1000\n")
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def run(machine: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("bash") or "bash", str(SCRIPT), *arguments]
    variables = {"PATH": str(machine), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=60)


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    assert found is not None, "the tests need a C++ compiler; scripts/ensure_compiler.sh says how to get one"
    return str(Path(found).resolve())


def test_a_working_compiler_is_enough(machine: Path) -> None:
    tools = f"{machine}:/usr/bin:/bin"  # the compiler's own programs
    for arguments in ((), ("--check",)):
        done = run(machine, *arguments, CXX=compiler(), PATH=tools)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_one_the_user_is_told_and_the_set_up_goes_on(machine: Path) -> None:
    write_program(machine / "c++", "#!/bin/sh\nexit 1\n")  # has no OpenMP
    done = run(machine)
    assert done.returncode == 0
    assert "attention takes torch's path" in done.stderr and "apt-get install g++" in done.stderr
    checked = run(machine, "--check")
    assert (checked.returncode, checked.stderr) == (1, "")


def test_root_installs_one(machine: Path) -> None:
    write_program(machine / "id", "#!/bin/sh\necho 0\n")
    apt = APT.format(log=machine / "asked", compiler=compiler(), folder=machine)
    write_program(machine / "apt-get", apt)
    (machine / "ln").symlink_to(Path(shutil.which("ln") or "missing").resolve())
    for program in ("as", "cc1plus"):
        if found := shutil.which(program):
            (machine / program).symlink_to(Path(found).resolve())
    done = run(machine)
    assert "installing g++" in done.stderr
    assert (machine / "asked").read_text() == "update\ninstall --yes --no-install-recommends g++\n"
    assert "apt-get install" not in done.stderr, "the compiler that was installed works"
