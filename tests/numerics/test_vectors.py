"""The CPU kernels' own powers, compiled as for each instruction set; and that each is asked of a processor."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ledom.ops.kernels import cpu_paths
from megatron_ledom.testing import REPOSITORY

FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
}


@pytest.mark.parametrize("path", cpu_paths())
def test_powers_keep_nan_of_every_payload(path: str, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler, "the kernels were built on this machine, but its compiler is gone: set CXX"
    program = tmp_path / "check"
    flags = ["-std=c++17", "-O2", "-ffp-contract=fast", "-Wno-psabi", *FLAGS[path], "-Icsrc"]
    command = [compiler, *flags, "csrc/tests/vector_check.cpp", "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith(" 0 faults\n"), done.stdout[-2000:]


def test_every_flag_of_the_build_is_asked_of_the_processor() -> None:
    """What a processor lacks it would meet as an illegal instruction."""
    build = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    asked = (REPOSITORY / "csrc/common/cpu/features.h").read_text(encoding="utf-8")
    for path in ("avx2", "avx512"):
        (words,) = re.findall(rf'SOURCES\[f"{{_stem}}_{path}\.cpp"\] = \[(.*)\]', build)
        (body,) = re.findall(rf"bool has_{path}\(\) {{(.*?)}}", asked, re.S)
        wanted = set(re.findall(r'"-m(\w+)"', words))
        assert wanted and wanted == set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', body)), path
        for dispatch in ("csrc/layers/cpu/dispatch.cpp", "csrc/reversed_attention/cpu/dispatch.cpp"):
            text = (REPOSITORY / dispatch).read_text(encoding="utf-8")
            assert f"ledom::has_{path}()" in text and "__builtin_cpu_supports" not in text, dispatch
