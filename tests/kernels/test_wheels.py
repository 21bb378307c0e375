"""The wheel, built with and without CUDA kernels: both are imported without torch, CUDA or a driver, and say what they
hold.

The one without is built where CUDA was wished for and its compiler fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from emulation import run_command
from nvcc import find_nvcc

from megatron_ledom.testing import REPOSITORY

DESCRIBE = """
import sys
sys.path.insert(0, sys.argv[1])
from megatron_ledom.ops.kernels import cuda_variants, describe_kernels, kernels
print(describe_kernels())
print([variant.name for variant in cuda_variants()])
from megatron_ledom.data.records import compiled_reader
assert compiled_reader()(b'{"text": "a"}', ["text"]) == ([[b"a"]], [])
call = kernels().Call(1, [1, 1, 1, 1, 64], [1, 0], [0, 0], 1.0, 1, 0, 0)
try:
    kernels().attention_forward(call, [[64, 64, 64, 64]] * 4, 64, "sm80")
except Exception as error:
    print(type(error).__name__, error)
else:
    print("started")
assert not {"torch", "numpy"} & set(sys.modules)
"""


def build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """Build in a copy of the sources; returns the wheel and what was said."""
    tree = folder / "tree"
    tree.mkdir()
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout.decode()
    for name in files.split("\0"):
        if name.startswith(("csrc/", "megatron_ledom/", "setup.py", "pyproject.toml", "README.md", "LICENSE")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((REPOSITORY / name).read_bytes())
    env = {**os.environ, "LEDOM_KERNELS": "required", **environment}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    return wheel, done.stdout


def describe(wheel: Path) -> list[str]:
    """Unpack a wheel and let a bare interpreter say what it holds."""
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    (library,) = folder.glob("megatron_ledom/ops/_kernels*.so")
    needed = run_command(["readelf", "-d", str(library)])
    assert "libgomp" in needed and "cuda" not in needed, needed
    (reader,) = folder.glob("megatron_ledom/data/_records*.so")
    assert "libgomp" not in run_command(["readelf", "-d", str(reader)])
    exported = run_command(["nm", "-D", "--defined-only", str(library)]).splitlines()
    assert any("PyInit__kernels" in line for line in exported)
    assert not [line for line in exported if "cuda" in line.lower()], "the runtime's names must not be seen by others"
    said = run_command([sys.executable, "-I", "-S", "-c", DESCRIBE, str(folder)])
    print(said)
    return said.splitlines()


def test_without_cuda(tmp_path: Path) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    wheel, said = build_wheel(tmp_path, LEDOM_CUDA="auto", CUDACXX=str(compiler))
    assert "CUDA kernels NOT BUILT: " in said and "built for the CPU only" in said
    words, variants, error = describe(wheel)
    assert "CUDA kernels: not in this build; build it with `LEDOM_CUDA=required" in words
    assert (variants, error) == ("[]", "ValueError this build, or this processor, has no such path")


def test_with_cuda(tmp_path: Path) -> None:
    wheel, said = build_wheel(tmp_path, LEDOM_CUDA="required", CUDACXX=str(find_nvcc()))
    assert "built with CUDA by nvcc " in said and "forward.cu" in said
    words, variants, error = describe(wheel)
    assert "CUDA kernels: " in words and " by nvcc " in words and " with runtime " in words
    assert "'sm80'" in variants
    # Where there is a driver a kernel starts, on an address that it finds wrong only later.
    assert error.startswith("RuntimeError CUDA error 35: " if "no CUDA driver" in words else "started"), error


def test_cuda_that_is_required_and_missing_stops_the_build(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    env = {**os.environ, "LEDOM_KERNELS": "required", "LEDOM_CUDA": "required", "CUDACXX": sys.executable}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=env, check=False)
    assert done.returncode != 0 and "libcudart_static.a" in done.stderr, done.stderr
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=env | {"LEDOM_CUDA": "yes"}, check=False
    )
    assert done.returncode != 0 and "LEDOM_CUDA=yes: give none, auto or required" in done.stderr, done.stderr
