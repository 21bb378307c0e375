"""nvcc: the one on PATH, or the one that the development extra installs; and a disassembler, from there."""

from __future__ import annotations

import re
import shutil
import sysconfig
from pathlib import Path

from emulation import CSRC, run_command

INSTALLED = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"


def find_nvcc() -> Path:
    """Where nvcc is; without it the tests that need it fail."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=str(INSTALLED))
    assert found, "no nvcc on PATH, and nvidia-cuda-nvcc is not installed: pip install -e '.[dev]'"
    return Path(found)


def compile_cuda(source: Path, to: Path, *flags: str) -> str:
    """Compile a `.cu` file; returns what nvcc and ptxas say."""
    return run_command([str(find_nvcc()), "-std=c++17", "-O3", f"-I{CSRC}", *flags, str(source), "-o", str(to)])


def opcodes_of(cubin: Path) -> dict[str, set[str]]:
    """The machine instructions of every kernel of a cubin: its name -> their opcodes with all modifiers."""
    disassembler = INSTALLED / "nvdisasm"
    assert disassembler.is_file(), "nvidia-cuda-nvdisasm is not installed: pip install -e '.[dev]'"
    text = run_command([str(disassembler), "-c", str(cubin)])
    kernels: dict[str, set[str]] = {}
    name = ""
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            name = section[1]
            kernels[name] = set()
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]\s+)?([A-Z][A-Z0-9_.]*)", line):
            kernels[name].add(instruction[1])
    return kernels
