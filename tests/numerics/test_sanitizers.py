"""The CPU kernels under the address and undefined-behaviour sanitizers, against a plain double loop in C++."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ledom.ops.kernels import cpu_paths
from megatron_ledom.testing import REPOSITORY

KERNELS = "csrc/reversed_attention/cpu"
LAYERS = "csrc/layers/cpu"
CHECKS = {
    "attention": ("csrc/tests/attention_check.cpp", f"{KERNELS}/dispatch.cpp", f"{KERNELS}/attention_portable.cpp"),
    "layers": (
        *("csrc/tests/layers_check.cpp", f"{LAYERS}/dispatch.cpp", f"{LAYERS}/layers_portable.cpp"),
        f"{KERNELS}/dispatch.cpp",  # the words for a status are there
        f"{KERNELS}/attention_portable.cpp",
    ),
}
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
# The portable source takes the width of its vectors from the flags, so each set of flags is another set of kernels.
FLAGS = {"portable": (), "avx2": ("-mavx2", "-mfma"), "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mfma")}


@pytest.mark.parametrize("name", CHECKS)
def test_no_byte_out_of_bounds_and_nothing_undefined(name: str, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler, "the kernels were built on this machine, but its compiler is gone: set CXX"
    path = cpu_paths()[0]
    program = tmp_path / "check"
    flags = ["-std=c++17", "-O1", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi", *FLAGS[path], *SANITIZERS, "-Icsrc"]
    command = [compiler, *flags, *CHECKS[name], "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    # libgomp keeps its threads until the end, which the leak check would report.
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=env, check=False)
    print(path, done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.startswith("worst error ")
