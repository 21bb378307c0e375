"""Faults on purpose, to see that a run's answer to them is the one that was chosen: `--inject-fault KIND@STEP[:RANK]`.

    nan@7:1    the first micro-batch of rank 1 in step 7 gives NaN; inf and spike (a thousand times the loss) likewise
    hang@7:1   rank 1 stops itself (SIGSTOP) at the beginning of step 7
    kill@7:1   rank 1 kills itself (SIGKILL) there

A drill is meant for an hour in which nothing is lost by it: a new cluster, a new version. It says that it is one.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ledom.errors import UsageError
from megatron_ledom.log import get_logger

if TYPE_CHECKING:
    import torch

FACTORS = {"nan": float("nan"), "inf": float("inf"), "spike": 1000.0}
SIGNALS = {"hang": signal.SIGSTOP, "kill": signal.SIGKILL}
_FAULT = re.compile(r"(\w+)@(\d+)(?::(\d+))?")


@dataclass(frozen=True)
class Fault:
    """One fault: what, in which step (from 1), on which rank."""

    kind: str
    step: int
    rank: int


def parse_faults(words: Sequence[str] | None) -> list[Fault]:
    """Read the values of `--inject-fault`.

    Raises:
        UsageError: a word is of another form.

    >>> parse_faults(["nan@7:1", "kill@9"])
    [Fault(kind='nan', step=7, rank=1), Fault(kind='kill', step=9, rank=0)]
    """
    faults = []
    for word in words or []:
        match = _FAULT.fullmatch(word)
        if match is None or match[1] not in {**FACTORS, **SIGNALS}:
            raise UsageError(
                f"--inject-fault {word}: write KIND@STEP[:RANK], KIND one of {', '.join([*FACTORS, *SIGNALS])}"
            )
        faults.append(Fault(match[1], int(match[2]), int(match[3] or 0)))
    return faults


class Drill:
    """The faults of this rank; told of each micro-batch in training.

    Args:
        faults: from `parse_faults`.
        rank: of this process.
    """

    def __init__(self, faults: Sequence[Fault], rank: int) -> None:
        self._faults = {(fault.step, fault.kind): fault for fault in faults if fault.rank == rank}
        for fault in faults:
            get_logger(__name__).warning(
                "warning: a drill: %s at step %d of rank %d", fault.kind, fault.step, fault.rank
            )

    def begin(self, step: int) -> None:
        """Stop or kill this process, if the drill says so."""
        for kind, number in SIGNALS.items():
            if self._faults.pop((step, kind), None):
                os.kill(os.getpid(), number)

    def distort(self, step: int, output: torch.Tensor) -> torch.Tensor:
        """Spoil what a stage computes, once a step."""
        for kind, factor in FACTORS.items():
            if self._faults.pop((step, kind), None):
                output = output * factor
        return output
