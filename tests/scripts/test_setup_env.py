"""scripts/setup_env.sh on a small project of its own: made once, reused, mended when unfinished, broken or moved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom.testing import REPOSITORY

PROJECT = """[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "probe"
version = "1"

[project.optional-dependencies]
dev = []
"""
# A build backend without dependencies, so that pip needs no network here.
BACKEND = """
import pathlib, zipfile

META = "Metadata-Version: 2.1\\nName: probe\\nVersion: 1\\nProvides-Extra: dev\\n"
FILES = {
    "probe-1.dist-info/METADATA": META,
    "probe-1.dist-info/WHEEL": "Wheel-Version: 1.0\\nGenerator: probe\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    "probe.py": "VALUE = 1\\n",
}


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "probe-1-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory, name), "w") as wheel:
        for path, text in FILES.items():
            wheel.writestr(path, text)
        wheel.writestr("probe-1.dist-info/RECORD", "".join(f"{p},,\\n" for p in [*FILES, "probe-1.dist-info/RECORD"]))
    return name


build_wheel = build_editable
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    for script in ("setup_env.sh", "find_python.sh", "ensure_compiler.sh"):
        shutil.copy2(REPOSITORY / "scripts" / script, folder / "scripts" / script)
    for name, text in {
        "pyproject.toml": PROJECT,
        "setup.py": "",
        "backend.py": BACKEND,
        "scripts/check_imports.py": "import probe\nassert probe.VALUE == 1\n",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def set_up(checkout: Path, status: int = 0) -> str:
    environment = {**os.environ, "PYTHON": str(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))}
    result = subprocess.run(
        [checkout / "scripts/setup_env.sh"], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stderr


def probe_value(checkout: Path) -> str:
    command = [checkout / ".venv/bin/python", "-c", "import probe; print(probe.VALUE)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_made_once_then_reused_then_mended(checkout: Path) -> None:
    assert "making .venv with" in set_up(checkout)
    assert probe_value(checkout) == "1"
    assert set_up(checkout) == "", "a complete environment is left alone, without a word"

    (checkout / ".venv/.complete").unlink()  # killed before the end
    mended = set_up(checkout)
    assert "mending it" in mended
    assert "making" not in mended

    (checkout / "pyproject.toml").write_text(PROJECT.replace("dev = []", "dev = []\nmore = []"), encoding="utf-8")
    assert "mending it" in set_up(checkout), "new metadata"
    assert set_up(checkout) == ""


def test_a_half_made_broken_or_moved_environment_is_made_anew(checkout: Path) -> None:
    half_made = checkout / ".venv"
    half_made.mkdir()
    (half_made / ".ledom").touch()  # killed while the environment was being made
    first = set_up(checkout)
    assert "removing the unusable .venv" in first
    assert probe_value(checkout) == "1"

    (half_made / "bin" / "python").unlink()  # the interpreter it was made with has been removed
    (half_made / "bin" / "python").symlink_to("/nowhere/python3")
    assert "making .venv with" in set_up(checkout)
    assert probe_value(checkout) == "1"

    moved = checkout.rename(checkout.parent / "elsewhere")  # the scripts in an environment hold absolute paths
    assert "making .venv with" in set_up(moved)
    assert probe_value(moved) == "1"


def test_an_environment_that_installs_but_cannot_be_imported_fails_at_last(checkout: Path) -> None:
    (checkout / "scripts/check_imports.py").write_text("import absent_module\n", encoding="utf-8")
    message = set_up(checkout, status=1)
    assert "absent_module" in message
    assert not (checkout / ".venv/.complete").exists()
    again = set_up(checkout, status=1)
    assert "starting over" in again


def test_a_folder_of_someone_elses_is_not_removed(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv/precious").touch()
    assert "is no virtual environment" in set_up(checkout, status=1)
    assert (checkout / ".venv/precious").exists()
