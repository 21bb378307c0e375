"""Are the kernels' numbers right: against float64, twenty times over, on any stream, in a graph, through torch.

Each check gives faults in words; none of them stops at the first. Legend: B batch, S sequence, H query heads, G key
heads, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_ledom.log import Progress
from megatron_ledom.ops.attention import attention_with_lse
from megatron_ledom.ops.conformance import Expected, Problem, error, judge, judge_rope, masks, random_problem
from megatron_ledom.ops.kernels import kernels
from megatron_ledom.ops.launch import launch_rope, run_poisoned
from megatron_ledom.ops.verify.clock import Clock

HEAD_DIMS = (64, 128, 192)
LENGTHS = (1, 97, 515)
LONG = 2049
HEADS = ((4, 4), (4, 2), (3, 1))
NUM_REPEATS = 20


@dataclass
class Tally:
    """What was found about one part.

    Attributes:
        num_cases: that were run.
        worst: the largest error as a fraction of what is allowed, and its case.
        faults: in words.
    """

    num_cases: int = 0
    worst: tuple[float, str] = (0.0, "")
    faults: list[str] = field(default_factory=list)

    def add(self, case: str, share: float, faults: Sequence[str]) -> None:
        """Count a case."""
        self.num_cases += 1
        if share > self.worst[0]:
            self.worst = (share, case)
        self.faults += [f"{case}: {fault}" for fault in faults]


def cases(is_quick: bool) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Mask's name, B, S, H, G and D of every case: all combinations, and some long ones."""
    names = list(masks(1, 64))
    lengths, heads = ((97, 250), ((4, 2),)) if is_quick else (LENGTHS, HEADS)
    for head_dim, seq, (h, g), name in itertools.product(HEAD_DIMS, lengths, heads, names):
        yield name, 2 if g == 2 else 1, seq, h, g, head_dim
    for head_dim, name in itertools.product(HEAD_DIMS, names[:2] if is_quick else names):
        yield name, 1, LONG, 4, 2, head_dim


def check_correctness(parts: Sequence[str], device: torch.device, clock: Clock, is_quick: bool) -> dict[str, Tally]:
    """Output, logarithms and gradients of every variant, against float64; a launch that fails is a fault."""
    tallies = {part: Tally() for part in parts}
    every = list(cases(is_quick))
    progress = Progress(f"{', '.join(parts)}: correctness", len(every), "cases")
    for seed, (name, batch, seq, heads, groups, head_dim) in enumerate(every):
        if clock.is_over:
            for tally in tallies.values():
                tally.faults.append(f"only {tally.num_cases} of {len(every)} cases were run: no time was left")
            break
        mask = masks(batch, seq, device)[name]
        problem = random_problem(mask, batch, seq, heads, groups, head_dim, device=device, seed=seed)
        expected = Expected.of(problem)
        case = f"{name}, B {batch}, S {seq}, {heads}/{groups} heads, D {head_dim}"
        for part, tally in tallies.items():
            try:
                verdict = judge(expected, run_poisoned(problem, part))
            except (RuntimeError, ValueError) as stopped:
                tally.add(case, 0.0, [str(stopped)])
            else:
                tally.add(case, verdict.worst, verdict.faults)
        progress.update(1)
    progress.close()
    return tallies


def mid_problem(head_dim: int, device: torch.device, *, mask: str = "reversed, documents", seq: int = 777) -> Problem:
    """A problem of many blocks and tiles."""
    return random_problem(masks(2, seq, device)[mask], 2, seq, 8, 2, head_dim, device=device, seed=head_dim)


def blank(problem: Problem) -> Problem:
    """The same, whose inputs have not come yet."""
    q, k, v = (torch.zeros_like(x) for x in problem.inputs)
    return Problem(q, k, v, problem.d_o, problem.mask)


def check_repeats(part: str, device: torch.device) -> list[str]:
    """The same bits, twenty times, while other sizes run in between."""
    faults = []
    for head_dim, mask in itertools.product(HEAD_DIMS, ("reversed", "reversed, documents")):
        problem = mid_problem(head_dim, device, mask=mask)
        first = run_poisoned(problem, part)
        for repeat in range(1, NUM_REPEATS):
            for what, found, before in zip(
                ("o", "lse", "d_q", "d_k", "d_v"), run_poisoned(problem, part), first, strict=True
            ):
                if not torch.equal(found, before):
                    faults.append(f"D {head_dim}, {mask}: {what} of run {repeat + 1} has other bits than that of run 1")
    return faults


def check_streams(part: str, device: torch.device) -> list[str]:
    """A stream of its own, behind slow work whose result it reads; and a CUDA graph, replayed with other inputs."""
    faults = []
    problem = mid_problem(128, device)
    expected = run_poisoned(problem, part)
    torch.cuda.synchronize(device)
    side = torch.cuda.Stream(device)
    busy = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    late = blank(problem)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(10):
            busy = (busy @ busy).clamp(-1, 1)
        for empty, x in zip(late.inputs, problem.inputs, strict=True):
            empty.copy_(x)
        found = run_poisoned(late, part)
    side.synchronize()
    if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        faults.append("on a stream of its own the results differ: a kernel ran on another stream")
    captured = blank(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_poisoned(captured, part)
    for empty, x in zip(captured.inputs, problem.inputs, strict=True):
        empty.copy_(x)
    graph.replay()
    torch.cuda.synchronize(device)
    if not all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)):
        faults.append("in a CUDA graph the results differ")
    return faults


def check_torch_face(part: str, device: torch.device) -> list[str]:
    """Through the custom op: autograd, Megatron's [S, B, H, D], q, k and v in one tensor, rows that are not aligned."""
    faults = []
    problem = mid_problem(64, device, mask="reversed")
    expected = run_poisoned(problem, part)
    scale = 64**-0.5
    q, k, v = problem.inputs
    megatrons = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    packed = torch.cat([q, k.repeat_interleave(4, 2), v.repeat_interleave(4, 2)], dim=3).split(64, dim=3)
    shifted = [torch.empty(*x.shape[:3], 65, dtype=x.dtype, device=device)[..., 1:].copy_(x) for x in (q, k, v)]
    for what, given in (("Megatron's layout", megatrons), ("one tensor", packed), ("misaligned rows", shifted)):
        inputs = [x.detach().requires_grad_() for x in given]
        output, lse = attention_with_lse(inputs[0], inputs[1], inputs[2], problem.mask, scale, part)
        gradients = torch.autograd.grad(output, inputs, problem.d_o)
        same = [torch.equal(output, expected[0]), torch.equal(lse, expected[1]), torch.equal(gradients[0], expected[2])]
        if what != "one tensor":  # there keys and values are repeated, and their gradients come in parts
            same += [torch.equal(gradients[1], expected[3]), torch.equal(gradients[2], expected[4])]
        elif error(gradients[1].view(2, -1, 2, 4, 64).double().sum(3), expected[3].double()) > 0.02:
            same.append(False)
        if not all(same):
            faults.append(f"{what}: not the results of plain tensors ({same})")
    # A gradient of the output that autograd gives with strides of 0.
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    output, _ = attention_with_lse(inputs[0], inputs[1], inputs[2], problem.mask, scale, part)
    first = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(output, inputs, torch.ones_like(output))
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        faults.append("an expanded gradient gives other results than a written one")
    return faults


def check_rope_kernel(device: torch.device) -> Tally:
    """Rotary positions in both dtypes, with wide and single accesses, and a long sequence."""
    tally = Tally()
    for dtype, rotary_dim in itertools.product((torch.bfloat16, torch.float32), (40, 44, 48, 2)):
        verdict = judge_rope(launch_rope, device, dtype, rotary_dim=rotary_dim)
        tally.add(f"{dtype}, R {rotary_dim}", verdict.worst, verdict.faults)
    return tally


def loaded_runtimes() -> list[str]:
    """The CUDA runtimes of this process: torch's is a shared library, ours is inside the extension."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    names = {line.split()[-1] for line in lines if "libcudart" in line or "_kernels" in line}
    return sorted([*names, f"in _kernels: {kernels().cuda_versions()[0]}"])
