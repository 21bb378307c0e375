"""The PTX that nvcc writes for the kernels, interpreted, against float64: at most twice the error of torch in bf16.

Nothing here ran on a GPU: docs/kernels-cuda.md says what that leaves open.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from emulation import kernel_sources
from nvcc import compile_cuda
from ptx.launches import Interpreter
from ptx.program import parse

from megatron_ledom.ops.conformance import (
    Expected,
    Problem,
    Results,
    exact_results,
    judge,
    judge_rope,
    masks,
    random_problem,
)

HEADS = ((2, 2), (4, 2), (3, 1))
FORWARDS = ("ledom_attention_forward_cuda", "ledom_attention_forward_sm90a")
SOME = ("causal", "reversed", "reversed, window 37", "reversed, window 20, documents")
FEW = SOME[1::2]  # without documents, with documents
# One row; a tile of keys and a bit; blocks of rows, tiles of keys and a bit: every mask once, the largest with a few.
SHAPES = {(1, 64): SOME, (97, 64): tuple(masks(1, 97)), (97, 128): SOME, (97, 192): SOME, (193, 64): SOME,
          (193, 128): FEW, (193, 192): FEW}  # fmt: skip
LSE_TOLERANCE = 2e-6


def problems(seq: int, head_dim: int) -> list[tuple[str, Problem]]:
    """A problem for each mask; groupings of heads take turns."""
    found, turns = [], itertools.cycle(HEADS)
    for name in SHAPES[seq, head_dim]:
        heads, groups = next(turns)
        batch = 2 if groups == 2 else 1
        found.append((name, random_problem(masks(batch, seq)[name], batch, seq, heads, groups, head_dim, seed=seq)))
    return found


@pytest.mark.parametrize(("seq", "head_dim"), SHAPES)
def test_errors_are_at_most_twice_torchs(interpreter: Interpreter, seq: int, head_dim: int) -> None:
    worst, faults = {}, []
    for name, problem in problems(seq, head_dim):
        expected = Expected.of(problem)
        gradients: tuple[torch.Tensor, ...] | None = None
        for forward in FORWARDS:
            results = interpreter.forward(*problem.inputs, problem.mask, forward)
            # There is one backward pass: that of sm_80, which gets the first forward's results.
            gradients = gradients or interpreter.backward(problem.inputs, problem.mask, results, problem.d_o)
            verdict = judge(expected, (*results, *gradients), lse_tolerance=LSE_TOLERANCE)
            worst[forward] = max(worst.get(forward, 0.0), verdict.worst)
            faults += [f"{forward}, {name}: {fault}" for fault in verdict.faults]
    print(f"S {seq} D {head_dim}: of what is allowed the worst is {', '.join(f'{w:.2f}' for w in worst.values())}")
    assert not faults, "\n".join(faults)


def results_of(interpreter: Interpreter, problem: Problem) -> Results:
    results = interpreter.forward(*problem.inputs, problem.mask)
    return (*results, *interpreter.backward(problem.inputs, problem.mask, results, problem.d_o))


def test_strides_are_the_tensors_own(interpreter: Interpreter) -> None:
    """Megatron's layout [S, B, H, D], and q, k and v in one tensor."""
    torch.manual_seed(6)
    packed = torch.randn(70, 2, 4, 64 * 3).to(torch.bfloat16).transpose(0, 1)
    d_o = torch.randn(70, 2, 4, 64).to(torch.bfloat16).transpose(0, 1)
    problem = Problem(*packed.split(64, dim=3), d_o, masks(2, 70)["reversed"])
    verdict = judge(Expected(exact_results(problem), [0.0] * 4), results_of(interpreter, problem), floor=0.01)
    assert not verdict.faults, verdict.faults
    whole = Problem(*(x.contiguous() for x in (*problem.inputs, d_o)), problem.mask)
    for ours, first in zip(results_of(interpreter, problem), results_of(interpreter, whole), strict=True):
        assert torch.equal(ours, first)
    box = [interpreter.forward(*p.inputs, p.mask, FORWARDS[1]) for p in (problem, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*box, strict=True))


@pytest.mark.parametrize("rotary_dim", [40, 44])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rotary_positions(interpreter: Interpreter, dtype: torch.dtype, rotary_dim: int) -> None:
    """Of 48 elements 40 in wide accesses, with a rest; 44 one by one."""
    verdict = judge_rope(interpreter.rope, "cpu", dtype, rotary_dim=rotary_dim)
    print(f"{dtype} R {rotary_dim}: the worst error is {verdict.worst:.2f} of what is allowed")
    assert not verdict.faults, "\n".join(verdict.faults)


def test_every_kernel_of_the_ptx_is_run(interpreter: Interpreter) -> None:
    """None is left out of the tests above: all head sizes, dtypes and widths are started by their launchers."""
    names = {name for module in interpreter.modules for name in module.kernels}
    assert names and names == interpreter.started


def test_lines_of_the_source_change_no_instruction(ptx_texts: dict[str, str], tmp_path: Path) -> None:
    """What is interpreted is compiled with `-lineinfo`; without it nvcc writes the same instructions."""
    (source,) = (x for x in kernel_sources() if x.stem == "rope")
    compile_cuda(source, tmp_path / "plain.ptx", "-ptx", "-arch=compute_80")
    plain, lines = parse((tmp_path / "plain.ptx").read_text(encoding="utf-8")), parse(ptx_texts["rope"])
    assert plain.kernels and plain.kernels.keys() == lines.kernels.keys()
    for name, kernel in plain.kernels.items():
        assert [x.text for x in kernel.instructions] == [x.text for x in lines.kernels[name].instructions]
