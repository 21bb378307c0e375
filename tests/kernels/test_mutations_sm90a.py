"""Every barrier, wait, fence, arrival and commit of the sm_90a kernel is taken out once, and the emulation must notice.

As in test_mutations.py: lines are taken out while the emulation runs, and the list is read from the source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from emulation import Completion, Emulation, EmulationError, Order, Run
from synchronisation import synchronisations_sm90a

from megatron_ledom.ops.conformance import error
from megatron_ledom.ops.mask import AttentionMask
from megatron_ledom.ops.reference import reference_attention

FORWARD = "ledom_attention_forward_sm90a"
LIMIT = 0.05
MASK = AttentionMask(0, None)
# The likeliest to notice come first: the others are tried where it does not.
RUNS = [
    Run(Order.LAST, Completion.LAZY),
    Run(Order.FIRST, Completion.LAZY),
    *(Run(Order.RANDOM, Completion.RANDOM, seed) for seed in range(4)),
    *(Run(Order.RANDOM, Completion.LAZY, seed) for seed in range(4)),
]


@dataclass(frozen=True)
class Problem:
    """Inputs, and the right output."""

    inputs: list[torch.Tensor]
    exact: torch.Tensor


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Two blocks of rows; the first walks four tiles, both stages twice."""
    torch.manual_seed(3)
    inputs = [torch.randn(1, 386, 1, 64).to(torch.bfloat16) for _ in range(3)]
    exact, _ = reference_attention(*(x.double() for x in inputs), MASK)
    return Problem(inputs, exact)


def fault(emulation: Emulation, problem: Problem, run: Run) -> str | None:
    """What is wrong with the output, if anything."""
    try:
        output, _ = emulation.forward(*problem.inputs, MASK, run, FORWARD)
    except EmulationError as stopped:
        return str(stopped)
    off = error(output, problem.exact)
    if math.isnan(off):
        return f"{int(output.isnan().any(-1).sum())} rows are NaN"
    return f"the output is off by {off:.2f}" if off > LIMIT else None


def test_all_lines_are_found_and_reached(emulation: Emulation, problem: Problem) -> None:
    emulation.synchronisations.clear()
    for run in RUNS[:3]:
        assert fault(emulation, problem, run) is None
    assert emulation.synchronisations == set(synchronisations_sm90a()) and len(emulation.synchronisations) >= 35


def test_each_line_is_needed(emulation: Emulation, problem: Problem) -> None:
    unnoticed = []
    for (file, line), what in synchronisations_sm90a().items():
        for run in RUNS:
            found = fault(emulation, problem, Run(run.order, run.completion, run.seed, (file, line)))
            if found:
                print(f"{file}:{line} {what}: {run.order.name} {run.completion.name}: {found}")
                break
        else:
            unnoticed.append((file, line, what))
    assert not unnoticed
