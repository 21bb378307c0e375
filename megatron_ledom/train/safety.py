"""What watches over a run's steps, put together from the command line: bad numbers, drills, the hang watch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.checkpoint import commit
from megatron_ledom.engine import saving, update_guard
from megatron_ledom.engine.rendezvous import Agreement
from megatron_ledom.train.bad_numbers import LEDGER, MEGATRON, BadNumbers, Ledger
from megatron_ledom.train.batch_documents import BatchDocuments
from megatron_ledom.train.drills import Drill, parse_faults
from megatron_ledom.train.guards import RunFacts
from megatron_ledom.train.hang_watch import SHARE_OF_TIMEOUT, HangWatch
from megatron_ledom.train.resume import choose
from megatron_ledom.train.saves import Saves

if TYPE_CHECKING:
    import torch


def hang_timeout_s(args: argparse.Namespace) -> float:
    """The time after which a rank counts as hanging, in seconds; 0: never."""
    given = args.hang_timeout
    return float(60 * SHARE_OF_TIMEOUT * args.distributed_timeout_minutes if given is None else given)


class Safety:
    """The guards of one launch.

    Args:
        args: Megatron's namespace.
        facts: data and checkpoints of the run.
        agreement: between its ranks.
        saves: its saves.
        watch: told of every forward step.
    """

    def __init__(
        self, args: argparse.Namespace, facts: RunFacts, agreement: Agreement, saves: Saves, watch: HangWatch
    ) -> None:
        self._args, self._agreement, self._saves, self._watch = args, agreement, saves, watch
        self._documents = BatchDocuments(args, facts.datasets)
        self._drill = Drill(parse_faults(args.inject_fault), args.rank)
        self._numbers: BadNumbers | None = None
        update_guard.restore()
        if args.bad_numbers != MEGATRON:
            resumed = None if args.finetune else facts.resumed
            losses: Sequence[float] = getattr(resumed, "bad_numbers_losses", [])
            documents = self._documents.name
            self._numbers = BadNumbers(
                args, self._read_ledger(), losses, self._choose_target, saving.finish_pending_save, documents
            )
            update_guard.install(self._numbers)

    def keeping_documents(self, provide: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the dataset provider, so that documents can be named."""
        return self._documents.keeping(provide)

    def watching(self, forward_step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Wrap the forward step: it gives signs of life, carries out drills, and lays its losses on the table."""
        args, numbers = self._args, self._numbers

        def watched_step(data_iterator: Any, model: Any) -> tuple[Any, Callable[[torch.Tensor], Any]]:
            """Take the forward step between the signs of life and the drills."""
            step = args.curr_iteration + 1
            self._watch.tick(step)
            if not model.training:
                return forward_step(data_iterator, model)
            self._drill.begin(step)
            output, loss_function = forward_step(data_iterator, model)

            def watched_loss(losses: torch.Tensor) -> Any:
                total, count, report = loss_function(losses)
                if numbers is not None:
                    numbers.saw_loss(total, count)
                return total, count, report

            return self._drill.distort(step, output), watched_loss

        return watched_step

    def _read_ledger(self) -> Ledger:
        """The same on all ranks: what rank 0 reads."""
        path = Path(self._args.run_dir) / LEDGER
        if self._agreement.rank == 0:
            self._agreement.post("ledger", path.read_text(encoding="utf-8") if path.is_file() else "")
        return Ledger.parse(path, self._agreement.read("ledger"))

    def _choose_target(self, step: int) -> int | None:
        """The newest sound checkpoint before `step`, once every save is finished; on all ranks."""
        if not self._args.save:
            return None
        saving.finish_pending_save()
        save, label = Path(self._args.save), f"rollback/{step}"
        if self._agreement.rank == 0:
            self._saves.wait()
            steps = [each for each in commit.candidates(save) if each < step]
            self._agreement.post(label, ",".join(map(str, steps)))
        words = self._agreement.read(label)
        return (
            choose(save, [int(w) for w in words.split(",")], self._agreement, is_own=True, label=label)
            if words
            else None
        )
