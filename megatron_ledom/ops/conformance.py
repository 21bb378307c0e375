"""What every kernel must compute, and how exactly: the masks, the measure of an error and its limit.

Used by the tests, by the check at a variant's first use (`trust`) and by the verification on a GPU (`verify`).
Legend: B batch, S sequence, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ledom.direction import Direction
from megatron_ledom.ops.fallback import torch_attention, torch_rope
from megatron_ledom.ops.mask import AttentionMask, Documents, documents_from_lengths, model_order_mask
from megatron_ledom.ops.mask import natural_order_mask as reversed_mask
from megatron_ledom.ops.reference import positions, reference_attention, reference_rope, rope_tables

NAMES = ("o", "d_q", "d_k", "d_v")
"""What is compared with float64 by its largest element; the rows' logarithms are compared one by one."""
GPU_FLOOR = torch.finfo(torch.bfloat16).eps / 2
"""What an error in bf16 may be beyond twice torch's: one rounding."""
LSE_TOLERANCE = 1e-5
"""Of the rows' logarithms on a GPU, absolute and relative."""
REVERSE = Direction.REVERSE


def documents(batch: int, seq: int, device: torch.device | str = "cpu") -> Documents:
    """Documents of several lengths, with padding at both ends."""
    total = batch * seq
    bounds = sorted({min(total - 1, 1), total // 5, total // 2, total // 2 + 1, max(total - 3, 1)})
    cu_seqlens = torch.tensor(bounds if len(bounds) > 1 else [0, total], device=device)
    return documents_from_lengths(cu_seqlens, batch, seq)


def masks(batch: int, seq: int, device: torch.device | str = "cpu") -> dict[str, AttentionMask]:
    """Every kind of mask, by name."""
    docs = documents(batch, seq, device)
    return {
        "causal": model_order_mask(),
        "causal, window 37": model_order_mask(window=37),
        "reversed": reversed_mask(REVERSE),
        "reversed, window 1": reversed_mask(REVERSE, window=1),
        "reversed, window 37": reversed_mask(REVERSE, window=37),
        "causal, documents": model_order_mask(documents=docs),
        "reversed, documents": reversed_mask(REVERSE, documents=docs),
        "reversed, window 20, documents": reversed_mask(REVERSE, window=20, documents=docs),
        "both sides": AttentionMask(30, None),
    }


KINDS = {
    "causal": ("causal",),
    "reversed": ("reversed",),
    "window": ("reversed, window 37", "both sides"),
    "documents": ("causal, documents", "reversed, window 20, documents"),
}
"""Kind of a mask -> the masks above that stand for it in a first-use check."""


def mask_kind(mask: AttentionMask, seq: int) -> str:
    """The kind of a mask, one of `KINDS`: which parts of a kernel it exercises."""
    if mask.documents is not None:
        return "documents"
    if not mask.is_plain(seq):
        return "window"
    return "causal" if mask.reach(seq)[0] else "reversed"


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error, relative to the largest element of the exact one, or to 1/2 where that is smaller.

    Inputs are standard normal. With a single key the exact d_q and d_k are 0 and all that is left is rounding. NaN in
    `found` gives NaN, which no limit allows.
    """
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=0.5))


def share_of(off: float, allowed: float) -> float:
    """An error as a fraction of what is allowed; NaN becomes a number that is larger than any."""
    return 1e9 if math.isnan(off) else off / allowed


@dataclass(frozen=True)
class Problem:
    """One attention call: inputs in the kernels' dtype, and the mask."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_o: torch.Tensor
    mask: AttentionMask

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The queries, keys and values."""
        return self.q, self.k, self.v


def random_problem(
    mask: AttentionMask,
    batch: int,
    seq: int,
    heads: int,
    groups: int,
    head_dim: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
) -> Problem:
    """Standard normal numbers, the same on every device and in every process."""
    generator = torch.Generator("cpu").manual_seed(seed)
    q, k, v, d_o = (
        torch.randn(batch, seq, h, head_dim, generator=generator, device="cpu").to(device, dtype)
        for h in (heads, groups, groups, heads)
    )
    return Problem(q, k, v, d_o, mask)


Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""o, lse, d_q, d_k, d_v."""
Runner = Callable[[Problem], Results]
"""Forward and backward of a kernel, whose outputs were full of NaN before."""


def exact_results(problem: Problem) -> Results:
    """By float64."""
    q, k, v = (x.double().requires_grad_() for x in problem.inputs)
    output, lse = reference_attention(q, k, v, problem.mask)
    d_q, d_k, d_v = torch.autograd.grad(output, (q, k, v), problem.d_o.double())
    return output.detach(), lse.detach(), d_q, d_k, d_v


def torch_errors(problem: Problem, exact: Results) -> list[float]:
    """What plain torch makes of the problem in its dtype: the errors of `NAMES`.

    On a GPU without cuDNN, which makes a plan for every new shape: a third of a second each.
    """
    q, k, v = (x.detach().requires_grad_() for x in problem.inputs)
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends) if q.is_cuda else contextlib.nullcontext():
        output = torch_attention(q, k, v, problem.mask, 1 / math.sqrt(q.shape[3]))
    found = [output.detach(), *torch.autograd.grad(output, (q, k, v), problem.d_o)]
    return [error(f, e) for f, e in zip(found, (exact[0], *exact[2:]), strict=True)]


@dataclass(frozen=True)
class Verdict:
    """How a kernel's results compare with what is allowed.

    Attributes:
        worst: the largest error as a fraction of what is allowed; above 1 is a fault.
        faults: what is wrong, in words.
    """

    worst: float
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Expected:
    """What float64 makes of a problem, and how far from it plain torch is."""

    exact: Results
    torchs: list[float]

    @classmethod
    def of(cls, problem: Problem) -> Expected:
        """Compute both."""
        exact = exact_results(problem)
        return cls(exact, torch_errors(problem, exact))


def judge(
    expected: Expected, found: Results, *, floor: float = GPU_FLOOR, lse_tolerance: float = LSE_TOLERANCE
) -> Verdict:
    """Compare results with float64: errors may be twice plain torch's, plus `floor`."""
    exact, faults, worst = expected.exact, [], 0.0
    pairs = zip(NAMES, (found[0], *found[2:]), (exact[0], *exact[2:]), expected.torchs, strict=True)
    for what, ours, right, their in pairs:
        off, allowed = error(ours, right), 2 * their + floor
        worst = max(worst, share_of(off, allowed))
        if not off <= allowed:
            num_nan = int(ours.isnan().any(-1).sum())
            text = f"{what} is off by {off:.2e}, allowed are {allowed:.2e} (torch: {their:.2e})"
            faults.append(text + (f"; {num_nan} rows are NaN" if num_nan else ""))
    if not torch.allclose(found[1].double(), exact[1], rtol=lse_tolerance, atol=lse_tolerance):
        off = float((found[1].double() - exact[1]).nan_to_num(math.inf, posinf=math.inf).abs().max())
        faults.append(f"the rows' logarithms are off by {off:.2e}")
    return Verdict(worst, tuple(faults))


def judge_all(problems: Sequence[Problem], run: Runner) -> Verdict:
    """Run several problems; the worst of them, and all faults."""
    verdicts = [judge(Expected.of(problem), run(problem)) for problem in problems]
    return Verdict(max(v.worst for v in verdicts), tuple(fault for v in verdicts for fault in v.faults))


@dataclass(frozen=True)
class Rotation:
    """How rotary positions turn a tensor; the tables are fp32 [positions, R / 2] (`reference.rope_tables`)."""

    cosines: torch.Tensor
    sines: torch.Tensor
    documents: Documents | None
    from_end: bool
    interleaved: bool
    inverse: bool


Turner = Callable[[torch.Tensor, torch.Tensor, Rotation], None]
"""Writes its first argument, turned, into its second."""


def judge_rope(turn: Turner, device: torch.device | str, dtype: torch.dtype, *, rotary_dim: int = 40) -> Verdict:
    """Compare turned positions with float64, for both ends, pairings, directions, with and without documents."""
    batch, seq, heads, head_dim = 2, 61, 3, 48
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(batch, seq, heads, head_dim, generator=generator, device="cpu").to(device, dtype)
    exponents = torch.arange(rotary_dim // 2, dtype=torch.float64, device=device) / (rotary_dim // 2)
    frequencies = 10000.0**-exponents
    tables = rope_tables(frequencies, seq)
    faults, worst = [], 0.0
    every = (None, documents(batch, seq, device))
    ways = [Rotation(*tables, docs, *flags) for docs in every for flags in itertools.product((False, True), repeat=3)]
    for way in ways:
        at = positions(way.documents, batch, seq, from_end=way.from_end, device=device)
        pairing = {"interleaved": way.interleaved, "inverse": way.inverse}
        exact = reference_rope(x, at, frequencies, **pairing)
        their = error(torch_rope(x, *(table[at] for table in tables), **pairing), exact)
        y = torch.full_like(x, math.nan)
        turn(x, y, way)
        off, allowed = error(y, exact), 2 * their + torch.finfo(dtype).eps
        worst = max(worst, share_of(off, allowed))
        if not off <= allowed:
            has = {"from_end": way.from_end, "documents": way.documents is not None, **pairing}
            faults.append(f"off by {off:.2e}, allowed are {allowed:.2e}: {has}")
    return Verdict(worst, tuple(faults))
