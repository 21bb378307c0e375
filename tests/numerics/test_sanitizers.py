"""csrc/ under the address and undefined-behaviour sanitizers: the CPU kernels against a plain double loop in C++, and
the reader of JSONL on lines that are damaged in every way.
"""

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


def run_check(sources: tuple[str, ...], more_flags: tuple[str, ...], folder: Path) -> str:
    """Compile a program with the sanitizers and run it; returns what it said."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler, "the extensions were built on this machine, but its compiler is gone: set CXX"
    program = folder / "check"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wno-psabi", *more_flags, *SANITIZERS, "-Icsrc"]
    command = [compiler, *flags, *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    # libgomp keeps its threads until the end, which the leak check would report.
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=env, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", CHECKS)
def test_no_byte_out_of_bounds_and_nothing_undefined(name: str, tmp_path: Path) -> None:
    flags = ("-fopenmp", "-ffp-contract=fast", *FLAGS[cpu_paths()[0]])
    assert run_check(CHECKS[name], flags, tmp_path).startswith("worst error ")


def test_no_line_makes_the_reader_look_beyond_it(tmp_path: Path) -> None:
    said = run_check(("csrc/tests/jsonl_check.cpp", "csrc/records/jsonl.cpp"), (), tmp_path)
    assert said.endswith(" 0 faults\n")
