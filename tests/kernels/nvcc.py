"""nvcc: the one on PATH, or the one that the package nvidia-cuda-nvcc of the development extra installs."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from emulation import CSRC, run_command


def find_nvcc() -> Path:
    """Where nvcc is; without it the tests that need it fail."""
    installed = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/nvcc"
    found = shutil.which("nvcc") or (str(installed) if installed.is_file() else None)
    assert found, "no nvcc on PATH, and nvidia-cuda-nvcc is not installed: pip install -e '.[dev]'"
    return Path(found)


def compile_cuda(source: Path, to: Path, *flags: str) -> str:
    """Compile a `.cu` file; returns what nvcc and ptxas say."""
    return run_command([str(find_nvcc()), "-std=c++17", "-O3", f"-I{CSRC}", *flags, str(source), "-o", str(to)])
