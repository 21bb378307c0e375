"""Every barrier, wait and commit of the CUDA kernels is taken out once, and a check must notice.

The emulation takes a line out while it runs (`Run.removed`), so that the kernels need no macro for it, and the list is
read from the sources, so that a new barrier is in it. What orders only the reading of a warp before its own writing
cannot change a result on a machine that runs one thread at a time: the race detector finds it
(test_emulated_sanitizers.py).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from emulation import Completion, Emulation, EmulationError, Order, Run
from synchronisation import synchronisations

from megatron_ledom.ops.conformance import error
from megatron_ledom.ops.mask import AttentionMask
from megatron_ledom.ops.reference import reference_attention

LIMIT = 0.05
RUNS = [Run(order, completion) for completion, order in itertools.product((Completion.LAZY, Completion.RANDOM), Order)]


@dataclass(frozen=True)
class Problem:
    """Inputs, and what is right: output and gradients."""

    inputs: list[torch.Tensor]
    d_output: torch.Tensor
    results: tuple[torch.Tensor, torch.Tensor]
    exact: list[torch.Tensor]


MASK = AttentionMask(0, None)


@pytest.fixture(scope="module")
def problem(emulation: Emulation) -> Problem:
    """Two blocks of rows, four tiles of keys: both stages are used twice."""
    torch.manual_seed(3)
    inputs = [torch.randn(1, 250, 1, 64).to(torch.bfloat16) for _ in range(3)]
    d_output = torch.randn_like(inputs[0])
    wide = [x.double().requires_grad_() for x in inputs]
    output, _ = reference_attention(*wide, MASK)
    exact = [output.detach(), *torch.autograd.grad(output, wide, d_output.double())]
    return Problem(inputs, d_output, emulation.forward(*inputs, MASK, Run()), exact)


def fault(emulation: Emulation, problem: Problem, run: Run) -> str | None:
    """What is wrong with the results, if anything. The backward pass gets a sound forward's."""
    try:
        output, _ = emulation.forward(*problem.inputs, MASK, run)
        found = [output, *emulation.backward(problem.inputs, MASK, problem.results, problem.d_output, run)]
    except EmulationError as stopped:
        return str(stopped)
    for name, ours, exact in zip(("o", "d_q", "d_k", "d_v"), found, problem.exact, strict=True):
        off = error(ours, exact)
        if math.isnan(off):
            return f"{int(ours.isnan().any(-1).sum())} rows of {name} are NaN"
        if off > LIMIT:
            return f"{name} is off by {off:.2f}"
    return None


def test_all_lines_are_found_and_reached(emulation: Emulation, problem: Problem) -> None:
    emulation.synchronisations.clear()
    for run in RUNS:
        assert fault(emulation, problem, run) is None
    assert emulation.synchronisations == set(synchronisations()) and len(emulation.synchronisations) >= 14


def test_each_line_is_needed(emulation: Emulation, problem: Problem) -> None:
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
