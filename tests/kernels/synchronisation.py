"""Every line of the CUDA kernels that holds a barrier, a wait or a commit: each must be needed."""

from __future__ import annotations

import re

from emulation import KERNELS

CALL = re.compile(r"(?<!\w)(__syncthreads|__syncwarp|wait_for_copies<\d+>|commit_copies)\(")
CALL_SM90A = re.compile(
    r"(?<!\w)(__syncthreads|__syncwarp|init_barrier|publish_barriers|arrive|arrive_as_warp|arrive_expecting|wait"
    r"|commit_stores|wait_for_stores|fence_for_copies|wait_at_barrier|pass_barrier|begin_products|commit_products"
    r"|wait_for_products<\d+>|(?:keep|take)_registers<[^>]+>)\("
)
HOMES = ("device.h", "device_sm90a.h")  # where they are defined


def lines_with(call: re.Pattern[str], sm90a: bool) -> dict[tuple[str, int], str]:
    """(file, line) -> what stands there, in the kernels for sm_90a or in the others."""
    found = {}
    for path in sorted(KERNELS.glob("*.h")):
        if path.name in HOMES or ("sm90a" in path.name) != sm90a:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            code = line.partition("//")[0]
            if match := call.search(code):
                found[path.name, number] = match[1]
    return found


def synchronisations() -> dict[tuple[str, int], str]:
    """Of the kernels for sm_80 and later."""
    return lines_with(CALL, False)


def synchronisations_sm90a() -> dict[tuple[str, int], str]:
    """Of the kernels for sm_90a, with what orders asynchronous work."""
    return lines_with(CALL_SM90A, True)
