"""Runs the steps of an example one after another: what runs now, how far it is, how long is left, what it took.

A step is a function that returns one line about its result. The runner prints the step
and the commands it starts, keeps their whole output in a log file, shows the lines that
matter, samples the memory of the process tree, and remembers finished steps on disk so
that `resume` can skip them. Ctrl-C and SIGTERM end the commands, too. It knows nothing about language models.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from megatron_ledom.errors import LedomError
from megatron_ledom.log import format_seconds

SAMPLE_MEMORY_EVERY_S = 2.0


class StepFailedError(LedomError):
    """A command of a step ended with an error; the message names its log and shows the end of it."""


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        name: also the name of its log and its record; unique in the plan.
        title: what it does, for the screen and the closing table.
        work: does it, and returns one line about the result.
        expected_s: seconds it took where the plan was tuned; only their ratios matter.
    """

    name: str
    title: str
    work: Callable[[], str]
    expected_s: float


@dataclass(frozen=True)
class Finished:
    """The record of a finished step."""

    title: str
    result: str
    seconds: float


class Runner:
    """Runs a plan in `folder`; logs go to `folder/logs`, records of finished steps to `folder/steps`."""

    def __init__(self, folder: Path, *, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.peak_memory_bytes = 0
        self._environment = dict(environment)
        self._running: set[subprocess.Popen[str]] = set()
        self._log = folder / "logs" / "unnamed.log"
        for name in ("logs", "steps"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def run_plan(self, plan: Sequence[Step]) -> list[Finished]:
        """Run every step that has no record yet and return all records in order; to be called in the main thread."""
        before = signal.signal(signal.SIGTERM, self._stop)
        stop = threading.Event()
        sampler = threading.Thread(target=self._sample_memory, args=(stop,), daemon=True)
        sampler.start()
        finished: list[Finished] = []
        try:
            for index, step in enumerate(plan):
                print(f"[{index + 1:2d}/{len(plan)}] {step.title}{self._time_left(plan, finished)}", flush=True)
                finished.append(self._run_step(step))
        finally:
            signal.signal(signal.SIGTERM, before)
            stop.set()
            sampler.join()
        return finished

    def command(
        self,
        command: Sequence[object],
        *,
        show: Callable[[str], str | None] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command and return its standard output; standard error goes to the log alone.

        Args:
            command: the program and its arguments.
            show: called with each line of output (both streams); what it returns is shown as progress.
            environment: variables beside those given to the runner.

        Raises:
            StepFailedError: the command's exit status is not 0.
        """
        words = [str(word) for word in command]
        print("        $", as_typed(words), flush=True)
        output: list[str] = []
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(words)}\n")
            process = subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**self._environment, **(environment or {})},
            )
            lock = threading.Lock()

            def follow(stream_name: str) -> None:
                for line in getattr(process, stream_name):
                    with lock:
                        log.write(line)
                        log.flush()
                        if stream_name == "stdout":
                            output.append(line)
                        progress = show(line) if show else None
                        if progress:
                            print(f"          {progress}", flush=True)

            threads = [threading.Thread(target=follow, args=(name,), daemon=True) for name in ("stdout", "stderr")]
            for thread in threads:
                thread.start()
            self._running.add(process)
            try:
                status = process.wait()
            except BaseException:  # Ctrl-C: leave no training behind
                process.terminate()
                process.wait()
                raise
            finally:
                self._running.discard(process)
                for thread in threads:
                    thread.join(timeout=30)
        if status != 0:
            end = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
            raise StepFailedError(f"{words[0]} ... exited with {status}; the end of {self._log}:\n{end}")
        return "".join(output)

    def _stop(self, number: int, _frame: object) -> NoReturn:
        """On SIGTERM: end the commands of all threads, so that each thread comes back, and leave."""
        for process in list(self._running):
            process.terminate()
        raise SystemExit(128 + number)

    def _run_step(self, step: Step) -> Finished:
        record = self.folder / "steps" / f"{step.name}.json"
        if record.is_file():
            done = Finished(**json.loads(record.read_text(encoding="utf-8")))
            print(f"        already done: {done.result}", flush=True)
            return done
        self._log = self.folder / "logs" / f"{step.name}.log"
        started = time.monotonic()
        result = step.work()
        done = Finished(step.title, result, time.monotonic() - started)
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(done), indent=2), encoding="utf-8")
        temporary.replace(record)
        print(f"        {result} ({format_seconds(done.seconds)})", flush=True)
        return done

    def _time_left(self, plan: Sequence[Step], finished: Sequence[Finished]) -> str:
        """Scale what is expected of the rest by how the finished steps compare with what was expected of them."""
        expected = sum(step.expected_s for step in plan[: len(finished)])
        rest = sum(step.expected_s for step in plan[len(finished) :])
        taken = sum(step.seconds for step in finished)
        pace = taken / expected if expected >= 0.1 * (expected + rest) else 1.0  # the first steps say little
        return f"   [about {format_seconds(rest * pace)} left in all]"

    def _sample_memory(self, stop: threading.Event) -> None:
        while not stop.wait(SAMPLE_MEMORY_EVERY_S):
            self.peak_memory_bytes = max(self.peak_memory_bytes, tree_memory_bytes(os.getpid()))


def tree_memory_bytes(root: int) -> int:
    """Return the memory of a process and its descendants, shared pages counted once (PSS).

    Args:
        root: the process id.
    """
    total = 0
    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def as_typed(words: Sequence[str]) -> str:
    r"""Write a command as a person would type it here: short names, quotes where needed.

    >>> as_typed([sys.executable, "-m", "torch.distributed.run", "--standalone", "--separator", "\n"])
    "torchrun --standalone --separator $'\\n'"
    """
    here = f"{Path.cwd()}/"
    words = ["python" if word == sys.executable else word.removeprefix(here) for word in words]
    if words[1:3] == ["-m", "torch.distributed.run"]:
        words = ["torchrun", *words[3:]]
    return " ".join(shlex.quote(w) if w.isprintable() else f"${w!a}" for w in words)
