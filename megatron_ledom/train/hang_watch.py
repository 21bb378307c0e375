"""A rank that hangs is named, with the collective and the step, and the job ends.

Every rank has a thread that puts a sign of life into the launch's key-value store: which step, and where its main
thread is, read from that thread's own stack. Two ranks read the signs of all.

    rank   sign   step   where
    0      new    12     all_reduce, called by megatron.core.optimizer.clip_grads.get_grad_norm_fp32
    1      old    12     megatron_ledom.ops.attention.attention            <- does not answer: named
    2      new    12     all_reduce, ...

Two things count as a hang after `timeout_s`: a rank gives no sign (stopped, swapped out, its node gone), or all
do, but no rank has got anywhere. Where some wait in a collective, those are named that do not. On NCCL the host runs
ahead and often waits for the device in an `.item()`, which no stack shows as a collective: once the steps have begun,
ranks are then told apart by where they are, and those that are not where most are come first. Nothing is patched and
training is not touched.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from megatron_ledom.engine.rendezvous import open_store, own_rank
from megatron_ledom.errors import tell_torchrun
from megatron_ledom.log import get_logger

HANG_STATUS = 76
"""Exit status of a rank that ends the job because another hangs."""
SHARE_OF_TIMEOUT = 0.8
"""Of torch's own timeout, which ends a run without a word about who was late."""
_OBSERVERS = 2
_LABEL = "heartbeat"


@dataclass
class Sign:
    """A rank's last sign of life, as an observer knows it."""

    beat: int = -1
    ticks: int = -1
    step: int = 0
    collective: str = ""
    place: str = "start-up"
    seen_s: float = field(default_factory=time.monotonic)
    moved_s: float = field(default_factory=time.monotonic)

    def update(self, content: dict[str, Any], now_s: float) -> None:
        """Take what the store holds; a beat that is known already is no sign."""
        if content["beat"] == self.beat:
            return
        if (content["ticks"], content["place"]) != (self.ticks, self.place):
            self.moved_s = now_s
        self.beat, self.ticks, self.step = content["beat"], content["ticks"], content["step"]
        self.collective, self.place, self.seen_s = content["collective"], content["place"], now_s

    def describe(self) -> str:
        """Where the rank is."""
        return f"{self.collective} ({self.place})" if self.collective else self.place


def find_hang(signs: list[Sign], timeout_s: float, now_s: float) -> str | None:
    """Say which ranks hang, or None.

    Args:
        signs: of all ranks.
        timeout_s: how long without a sign, or without progress, counts.
        now_s: on the observer's clock.
    """
    silent = [rank for rank, sign in enumerate(signs) if now_s - sign.seen_s > timeout_s]
    waiting = [rank for rank, sign in enumerate(signs) if sign.collective and rank not in silent]
    if silent:
        first = signs[silent[0]]
        late_s = now_s - max(signs[rank].seen_s for rank in silent)
        others = waiting or [rank for rank in range(len(signs)) if rank not in silent]
        verb = "waits in" if waiting else "is in"
        wait = f"; {_ranks(others)} {verb} {signs[others[0]].describe()}" if others else ""
        step = max(sign.step for sign in signs)
        last = f"its last sign came from step {first.step}, {first.describe()}"
        return f"{_ranks(silent)} has not answered for {late_s:.0f} s, step {step} ({last}){wait}"
    if waiting and all(now_s - sign.moved_s > timeout_s for sign in signs):
        others = [rank for rank in range(len(signs)) if rank not in waiting]
        step, still_s = signs[waiting[0]].step, now_s - max(sign.moved_s for sign in signs)
        if not others:
            return f"all ranks wait in {signs[0].describe()} for {still_s:.0f} s, step {step}"
        if len({signs[rank].describe() for rank in others}) > 1:
            return _by_place(signs, still_s, step)
        return (
            f"{_ranks(others)} has been in {signs[others[0]].describe()} for {still_s:.0f} s, step {step}; "
            f"{_ranks(waiting)} waits in {signs[waiting[0]].describe()}"
        )
    has_begun = all(sign.step for sign in signs)  # before, a long load or compilation looks the same everywhere
    if has_begun and all(now_s - sign.moved_s > timeout_s for sign in signs):
        return _by_place(signs, now_s - max(sign.moved_s for sign in signs), max(sign.step for sign in signs))
    return None


def _by_place(signs: list[Sign], still_s: float, step: int) -> str:
    """Which ranks are where, the fewest first."""
    places: dict[str, list[int]] = {}
    for rank, sign in enumerate(signs):
        places.setdefault(sign.describe(), []).append(rank)
    if len(places) == 1:
        return f"all ranks have been in {signs[0].describe()} for {still_s:.0f} s, step {step}"
    (place, first), *rest = sorted(places.items(), key=lambda item: len(item[1]))
    shown = [*rest[:2], *(rest[-1:] if len(rest) > 2 else [])]  # the fewest, and where most are
    text = "; ".join(f"{_ranks(ranks)} is in {where}" for where, ranks in shown)
    return f"{_ranks(first)} has been in {place} for {still_s:.0f} s, step {step}; {text}"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"each of ranks {shown}"


def where_is(frame: FrameType | None) -> tuple[str, str]:
    """Read a thread's stack: the collective in which it waits ("" for none), and the function of ours or Megatron's."""
    collective = ""
    while frame is not None:
        module, code = str(frame.f_globals.get("__name__", "")), frame.f_code
        if module == "torch.distributed.distributed_c10d":
            collective = code.co_name.lstrip("_")  # the outermost one counts: what was called, not how it is made
        if module.split(".")[0] in {"megatron", "megatron_ledom"}:
            line = linecache.getline(code.co_filename, frame.f_lineno)
            if not collective and ".wait(" in line:
                collective = "wait of a collective"
            return collective, f"{module}.{code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return collective, "outside of Megatron"


class HangWatch:
    """Watches while its block runs; with one rank there is nobody to wait for.

    Args:
        timeout_s: see `find_hang`.
        run: the run directory; the line goes to RUN/hang.txt too.
    """

    def __init__(self, timeout_s: float, run: Path) -> None:
        self.rank, self.world_size = own_rank()
        self._timeout_s, self._run = timeout_s, run
        self._every_s = min(max(timeout_s / 20, 0.2), 15.0)
        self._step, self._ticks = 0, 0
        self._is_over = threading.Event()
        self._signs = [Sign() for _ in range(self.world_size)]
        self._store_answered_s = time.monotonic()
        self._main_thread = threading.main_thread().ident

    def __enter__(self) -> HangWatch:
        if self.world_size > 1 and self._timeout_s > 0:
            self._start(self._give_signs)
            if self.rank < _OBSERVERS:
                self._start(self._observe)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()

    def tick(self, step: int) -> None:
        """Say that the run moves, and in which step it is, from 1; the forward step calls it."""
        self._step = step
        self._ticks += 1

    def _start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="hang-watch", daemon=True).start()

    def _give_signs(self) -> None:
        store = open_store(self._timeout_s)
        beat, keys = 0, [f"{_LABEL}/{rank}" for rank in range(self.world_size)]
        store.set(keys[self.rank], json.dumps(self._sign(beat)))
        if self.rank < _OBSERVERS:
            store.wait(keys)  # everybody is there
        while not self._is_over.is_set():
            beat += 1
            try:
                store.set(keys[self.rank], json.dumps(self._sign(beat)))
                if self.rank < _OBSERVERS:
                    now_s = time.monotonic()
                    for sign, content in zip(self._signs, store.multi_get(keys), strict=True):
                        sign.update(json.loads(content), now_s)
                self._store_answered_s = time.monotonic()
            except RuntimeError:  # the store is gone: the launcher ends, or its host hangs, which `_observe` says
                pass
            self._is_over.wait(self._every_s)

    def _sign(self, beat: int) -> dict[str, Any]:
        collective, place = where_is(sys._current_frames().get(self._main_thread or 0))
        return {"beat": beat, "ticks": self._ticks, "step": self._step, "collective": collective, "place": place}

    def _observe(self) -> None:
        patience_s = self._timeout_s + self.rank * 4 * self._every_s  # rank 0 speaks, unless it is the one
        while not self._is_over.wait(self._every_s):
            now_s = time.monotonic()
            silence_s = now_s - self._store_answered_s
            if silence_s > patience_s:
                collective, place = where_is(sys._current_frames().get(self._main_thread or 0))
                where = f"{collective} ({place})" if collective else place
                self._end(
                    f"the host of the rendezvous (rank 0, or the launcher of its node) has not answered for "
                    f"{silence_s:.0f} s, step {self._step}; rank {self.rank} is in {where}"
                )
            found = find_hang(self._signs, patience_s, now_s) if silence_s < self._timeout_s / 2 else None
            if found:
                self._end(found)

    def _end(self, what: str) -> None:
        """Say it everywhere, and end this process: the launcher ends the others."""
        line = f"hang: {what}. The job ends; start it again without that rank's node if it happens twice"
        get_logger(__name__).error("error: %s", line)
        tell_torchrun(line)
        try:
            with (self._run / "hang.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(HANG_STATUS)
