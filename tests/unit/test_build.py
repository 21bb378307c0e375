"""setup.py: what it leaves of earlier builds, what nvcc hears, and what an sdist holds. Nothing is compiled here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from megatron_ledom.testing import REPOSITORY

SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
EXTENSIONS = [f"megatron_ledom/ops/_kernels{SUFFIX}", f"megatron_ledom/data/_records{SUFFIX}"]


def tracked(*folders: str) -> list[str]:
    command = ["git", "ls-files", "-z", *folders]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode()
    return [name for name in said.split("\0") if name]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads."""
    names = ("csrc", "megatron_ledom", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
    for name in tracked(*names):
        to = tmp_path / "tree" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, to)
    return tmp_path / "tree"


def build(tree: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    missing = {"CC": str(tree / "no-compiler"), "CXX": str(tree / "no-compiler"), "LEDOM_KERNELS": "auto"}
    env = {**os.environ, **missing, **environment}
    command = [sys.executable, "setup.py", "-q", *words]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("wish", ["none", "auto"])
def test_what_is_not_built_leaves_no_earlier_extension(tree: Path, wish: str) -> None:
    in_place = [tree / name for name in EXTENSIONS]
    built = [tree / "lib" / name for name in EXTENSIONS]
    for path in (*in_place, *built):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of an earlier build")
    words = ("build_ext", "--build-lib", "lib", "--build-temp", "objects")
    done = build(tree, *words, LEDOM_KERNELS=wish)
    assert done.returncode == 0 and "not built" in done.stdout.lower(), done.stdout + done.stderr
    assert done.stdout.count("removed that of an earlier build: ") == 2 and not any(p.exists() for p in built)
    assert all(path.exists() for path in in_place), "nobody asked for anything in place"
    for path in built:
        path.write_bytes(b"of an earlier build")
    done = build(tree, *words, "--inplace", LEDOM_KERNELS=wish)
    assert done.returncode == 0, done.stderr
    assert not any(path.exists() for path in (*in_place, *built))
    assert done.stdout.count("removed that of an earlier build: ") == 4


def test_nvcc_hears_no_flags_of_the_environment(tree: Path) -> None:
    """They decide what the kernels are, and the hash that a verification goes by does not know them."""
    (tree / "lib64").mkdir()
    (tree / "include").mkdir()
    for name in ("lib64/libcudart_static.a", "include/cuda_runtime_api.h"):
        (tree / name).touch()
    log, nvcc = tree / "log", tree / "bin/nvcc"
    nvcc.parent.mkdir()
    heard = 'echo "$1 <$NVCC_PREPEND_FLAGS$NVCC_APPEND_FLAGS> <$CUDA_HOME>" >> ' + f"'{log}'"
    nvcc.write_text(f'#!/bin/sh\n{heard}\ncase "$1" in --version) echo V13.0.88;; --dryrun) ;; *) exit 1;; esac\n')
    nvcc.chmod(0o755)
    flags = {"NVCC_PREPEND_FLAGS": "-use_fast_math", "NVCC_APPEND_FLAGS": "-O0", "CUDA_HOME": "kept"}
    wishes = {"LEDOM_KERNELS": "required", "LEDOM_CUDA": "required", "CUDACXX": str(nvcc)}
    done = build(tree, "build_ext", "--build-lib", "lib", "--build-temp", "objects", **flags, **wishes)
    assert done.returncode != 0
    lines = log.read_text().splitlines()
    assert {line.split()[0] for line in lines} == {"--dryrun", "--version", "-std=c++17"}
    assert all(line.endswith(" <> <kept>") for line in lines), lines


def test_an_sdist_holds_all_that_a_build_needs(tree: Path) -> None:
    done = build(tree, "sdist", "--dist-dir", "dist")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = {*tracked("csrc", "megatron_ledom"), "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert len(needed) > 100 and needed <= held, sorted(needed - held)
