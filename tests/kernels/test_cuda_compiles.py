"""nvcc takes the kernels for every architecture that they are built for: what ptxas says, which instructions result.

Nothing here ran on a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulation import kernel_sources
from nvcc import compile_cuda, opcodes_of

ARCHITECTURES = ("80", "90")
# Tensor cores, matrix loads plain and transposed, asynchronous copies past the first cache, their wait, barriers.
NEEDED = ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128", "DEPBAR", "BAR.SYNC")
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
    cubin = tmp_path / "kernels.cubin"
    said = compile_cuda(source, cubin, *flags)
    entries = list(ENTRY.finditer(said))
    assert len(entries) == said.count("Compiling entry function") >= 1, said
    for entry in entries:
        print(f"sm_{architecture} {entry['name']}: {entry['registers']} registers")
        assert (entry["stack"], entry["stores"], entry["loads"]) == ("0", "0", "0"), entry[0]
    assert not re.search(r"C75\d\d|warning", said), said
    kernels = opcodes_of(cubin)
    assert set(kernels) == {entry["name"] for entry in entries}
    for name, opcodes in kernels.items():
        # Local memory, and what would make sums depend on the order of blocks.
        assert not {code for code in opcodes if re.match(r"LDL|STL|ATOM|RED\b", code)}, (name, sorted(opcodes))
        if not re.search("attention_delta|rope", name):  # they multiply no matrices
            missing = [code for code in NEEDED if not any(found.startswith(code) for found in opcodes)]
            assert not missing, (name, missing, sorted(opcodes))
