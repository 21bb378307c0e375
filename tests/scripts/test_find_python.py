"""scripts/find_python.sh: finds an interpreter that runs, is not fooled, and says what it looked at."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_ledom.testing import REPOSITORY

SCRIPT = REPOSITORY / "scripts/find_python.sh"
THIS_PYTHON = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
REFUSING_SHIM = "#!/bin/sh\necho 'manager: python3.12: command not found' >&2\nexit 127\n"
WITHOUT_ENSUREPIP = "#!/bin/sh\necho 3.12\necho \"ModuleNotFoundError: No module named 'ensurepip'\" >&2\nexit 1\n"
OLD = "#!/bin/sh\necho 3.9\n"
TOO_NEW = "#!/bin/sh\necho 3.14\n"


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with an empty home and a PATH of one folder, without any Python."""
    for name in ("bin", "home"):
        (tmp_path / name).mkdir()
    for program in ("awk", "bash"):
        (tmp_path / "bin" / program).symlink_to(Path(shutil.which(program) or "missing").resolve())
    return tmp_path


def find_python(machine: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    fixed = {"PATH": str(machine / "bin"), "HOME": str(machine / "home"), "SYSTEM_PYTHON_FOLDERS": ""}
    return subprocess.run(
        ["bash", str(SCRIPT)], capture_output=True, text=True, env=fixed | environment, check=False, timeout=60
    )


def link_this_python(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(THIS_PYTHON)
    return path


def test_no_python_at_all(machine: Path) -> None:
    result = find_python(machine)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "no usable Python" in result.stderr
    assert "apt install python3.12" in result.stderr


def test_a_shim_that_refuses_does_not_fool_it(machine: Path) -> None:
    write_program(machine / "bin/python3.12", REFUSING_SHIM)
    write_program(machine / "bin/python3", OLD)
    refused = find_python(machine)
    assert refused.returncode == 1
    assert "bin/python3.12: does not run (manager: python3.12: command not found)" in refused.stderr
    assert "bin/python3: is Python 3.9" in refused.stderr

    hidden = link_this_python(machine / "home/.pyenv/versions/3.12.99/bin" / THIS_PYTHON.name)
    found = find_python(machine)
    assert (found.returncode, found.stdout.strip()) == (0, str(hidden))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (WITHOUT_ENSUREPIP, "without the modules venv and ensurepip"),
        (TOO_NEW, "is Python 3.14"),
        (OLD, "is Python 3.9"),
    ],
)
def test_unusable_interpreters_are_named_with_the_reason(machine: Path, program: str, reason: str) -> None:
    path = write_program(machine / "bin/python3.12", program)
    result = find_python(machine)
    assert result.returncode == 1
    assert f"{path}: " in result.stderr
    assert reason in result.stderr


@pytest.mark.parametrize(
    "place",
    [
        *("home/.local/share/uv/python/cpython-x/bin", "home/.asdf/installs/python/x/bin"),
        *("home/.local/share/mise/installs/python/x/bin", "home/miniforge3/envs/some/bin", "bin"),
    ],
)
def test_places_where_it_looks(machine: Path, place: str) -> None:
    path = link_this_python(machine / place / THIS_PYTHON.name)
    result = find_python(machine)
    assert (result.returncode, result.stdout.strip()) == (0, str(path)), result.stderr


def test_system_folders(machine: Path) -> None:
    path = link_this_python(machine / "opt/tool/bin" / THIS_PYTHON.name)
    result = find_python(machine, SYSTEM_PYTHON_FOLDERS=f"{machine}/opt/*/bin /nowhere/bin")
    assert (result.returncode, result.stdout.strip()) == (0, str(path)), result.stderr


def test_the_preferred_version_wins_wherever_it_lies(machine: Path) -> None:
    """3.12 in a manager's folder before 3.13 on PATH. (Programs that only answer the probe, as one machine has one.)"""
    write_program(machine / "bin/python3.13", "#!/bin/sh\necho 3.13\n")
    preferred = write_program(machine / "home/.pyenv/versions/x/bin/python3.12", "#!/bin/sh\necho 3.12\n")
    assert find_python(machine).stdout.strip() == str(preferred)


def test_the_variable_comes_first_and_a_useless_one_is_reported(machine: Path) -> None:
    other = link_this_python(machine / "elsewhere" / "my-python")
    on_path = link_this_python(machine / "bin" / THIS_PYTHON.name)
    assert find_python(machine, PYTHON=str(other)).stdout.strip() == str(other)
    useless = find_python(machine, PYTHON="/nowhere/python")
    assert useless.stdout.strip() == str(on_path)
    assert "PYTHON=/nowhere/python not an executable file" in useless.stderr


def test_what_it_prints_is_a_python_that_runs() -> None:
    found = subprocess.run(
        [str(SCRIPT)], capture_output=True, text=True, check=True, env=dict(os.environ)
    ).stdout.strip()
    version = subprocess.run([found, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
    assert version.stdout.strip() in {"(3, 12)", "(3, 13)"}


def test_versions_agree_with_the_metadata() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    match = re.search(r'^supported="([^"]+)"', SCRIPT.read_text(encoding="utf-8"), re.M)
    assert match
    oldest = min(tuple(map(int, version.split("."))) for version in match[1].split())
    assert project["requires-python"].startswith(f">={oldest[0]}.{oldest[1]}")
