"""NaN, infinity and spikes: one policy, decided before the update, on all ranks alike, and remembered.

    stop       the run ends with the documents named; nothing was updated
    skip       this batch is left out; the run goes on with the next
    rollback   likewise, and the weights, optimizer and schedule of the last checkpoint come back
    megatron   Megatron's own rerun machinery, which asks whether the hardware is at fault, and ends the run

Every rank lays its numbers on a table that all ranks see (one all-gather of six numbers a step), and all draw
the same conclusion from it. What is done is first written to RUN/bad_numbers.jsonl, so that a run that is killed and
goes over the same steps again does the same again, whether or not the fault returns. The losses that say what a
spike is are in every checkpoint, among the arguments (`bad_numbers_losses`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.errors import BadNumbersError, InputError
from megatron_ledom.log import get_logger

if TYPE_CHECKING:
    import torch

STOP, SKIP, ROLLBACK, MEGATRON = "stop", "skip", "rollback", "megatron"
POLICIES = (STOP, SKIP, ROLLBACK, MEGATRON)
WINDOW = 128
"""Losses that a spike is measured against."""
MIN_LOSSES = 16
"""Fewer say nothing about a spread."""
LEDGER = "bad_numbers.jsonl"
_NO_MICRO_BATCH = -1.0


@dataclass(frozen=True)
class Row:
    """What one rank lays on the table.

    Attributes:
        loss_sum: of its micro-batches on the last stage, else 0; NaN where one is.
        num_tokens: that the sum goes over.
        grad_norm: of all gradients; every rank of the optimizer's group has the same.
        data_rank: its data-parallel rank.
        micro_batch: the first whose loss is not finite, or -1.
        has_bad_gradient: its own gradients, before they were reduced, hold NaN or infinity.
    """

    loss_sum: float
    num_tokens: float
    grad_norm: float
    data_rank: int
    micro_batch: int
    has_bad_gradient: bool

    def values(self) -> list[float]:
        """As numbers for the all-gather."""
        return [self.loss_sum, self.num_tokens, self.grad_norm, self.data_rank, self.micro_batch, self.has_bad_gradient]

    @classmethod
    def of(cls, values: Sequence[float]) -> Row:
        """The inverse of `values`."""
        return cls(values[0], values[1], values[2], int(values[3]), int(values[4]), bool(values[5]))

    @property
    def is_bad(self) -> bool:
        """Whether this rank itself has a number that is not finite."""
        return self.micro_batch >= 0 or self.has_bad_gradient or not math.isfinite(self.loss_sum)


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a step.

    Attributes:
        cause: in words, with the ranks.
        loss, grad_norm: of the step.
        places: (data-parallel rank, micro-batch or None for all of them) where it came from; [] where nobody knows.
    """

    cause: str
    loss: float
    grad_norm: float
    places: list[tuple[int, int | None]]


def judge(table: Sequence[Row], losses: Sequence[float], sigmas: float | None) -> tuple[float, Verdict | None]:
    """Look at a step.

    Args:
        table: of all ranks.
        losses: mean losses of the last accepted steps.
        sigmas: how many standard deviations above their mean a loss is a spike; None: nothing is.

    Returns:
        The mean loss, and what is wrong with the step, or None.
    """
    num_tokens = sum(row.num_tokens for row in table)
    loss = sum(row.loss_sum for row in table) / num_tokens if num_tokens else 0.0
    norm = max((row.grad_norm for row in table), key=lambda n: math.inf if math.isnan(n) else n)
    bad = [rank for rank, row in enumerate(table) if row.is_bad]
    if bad or not math.isfinite(loss) or not math.isfinite(norm):
        where = f"on rank {', '.join(map(str, bad))}" if bad else "after the gradients were reduced"
        what = "the loss" if any(table[rank].micro_batch >= 0 for rank in bad) else "the gradients"
        places = {(table[r].data_rank, table[r].micro_batch if table[r].micro_batch >= 0 else None) for r in bad}
        order = sorted(places, key=lambda place: (place[0], -1 if place[1] is None else place[1]))
        return loss, Verdict(f"{what} not finite {where}", loss, norm, order)
    if sigmas is not None and len(losses) >= MIN_LOSSES:
        mean = math.fsum(losses) / len(losses)
        spread = math.sqrt(math.fsum((each - mean) ** 2 for each in losses) / len(losses))
        if loss > mean + sigmas * spread:
            cause = (
                f"the loss {loss:.4g} is {(loss - mean) / max(spread, 1e-30):.1f} standard deviations above {mean:.4g}"
            )
            return loss, Verdict(cause, loss, norm, [])
    return loss, None


@dataclass
class Ledger:
    """What was done in this run, by step; the later entry of a step wins."""

    path: Path
    entries: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def parse(cls, path: Path, text: str) -> Ledger:
        """Read the lines of the file; one that a kill cut short is the last, and counts for nothing.

        Raises:
            InputError: another line is damaged.
        """
        ledger, lines = cls(path), text.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                ledger.entries[int(entry["step"])] = entry
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break
                raise InputError(f"{path}:{number}: no entry of this file ({error}); remove the line") from error
        return ledger

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add an entry, on disk before it is acted upon."""
        self.entries[int(entry["step"])] = dict(entry)
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write("\n")
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def num_actions(self) -> int:
        """Steps in which the run went on without an update."""
        return sum(entry["action"] != STOP for entry in self.entries.values())


class BadNumbers:
    """The policy at work; the hooks of `engine.update_guard`.

    Args:
        args: Megatron's namespace; `bad_numbers_losses` is kept in it, so that checkpoints hold it.
        ledger: of the run, the same on all ranks.
        losses: from the checkpoint that is continued.
        choose_target: finds the checkpoint for a rollback before the given step, on all ranks; None: there is none.
        finish_saves: waits for a save that is under way, on all ranks, so that an end does not cost it.
        documents: names the documents behind samples, on rank 0: (first sample, number, places) -> texts.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        ledger: Ledger,
        losses: Sequence[float],
        choose_target: Callable[[int], int | None],
        finish_saves: Callable[[], None],
        documents: Callable[[int, int, list[tuple[int, int | None]]], list[str]],
    ) -> None:
        self._args, self._ledger = args, ledger
        self._choose_target, self._finish_saves, self._documents = choose_target, finish_saves, documents
        self._sums: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._micro_batch, self._has_bad_gradient, self._num_seen = int(_NO_MICRO_BATCH), False, 0
        self._rollback_to: int | None = None
        args.bad_numbers_losses = list(losses)

    def saw_loss(self, total: torch.Tensor, count: torch.Tensor) -> None:
        """Take note of a micro-batch: the sum of its losses and the number of its tokens."""
        self._sums.append(total.detach().clone())  # Megatron's schedule divides the sum in place
        self._counts.append(count.detach().clone())

    def reject(self, message: str) -> None:
        """See `StepHooks`."""
        if "loss" in message:
            if self._micro_batch < 0:
                self._micro_batch = len(self._sums)
        else:
            self._has_bad_gradient = True

    def may_update(self, step: int, grad_norm: float) -> bool:
        """Judge the step and write down what will be done; see `StepHooks`."""
        table = self._gather(grad_norm)
        loss, verdict = judge(table, self._args.bad_numbers_losses, self._args.spike_sigmas)
        samples = self._samples()
        before = self._ledger.entries.get(step)
        if before is not None and before["action"] != STOP and before["samples"] == list(samples):
            self._say(f"step {step}: {before['action']} again, as before: {before['cause']}")
            self._rollback_to = before.get("to")
            return False
        if verdict is None:
            self._args.bad_numbers_losses = [*self._args.bad_numbers_losses, loss][-WINDOW:]
            return True
        self._act(step, verdict, samples)
        return False

    def after_step(self, step: int, restore: Callable[[Path, int], None]) -> None:
        """Carry out a rollback; see `StepHooks`."""
        self._sums, self._counts = [], []
        self._micro_batch, self._has_bad_gradient = int(_NO_MICRO_BATCH), False
        if self._rollback_to is None:
            return
        target, self._rollback_to = self._rollback_to, None
        restore(Path(self._args.save), target)
        self._say(f"step {step}: the weights are those of step {target} again")

    def _act(self, step: int, verdict: Verdict, samples: tuple[int, int]) -> None:
        action, to, why = self._args.bad_numbers, None, ""
        if action != STOP and self._ledger.num_actions >= self._args.bad_numbers_budget:
            action, why = STOP, f" (--bad-numbers-budget {self._args.bad_numbers_budget} is used up)"
        if action == ROLLBACK:
            to = self._choose_target(step)
            if to is None:
                action, why = STOP, " (there is no checkpoint to roll back to)"
        is_first = self._args.rank == 0
        documents = self._documents(samples[0], samples[1] - samples[0], verdict.places) if is_first else []
        entry = {"step": step, "samples": list(samples), "action": action, "to": to, "cause": verdict.cause}
        entry |= {"loss": f"{verdict.loss:.7g}", "grad_norm": f"{verdict.grad_norm:.7g}"}  # JSON has no NaN
        if is_first:
            self._ledger.write(entry | {"documents": documents})
        self._ledger.entries[step] = entry
        shown = "; ".join(documents[:8]) + (f"; and {len(documents) - 8} more" if len(documents) > 8 else "")
        what = {STOP: "the run stops", SKIP: "the batch is left out", ROLLBACK: f"back to step {to}"}[action]
        line = f"step {step}: {verdict.cause} (gradient norm {verdict.grad_norm:.4g}); not updated, {what}{why}"
        self._say(f"{line}. Documents: {shown or 'not known'}")
        if action == STOP:
            self._finish_saves()
            raise BadNumbersError(
                f"{line}. The documents are in {self._ledger.path}, and tools/which_documents.py --step {step} shows "
                "their text; --bad-numbers skip or rollback goes on without the batch"
            )
        self._rollback_to = to

    def _samples(self) -> tuple[int, int]:
        """[first, last + 1) of the step, counted over the run."""
        from megatron.core.num_microbatches_calculator import get_current_global_batch_size

        first = int(self._args.consumed_train_samples)
        return first, first + int(get_current_global_batch_size())

    def _gather(self, grad_norm: float) -> list[Row]:
        import torch
        from megatron.core import parallel_state

        device = torch.cuda.current_device()
        zero = torch.zeros((), dtype=torch.float64, device=device)
        loss_sum = sum((each.double() for each in self._sums), zero)
        count = sum((each.double() for each in self._counts), zero)
        row = Row(
            float(loss_sum), float(count), grad_norm, parallel_state.get_data_parallel_rank(),
            self._micro_batch, self._has_bad_gradient,
        )  # fmt: skip
        own = torch.tensor(row.values(), dtype=torch.float64, device=device)
        table = own.new_empty(torch.distributed.get_world_size() * len(own))
        torch.distributed.all_gather_into_tensor(table, own)
        return [Row.of(values) for values in table.view(-1, len(own)).tolist()]

    def _say(self, line: str) -> None:
        if self._args.rank == 0:
            get_logger(__name__).warning("bad numbers: %s", line)
