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


# What nobody notices, since the numbers stay what they are: (what, a part of the line of the source).
BLOCK_ORDER = ("a comparison that takes the equal too", "mask.left >")  # only which block comes first
# Another row's numbers in place of zeros, which the mask hides.
HIDDEN_ROWS = ("rows beyond the sequence copied too", "is_valid ? 16 : 0")
# The store of d_k overwrites what was last read before the barriers of the store of d_v.
SECOND_STORE = ("a warp's barrier left out", "bar_warp_sync")
# The fence before it makes the new barriers known already.
SECOND_FENCE = ("stores not made known to copies", "fence.mbarrier_init")
# Before the next keys come to this place, the loading thread waits for the release of values, which comes later.
EARLY_RELEASE = ("a warp's barrier left out", "bar_warp_sync")
# Rows that look ahead only begin with their own key, which no document's first token is beyond.
NO_FIRST = ("a predicate negated", "mask.first ? mask.first[i] : 0")
UNNOTICED = {
    "forward": [BLOCK_ORDER, HIDDEN_ROWS],
    "backward, keys": [SECOND_STORE, BLOCK_ORDER, HIDDEN_ROWS],
    "backward, queries": [BLOCK_ORDER, HIDDEN_ROWS],
    "forward, sm_90a": [SECOND_FENCE, EARLY_RELEASE, NO_FIRST, BLOCK_ORDER],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem, what float64 makes of it, and what the kernels do."""

    problem: Problem
    expected: Expected
    sound: Results


@pytest.fixture(scope="module")
def cases(interpreter: Interpreter) -> dict[str, Case]:
    """Documents, one of them over nearly all, with padding at both ends; every stage is used twice. By target."""
    found = {}
    for target, batch, seq, bounds in (("sm_80", 2, 200, [3, 170, 390]), ("sm_90a", 1, 388, [3, 386])):
        documents = documents_from_lengths(torch.tensor(bounds), batch, seq)
        problem = random_problem(AttentionMask(0, None, documents), batch, seq, batch, 1, 64)
        results = interpreter.forward(*problem.inputs, problem.mask)
        gradients = interpreter.backward(problem.inputs, problem.mask, results, problem.d_o)
        found[target] = Case(problem, Expected.of(problem), (*results, *gradients))
    return found


def fault(kernel: str, faulty: Interpreter, case: Case) -> str | None:
    """What is wrong with the results, or what a thread did wrong. The other passes' results are sound ones."""
    o, lse, *gradients = case.sound
    problem = case.problem
    try:
        if kernel.startswith("forward"):
            function = "ledom_attention_forward_sm90a" if "sm_90a" in kernel else "ledom_attention_forward_cuda"
            o, lse = faulty.forward(*problem.inputs, problem.mask, function)
        else:
            is_of_keys = "keys" in kernel
            other = "attention_backward_queries" if is_of_keys else "attention_backward_keys"
            faulty = dataclasses.replace(faulty, left_out=other)
            d_q, d_k, d_v = faulty.backward(problem.inputs, problem.mask, (o, lse), problem.d_o)
            gradients = [gradients[0], d_k, d_v] if is_of_keys else [d_q, *gradients[1:]]
    except PtxError as error:
        return str(error)
    faults = judge(case.expected, (o, lse, *gradients)).faults
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
    kernel: str, interpreter: Interpreter, ptx_texts: dict[str, str], cases: dict[str, Case]
) -> None:
    case = cases["sm_90a" if "sm_90a" in kernel else "sm_80"]

    def with_text(text: str) -> Interpreter:
        return dataclasses.replace(interpreter, modules=[parse(text), *interpreter.modules], max_steps=MAX_STEPS)

    assert fault(kernel, with_text(text_of(kernel, ptx_texts)), case) is None
    unnoticed = []
    for mutant in mutants(kernel, ptx_texts):
        try:
            noticed = fault(kernel, with_text(mutant.text), case)
        except PtxError as error:
            noticed = str(error)
        place = f"PTX line {mutant.line}, of {mutant.source!r}"
        print(f"{mutant.mutation.what}: {place}: {(noticed or 'NOT NOTICED').splitlines()[0]}", flush=True)
        if noticed is None:
            unnoticed.append((mutant.mutation.what, mutant.source))
    allowed = UNNOTICED[kernel]
    assert [what for what, _ in unnoticed] == [what for what, _ in allowed], unnoticed
    assert all(part in source for (_, source), (_, part) in zip(unnoticed, allowed, strict=True)), unnoticed


def test_each_mutation_has_a_place(ptx_texts: dict[str, str]) -> None:
    """None of them has become void, say because nvcc writes something in another way."""
    found = {mutant.mutation for kernel in KERNELS for mutant in mutants(kernel, ptx_texts)}
    missing = [m.what for m in (*AMPERE, *HOPPER) if m not in found]
    assert not missing, missing
