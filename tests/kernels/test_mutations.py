"""Every barrier, wait and commit of the CUDA kernels is taken out once, and a check must notice.

The emulation takes a line out while it runs (`Run.removed`), so that the kernels need no macro for it, and the list is
read from the sources, so that a new barrier is in it. What orders only the reading of a warp before its own writing
cannot change a result on a machine that runs one thread at a time; the race detector finds it (test_sanitizers.py).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attention_cases import error
from emulation import Completion, Emulation, EmulationError, Order, Run
from synchronisation import synchronisations

from megatron_ledom.ops.mask import AttentionMask
from megatron_ledom.ops.reference import reference_attention

LIMIT = 0.05
RUNS = [Run(order, completion) for completion, order in itertools.product((Completion.LAZY, Completion.RANDOM), Order)]


@pytest.fixture(scope="module")
def problem() -> list[torch.Tensor]:
    """Two blocks of rows, four tiles of keys: both stages are used twice."""
    torch.manual_seed(3)
    return [torch.randn(1, 250, 1, 64).to(torch.bfloat16) for _ in range(3)]


def fault(emulation: Emulation, problem: list[torch.Tensor], run: Run) -> str | None:
    """What is wrong with the results, if anything."""
    mask = AttentionMask(0, None)
    exact, _ = reference_attention(*problem, mask)
    try:
        output, _ = emulation.forward(*problem, mask, run)
    except EmulationError as stopped:
        return str(stopped)
    off = error(output, exact)
    if math.isnan(off):
        return f"{int(output.isnan().any(-1).sum())} rows of the output are NaN"
    return None if off < LIMIT else f"the output is off by {off:.2f}"


def test_all_lines_are_found_and_reached(emulation: Emulation, problem: list[torch.Tensor]) -> None:
    emulation.synchronisations.clear()
    for run in RUNS:
        assert fault(emulation, problem, run) is None
    assert emulation.synchronisations == set(synchronisations()) and len(emulation.synchronisations) >= 6


def test_each_line_is_needed(emulation: Emulation, problem: list[torch.Tensor]) -> None:
    unnoticed = {}
    for (file, line), what in synchronisations().items():
        found = {run: fault(emulation, problem, Run(run.order, run.completion, removed=(file, line))) for run in RUNS}
        noticed = {run: text for run, text in found.items() if text}
        if not noticed:
            unnoticed[file, line] = what
        first = next(iter(noticed.items()), None)
        print(
            f"{file}:{line} {what}: noticed in {len(noticed)} of {len(RUNS)} runs"
            + (f"; {first[0].order.name} {first[0].completion.name}: {first[1]}" if first else "")
        )
    # The barrier before a warp overwrites what it has read.
    assert list(unnoticed.values()) == ["__syncwarp"], unnoticed
