"""A run that is asked to stop: what SIGTERM and SIGUSR1 do in every phase, and what a run says and returns at its end.

Slurm warns a job before its time limit and before a preemption. What must happen then
depends on what the run is doing:

    start-up      nothing is lost that a restart would keep: the process ends at once
    a step        the step is finished, saved, and the run ends
    evaluation    it is left after its current batch; the step before it is saved, and the run ends
    a save        it is finished, and the run ends without another step

Megatron has the last three already, for `--exit-duration-in-mins`: all ranks compare their
clocks at the end of a step, after a regular save and within an evaluation. (Its own
`--exit-signal-handler` looks once a step, before the regular save: after a signal that comes
during a save it takes another step and saves again, and it sits an evaluation out.) So a
signal does no more than to shorten that duration to nothing, on whichever rank it arrives; a rank first leaves word
of it in the launch's store, where rank 0, whose status counts, finds it at the end.

The signals are blocked, not handled, and a thread waits for them: it hears them while the main
thread is inside a collective, and the processes that a run starts (loaders, writers of
checkpoints) inherit the block. Slurm signals those too, and they would die of it. It owns
neither the decision to start again, which is the batch script's, nor any save.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ledom.log import get_logger

if TYPE_CHECKING:
    from megatron_ledom.engine.rendezvous import Agreement

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED_STATUS = 75
"""Exit status of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h, "try again later"."""

_KEY = "stopped"
_NEVER_MINS = 10**9
_NOW_MINS = 1e-9


class StopRequest:
    """Whether this process has been asked to stop; `watch()` starts listening."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._args: argparse.Namespace | None = None
        self._agreement: Agreement | None = None
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Block the signals in this process and its children, and wait for them in a thread.

        Call it from the main thread before anything heavy is imported: a thread that numpy or torch has started
        before would not block them, and the process would die of the first one.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        # The first process that multiprocessing spawns brings its resource tracker, and starting that ends with
        # SIGTERM unblocked, in this thread and in all that it starts later. So it is started now.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def arm(self, args: argparse.Namespace, agreement: Agreement | None = None) -> None:
        """Let every rank compare clocks from the first step on: they must all do it, or none.

        Args:
            args: Megatron's global arguments.
            agreement: between the ranks, through which rank 0 hears of a signal to another one.
        """
        self._agreement = agreement
        if not args.exit_duration_in_mins:
            args.exit_duration_in_mins = _NEVER_MINS

    def leave_startup(self, args: argparse.Namespace) -> None:
        """Say that the first step is near: from now on a signal ends the run by a save."""
        with self._lock:
            self._args = args

    def _watch(self) -> None:
        while True:
            self.receive(signal.sigwait(SIGNALS))

    def receive(self, number: int) -> None:
        """Do what the signal asks for."""
        name = signal.Signals(number).name
        with self._lock:
            self.received = self.received or name
            if self._args is None:
                say(f"run ended: {name} during start-up; nothing was lost, the same command starts it again")
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                signal.raise_signal(number)  # the status then says which signal it was
                os._exit(128 + number)  # it is ignored: by nohup, for instance
            self._leave_word(name)  # before the ranks compare their clocks: then rank 0 finds it after they have
            self._args.exit_duration_in_mins = _NOW_MINS
            say(f"{name}: the run ends, saved, when its step, evaluation or save is over")

    def _leave_word(self, name: str) -> None:
        if self._agreement is None or self._agreement.rank == 0:
            return
        try:
            self._agreement.post_first(_KEY, f"{name} to rank {self._agreement.rank}")
        except RuntimeError as error:  # the store's host is gone, and with it the launch: stop all the same
            get_logger(__name__).warning("warning: %s was heard, but rank 0 could not be told: %s", name, error)

    def heard(self) -> str | None:
        """The signal that this process received, else on rank 0 the first of another rank, with its number; or None."""
        if self.received or self._agreement is None or self._agreement.rank != 0:
            return self.received
        return self._agreement.find(_KEY)


def count_cut_evaluation(args: argparse.Namespace) -> None:
    """Count an evaluation that a signal cut short as read to its end, after a checkpoint has been loaded.

    Every evaluation reads the samples that follow the last one's, and a checkpoint says how
    many were read. Rounded up, the evaluations after the resume read what those of an
    uninterrupted run read; the one that was cut has no value in the curve.
    """
    if args.full_validation or not isinstance(args.eval_iters, int) or args.eval_iters < 1:
        return
    whole = args.eval_iters * (args.eval_global_batch_size or args.global_batch_size)
    args.consumed_valid_samples = -(-args.consumed_valid_samples // whole) * whole


def end_of_run(stop: StopRequest, args: argparse.Namespace) -> int:
    """Say why the run ended, as the last line of its log, and return its exit status.

    Args:
        stop: what was asked for.
        args: Megatron's global arguments, after `pretrain()` came back or left by `sys.exit(0)`.

    Returns:
        0, or `STOPPED_STATUS` on rank 0 where a signal, to whichever rank, was why. Rank 0 speaks for all: a launcher
        ends the other ranks when one comes back with a status, and rank 0, which also writes the checksums, is the last
        to be done.
    """
    saved = last_saved(args.save)
    at = "nothing was saved" if saved is None else f"step {saved} is saved"
    heard = stop.heard()
    if heard:
        say(f"run ended: {heard}; {at}, the same command goes on from there")
        return STOPPED_STATUS if args.rank == 0 else 0
    steps = max(int(args.curr_iteration) + 1, int(args.iteration))  # the second, where there was nothing left to do
    if args.train_iters and steps < args.train_iters:
        say(f"run ended: before step {args.train_iters}, as its arguments ask (--exit-interval ...); {at}")
    else:
        say(f"run ended: all {args.train_iters} steps are done; {at}")
    return 0


def last_saved(save: str | None) -> int | None:
    """The iteration that Megatron's tracker in the folder `save` names; None where there is none."""
    from megatron_ledom.checkpoint.locate import TRACKER  # brings numpy, whose threads must not come before `watch`

    try:
        word = (Path(save or "") / TRACKER).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(word) if word.isascii() and word.isdigit() else None


def say(message: str) -> None:
    """Print one line on rank 0, past logging: a process that ends at once has no time to flush."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.flush()
        os.write(2, f"{message}\n".encode())
