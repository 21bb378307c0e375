"""scripts/ensure_slurm.sh: says nothing where Slurm is, installs it as root, or says what to do and fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ledom.testing import REPOSITORY

SCRIPT = REPOSITORY / "scripts/ensure_slurm.sh"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
# "Installs" programs of these names once its lists of packages are new, and leaves a trace of what it was asked for.
APT = """#!/bin/sh
echo "$@" >> {folder}/log
case "$1" in
  update) touch {folder}/updated ;;
  install)
    [ -e {folder}/updated ] || exit 100
    for name in {programs}; do ln -s {bash} {folder}/$name; done ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The PATH of a machine without Slurm, whose user is no root."""
    for program in ("bash", "touch", "ln"):
        (tmp_path / program).symlink_to(Path(shutil.which(program) or "missing").resolve())
    write_program(tmp_path / "id", "#!/bin/sh\necho 1000\n")
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def run(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("bash") or "bash", str(SCRIPT), *arguments]
    environment = {"PATH": str(machine)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)


def test_without_slurm_and_root_it_fails_and_says_what_to_install(machine: Path) -> None:
    done = run(machine)
    assert done.returncode == 1
    assert "apt-get install slurmctld slurmd slurm-client munge" in done.stderr
    assert run(machine, "--check").returncode == 1
    assert run(machine, "--check").stderr == ""


def test_root_gets_it_installed_with_lists_of_packages_that_are_new(machine: Path) -> None:
    write_program(machine / "id", "#!/bin/sh\necho 0\n")
    bash = shutil.which("bash")
    write_program(machine / "apt-get", APT.format(folder=machine, programs=" ".join(PROGRAMS), bash=bash))
    done = run(machine)
    assert done.returncode == 0, done.stderr
    wanted = "install --yes --no-install-recommends slurmctld slurmd slurm-client munge"
    assert (machine / "log").read_text().splitlines() == [wanted, "update", wanted]
    assert run(machine, "--check").returncode == 0
    assert run(machine).stderr == "", "there now, so nothing is said"
