"""Faults in the PTX of a kernel, one at a time: the interpreter or the comparison with float64 must notice each.

They are in the text that nvcc wrote, after its front end: what an emulation of the source cannot see. A predicate that
only chooses between two ways to the same numbers may be negated without notice; each such line of the source is named.
"""

from __future__ import annotations

import dataclasses
import linecache
import re
from collections.abc import Iterator

import pytest
import torch
from ptx.launches import Interpreter
from ptx.mutations import AMPERE, HOPPER, Mutation, kernel_text
from ptx.program import PtxError, parse

from megatron_ledom.ops.conformance import Expected, Problem, Results, judge, random_problem
from megatron_ledom.ops.mask import AttentionMask, documents_from_lengths

MAX_STEPS = 60_000
KERNELS = {
    "forward": ("forward", "attention_forwardILi64E", AMPERE),
    "backward, keys": ("backward", "attention_backward_keysILi64E", AMPERE),
    "backward, queries": ("backward", "attention_backward_queriesILi64E", AMPERE),
    "forward, sm_90a": ("forward_sm90a", "attention_forward_sm90aILi64E", HOPPER),
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Two sequences; documents, one of them over nearly all; padding at both ends; both stages are used twice."""
    documents = documents_from_lengths(torch.tensor([3, 170, 390]), 2, 200)
    return random_problem(AttentionMask(0, None, documents), 2, 200, 2, 1, 64)


@pytest.fixture(scope="module")
def expected(problem: Problem) -> Expected:
    return Expected.of(problem)


@pytest.fixture(scope="module")
def sound(interpreter: Interpreter, problem: Problem) -> Results:
    results = interpreter.forward(*problem.inputs, problem.mask)
    return (*results, *interpreter.backward(problem.inputs, problem.mask, results, problem.d_o))


def fault(kernel: str, faulty: Interpreter, problem: Problem, expected: Expected, sound: Results) -> str | None:
    """What is wrong with the results, or what a thread did wrong. The other passes' results are sound ones."""
    o, lse, *gradients = sound
    try:
        if kernel.startswith("forward"):
            function = "ledom_attention_forward_sm90a" if "sm_90a" in kernel else "ledom_attention_forward_cuda"
            o, lse = faulty.forward(*problem.inputs, problem.mask, function)
        else:
            gradients = list(faulty.backward(problem.inputs, problem.mask, (o, lse), problem.d_o))
    except PtxError as error:
        return str(error)
    faults = judge(expected, (o, lse, *gradients)).faults
    return faults[0] if faults else None


@dataclasses.dataclass(frozen=True)
class Mutant:
    mutation: Mutation
    line: int
    text: str

    @property
    def source(self) -> str:
        """The line of the CUDA source that the nearest `.loc` before the change names, innermost function first."""
        before = "\n".join(self.text.splitlines()[: self.line])
        number, line = re.findall(r"^\s*\.loc\s+(\d+)\s+(\d+)", before, re.M)[-1]
        (path,) = re.findall(rf'\.file\s+{number}\s+"([^"]*)"', self.text)
        return linecache.getline(path, int(line)).strip()


def text_of(kernel: str, texts: dict[str, str]) -> str:
    source, name, _ = KERNELS[kernel]
    (entry,) = re.findall(rf"\.entry (\w*{name}\w*)\(", texts[source])
    return kernel_text(texts[source], entry)


def mutants(kernel: str, texts: dict[str, str]) -> Iterator[Mutant]:
    text = text_of(kernel, texts)
    for mutation in KERNELS[kernel][2]:
        for line, changed in mutation.apply(text):
            yield Mutant(mutation, line, changed)


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_fault_is_noticed(
    kernel: str,
    interpreter: Interpreter,
    ptx_texts: dict[str, str],
    problem: Problem,
    expected: Expected,
    sound: Results,
) -> None:
    def with_text(text: str) -> Interpreter:
        return dataclasses.replace(interpreter, modules=[parse(text), *interpreter.modules], max_steps=MAX_STEPS)

    assert fault(kernel, with_text(text_of(kernel, ptx_texts)), problem, expected, sound) is None
    unnoticed = []
    for mutant in mutants(kernel, ptx_texts):
        try:
            noticed = fault(kernel, with_text(mutant.text), problem, expected, sound)
        except PtxError as error:
            noticed = str(error)
        place = f"PTX line {mutant.line}, of {mutant.source!r}"
        print(f"{mutant.mutation.what}: {place}: {(noticed or 'NOT NOTICED').splitlines()[0]}")
        if noticed is None:
            unnoticed.append((mutant.mutation.what, mutant.source))
    assert unnoticed == [], unnoticed


def test_each_mutation_has_a_place(ptx_texts: dict[str, str]) -> None:
    """None of them has become void, say because nvcc writes something in another way."""
    found = {mutant.mutation for kernel in KERNELS for mutant in mutants(kernel, ptx_texts)}
    missing = [m.what for m in (*AMPERE, *HOPPER) if m not in found]
    assert not missing, missing
