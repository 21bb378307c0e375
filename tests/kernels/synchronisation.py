"""Every line of the CUDA kernels that holds a barrier, a wait or a commit: each must be needed."""

from __future__ import annotations

import re

from emulation import KERNELS

CALL = re.compile(r"(?<!\w)(__syncthreads|__syncwarp|wait_for_copies<\d+>|commit_copies)\(")
HOME = "device.h"  # where they are defined


def synchronisations() -> dict[tuple[str, int], str]:
    """(file, line) -> what stands there."""
    found = {}
    for path in sorted(KERNELS.glob("*.h")):
        if path.name == HOME:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            code = line.partition("//")[0]
            if call := CALL.search(code):
                found[path.name, number] = call[1]
    return found
