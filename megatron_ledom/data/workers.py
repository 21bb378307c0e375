"""Processes that take items one by one, and end when the parent does.

    parent --item--> worker --reports, result or error--> parent --next item--> ...

Workers are forked where this process has one thread, because a fork shares the loaded tokenizer and
takes a millisecond; a fork of a process with threads can hang, so then they are spawned and the task is pickled.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from megatron_ledom import errors
from megatron_ledom.errors import InputError, LedomError

Report = Callable[[int], None]
_POLL_S = 1.0
_REPORT_S = 0.1  # between two reports of a worker


def run_parallel[Item, Result](
    task: Callable[[Item, Report], Result],
    items: Iterable[Item],
    workers: int,
    *,
    on_report: Report = lambda amount: None,
    doing: str = "working",
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, task(item, report)) for every item, in the order in which they are finished.

    Args:
        task: called in the workers, or here where `workers` is 1; picklable. It calls `report(amount)` often.
        items: picklable.
        workers: processes at most.
        on_report: called here with what a task reports.
        doing: for the message where a worker dies.

    Raises:
        LedomError: what a task raised; the other workers are stopped.
        InputError: a worker was killed.
    """
    if workers == 1:
        for item in items:
            yield item, task(item, on_report)
        return
    pool: list[_Worker] = []
    try:
        yield from _run(task, list(items), workers, pool, on_report, doing)
    finally:
        for worker in pool:
            worker.stop()


def _run(
    task: Any, pending: list[Any], workers: int, pool: list[_Worker], on_report: Report, doing: str
) -> Iterator[tuple[Any, Any]]:
    queue = iter(pending)
    for item in queue:
        pool.append(_Worker(task, [w.connection for w in pool]))
        pool[-1].give(item)
        if len(pool) == min(workers, len(pending)):
            break
    busy = {worker.connection: worker for worker in pool}
    while busy:
        for connection in wait(list(busy)):
            worker = busy[cast("Connection", connection)]
            kind, value = worker.receive(doing)
            if kind == "report":
                on_report(value)
                continue
            if kind == "error":
                raise value
            done = worker.item
            following = next(queue, _NOTHING)
            if following is _NOTHING:
                del busy[worker.connection]
            else:
                worker.give(following)
            yield done, value


_NOTHING = object()


def has_one_thread() -> bool:
    """Whether this process can be forked safely."""
    return len(list(Path("/proc/self/task").iterdir())) == 1


class _Worker:
    def __init__(self, task: Any, others: list[Connection] | None = None) -> None:
        is_alone = has_one_thread()
        context: Any = multiprocessing.get_context("fork" if is_alone else "spawn")
        self.connection, theirs = context.Pipe()
        inherited = [*(others or ()), self.connection] if is_alone else []
        self.item: Any = None
        self._process = context.Process(target=_work, args=(task, theirs, inherited, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, item: Any) -> None:
        self.item = item
        with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed when its answer is awaited
            self.connection.send(item)

    def receive(self, doing: str) -> tuple[str, Any]:
        """Return the kind and value of the next message; raises InputError where the worker died."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            raise InputError(
                f"a worker process died while {doing} (exit code {code}: killed, or out of memory?); what was "
                "finished is kept, and the same command goes on from there. Try fewer --workers"
            ) from None
        if kind == "error":
            name, text = value
            known = getattr(errors, name, None)
            if isinstance(known, type) and issubclass(known, LedomError):
                return kind, known(text)
            return kind, RuntimeError(f"in a worker process:\n{text}")
        return kind, value

    def stop(self) -> None:
        self.connection.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _work(task: Any, connection: Connection, inherited: list[Connection], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for other in inherited:
        other.close()

    unsaid, said_at = 0, 0.0

    def report(amount: int, *, is_last: bool = False) -> None:
        nonlocal unsaid, said_at
        _leave_with(parent)
        unsaid, now = unsaid + amount, time.monotonic()
        if unsaid and (is_last or now >= said_at + _REPORT_S):  # each costs the parent time that workers could use
            connection.send(("report", unsaid))
            unsaid, said_at = 0, now

    try:
        while True:
            while not connection.poll(_POLL_S):
                _leave_with(parent)
            result = task(connection.recv(), report)
            report(0, is_last=True)
            connection.send(("result", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # no more work, or no parent
        return
    except LedomError as error:
        connection.send(("error", (type(error).__name__, str(error))))
    except Exception:
        connection.send(("error", ("", traceback.format_exc())))


def _leave_with(parent: int) -> None:
    if os.getppid() != parent:
        os._exit(1)
