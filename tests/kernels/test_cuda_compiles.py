"""nvcc takes the kernels for every architecture that they are built for; what ptxas says about registers and memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulation import kernel_sources
from nvcc import compile_cuda

ARCHITECTURES = ("80", "90")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_\d+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", kernel_sources(), ids=lambda path: path.stem)
def test_kernels_compile_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    flags = ("-gencode", code, "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings")
    said = compile_cuda(source, tmp_path / "kernels.cubin", *flags)
    entries = list(ENTRY.finditer(said))
    assert len(entries) == said.count("Compiling entry function") >= 1, said
    for entry in entries:
        print(f"sm_{architecture} {entry['name']}: {entry['registers']} registers")
        assert (entry["stack"], entry["stores"], entry["loads"]) == ("0", "0", "0"), entry[0]
    assert not re.search(r"C75\d\d|warning", said), said
