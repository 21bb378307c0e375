"""Which CUDA kernels this process may use: verified on this kind of GPU, and right at their first use here.

    verified     tools/verify_kernels.py has passed on this kind of GPU for this build (`verification`)
    first use    of (part, dtype, head size, kind of mask): a few seeded milliseconds against float64, backward
                 included, into outputs full of NaN
    agreed       a run's ranks take the minimum of both, so that all take one path (`Trust.agree`)

A part is an attention variant, or "rope". Nothing here knows how a path is chosen (`path`).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.log import get_logger
from megatron_ledom.ops import verification
from megatron_ledom.ops.conformance import KINDS, Problem, judge_all, judge_rope, masks, random_problem
from megatron_ledom.ops.gpu import find_gpu
from megatron_ledom.ops.kernels import cuda_variants, load_kernels
from megatron_ledom.ops.launch import launch_rope, run_poisoned

PERMIT_VARIABLE = "LEDOM_UNVERIFIED"
"""Names the parts that "auto" may take unverified: "sm80,rope"."""
CHECK_SEQ, CHECK_HEADS, CHECK_GROUPS = 197, 4, 2


@dataclass(frozen=True)
class Use:
    """What is checked at once.

    Attributes:
        part: an attention variant, or "rope".
        dtype: of the tensors.
        head_dim: D; 0 for "rope".
        kind: one of `conformance.KINDS`; "" for "rope".
    """

    part: str
    dtype: torch.dtype
    head_dim: int = 0
    kind: str = ""

    def __str__(self) -> str:
        size = f", head size {self.head_dim}, mask {self.kind}" if self.head_dim else ""
        return f"{self.part} ({str(self.dtype).removeprefix('torch.')}{size})"


class Trust:
    """What is known of the kernels on one device; each fact is found once.

    Args:
        find_unfit: part -> why this build or this device cannot run it at all, None where it can.
        find_unverified: part -> why it is not verified, None where it is.
        self_check: runs a use; what is wrong with its results, None where they are right.
        permitted: parts that may be used unverified.
    """

    def __init__(
        self,
        find_unfit: Callable[[str], str | None],
        find_unverified: Callable[[str], str | None],
        self_check: Callable[[Use], str | None],
        permitted: frozenset[str] = frozenset(),
    ) -> None:
        self._find_unfit, self._find_unverified = find_unfit, find_unverified
        self._self_check, self._permitted = self_check, permitted
        self._unverified: dict[str, str | None] = {}
        self._failed: dict[Use, str | None] = {}
        self._said: set[str] = set()

    def unverified(self, part: str) -> str | None:
        """Why "auto" must not take a part; None where it may."""
        if part not in self._unverified:
            unfit = self._find_unfit(part)
            fault = unfit or self._find_unverified(part)
            if fault and not unfit and part in self._permitted:
                self.say(f"kernels {part}: used as {PERMIT_VARIABLE} allows it, although {fault}")
                fault = None
            self._unverified[part] = fault
        return self._unverified[part]

    def failed(self, use: Use) -> str | None:
        """What the check at first use found wrong; None where nothing is. A failure is logged once."""
        if use not in self._failed:
            try:
                self._failed[use] = self._self_check(use)
            except (RuntimeError, ValueError) as error:  # CUDA's errors, refusals: a kernel that does not serve
                self._failed[use] = str(error)
            if fault := self._failed[use]:
                self.say(f"kernels {use}: NOT USED, the check at first use failed: {fault}")
        return self._failed[use]

    def agree(self, uses: Sequence[Use]) -> None:
        """Let every rank know the worst that any found, so that all take one path.

        Collective: all ranks call it, with the same uses, before the first forward pass. At first use it would be too
        late: a stage of a pipeline waits there for the stage before it, which would wait for the answer.
        Without torch.distributed it finds the facts and that is all.
        """
        parts = sorted({use.part for use in uses})
        found = {part: self.unverified(part) for part in parts}
        failed = {use: None if found[use.part] else self.failed(use) for use in uses}
        flags = torch.tensor([fault is None for fault in (*found.values(), *failed.values())], dtype=torch.int32)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        if torch.distributed.get_backend() == "nccl":
            flags = flags.cuda()
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN)
        is_fine = iter(flags.tolist())
        for part in parts:
            if not next(is_fine) and found[part] is None:
                self._unverified[part] = "it is not verified on another rank's GPU"
                self.say(f"kernels {part}: NOT USED, {self._unverified[part]}")
        for use in uses:
            if not next(is_fine) and failed[use] is None:
                self._failed[use] = "the check at first use failed on another rank"
                self.say(f"kernels {use}: NOT USED, {self._failed[use]}")

    def say(self, text: str) -> None:
        """Log a line once, on every rank."""
        if text not in self._said:
            self._said.add(text)
            get_logger(__name__).warning("%s", text)


def parse_permitted(words: str) -> frozenset[str]:
    """The parts that a value of LEDOM_UNVERIFIED names.

    >>> sorted(parse_permitted("sm80, rope"))
    ['rope', 'sm80']
    """
    return frozenset(word.strip() for word in words.split(",") if word.strip())


def this_build() -> verification.Build:
    """The CUDA kernels of the installed extension; empty words where there are none."""
    found = load_kernels()
    if isinstance(found, str):
        return verification.Build("", "")
    return verification.Build(found.cuda_source_hash(), found.cuda_compiler())


@functools.cache
def trust_of(index: int) -> Trust:
    """What is known of the kernels on the GPU that torch numbers `index`."""
    build, gpu, folder = this_build(), find_gpu(index), verification.record_folder()
    device = torch.device("cuda", index)
    variants = {variant.name: variant for variant in cuda_variants()}

    def find_unfit(part: str) -> str | None:
        if not variants or part not in (*variants, verification.ROPE):
            return f"this build has no CUDA kernels {part}"
        return variants[part].fault_on(gpu.capability) if part in variants else None

    return Trust(
        find_unfit,
        lambda part: verification.find_fault(folder, build, gpu, part),
        lambda use: self_check(use, device),
        parse_permitted(os.environ.get(PERMIT_VARIABLE, "")),
    )


def attention_uses(parts: Sequence[str], dtype: torch.dtype, head_dim: int) -> list[Use]:
    """All that a model of one head size can come to use, in an order that every rank has."""
    uses = [Use(part, dtype, head_dim, kind) for part, kind in itertools.product(parts, KINDS)]
    return [*uses, Use(verification.ROPE, dtype)]


def check_problems(use: Use, device: torch.device) -> list[Problem]:
    """The problems of the check at the first use of an attention variant."""
    every = masks(1, CHECK_SEQ, device)
    sizes = (1, CHECK_SEQ, CHECK_HEADS, CHECK_GROUPS, use.head_dim)
    return [
        random_problem(every[name], *sizes, device=device, dtype=use.dtype, seed=seed)
        for seed, name in enumerate(KINDS[use.kind], start=1)
    ]


def self_check(use: Use, device: torch.device) -> str | None:
    """Run a part on small seeded problems; what is wrong with its results, None where nothing is.

    Raises:
        UsageError: a stream is being captured.
        RuntimeError: CUDA reports an error.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UsageError(f"kernels {use} cannot be checked while a CUDA graph is captured: call them once before")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        if use.part == verification.ROPE:
            verdict = judge_rope(launch_rope, device, use.dtype)
        else:
            verdict = judge_all(check_problems(use, device), lambda problem: run_poisoned(problem, use.part))
    return "; ".join(verdict.faults) or None
