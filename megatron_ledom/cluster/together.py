"""The ranks of a preflight: who and where they are, how they exchange findings, and who is missing when time is up."""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ledom.cluster.findings import Finding, Level

if TYPE_CHECKING:
    import torch.distributed

STAGES = ("start", "health", "alone", "exchange", "collectives", "end")
BEAT_S = 0.5
SILENT_S = 3.0


@dataclass(frozen=True)
class Place:
    """Where this process runs, from the variables of torchrun or examples/slurm/task.sh.

    Attributes:
        rank: among all ranks.
        world_size: number of ranks; 1 without a launcher.
        local_rank: among those of this node.
        node: Slurm's name of the node, else the host's.
    """

    rank: int
    world_size: int
    local_rank: int
    node: str

    @classmethod
    def of_this_process(cls) -> Place:
        """Read the environment."""
        rank, world_size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        return cls(rank, world_size, local_rank, os.environ.get("SLURMD_NODENAME") or os.uname().nodename)


class Team:
    """All ranks over gloo, for objects, and a store in which each writes how far it is, and that it lives.

    A thread writes, on a connection of its own: the main thread may wait in the store, or in a collective, for
    a rank that does not come, and only the rank that is itself stopped or gone falls silent.

    Args:
        place: this process.
        timeout_s: for everything together.
    """

    def __init__(self, place: Place, timeout_s: float) -> None:
        self.place = place
        self._deadline = time.monotonic() + timeout_s
        self._stage, self._beats = STAGES[0], 0
        self._store: torch.distributed.Store | None = None
        self._signs: torch.distributed.Store | None = None
        if place.world_size == 1:
            return
        import torch.distributed as dist

        timeout = datetime.timedelta(seconds=timeout_s)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(host, port, place.world_size, place.rank == 0, timeout, wait_for_workers=False)
        self._signs = dist.TCPStore(host, port, None, False, timeout, wait_for_workers=False)
        self._sign()

    def watch(self, on_timeout: Callable[[list[Finding]], int]) -> None:
        """End this process when the time is up; rank 0 first says, by `on_timeout`, who is behind.

        Args:
            on_timeout: given what was found about missing ranks, reports and returns the exit status.
        """

        def wait() -> None:
            late = 0.0 if self.place.rank == 0 else SILENT_S + 5  # rank 0 holds the store, and speaks first
            while time.monotonic() < self._deadline + late:
                time.sleep(BEAT_S)
                self._sign()
            os._exit(on_timeout(self.behind()) if self.place.rank == 0 else 1)

        threading.Thread(target=wait, name="preflight signs", daemon=True).start()

    def join(self) -> None:
        """Connect the ranks; they wait for each other here."""
        if self._store is not None:
            import torch.distributed as dist

            dist.init_process_group("gloo", store=self._store, rank=self.place.rank, world_size=self.place.world_size)

    def reach(self, stage: str) -> None:
        """Say that this rank begins `stage`, one of STAGES; the next sign carries it."""
        self._stage = stage

    def gather(self, item: Any) -> list[Any]:
        """Every rank's `item`, on every rank."""
        if self._store is None:
            return [item]
        import torch.distributed as dist

        items: list[Any] = [None] * self.place.world_size
        dist.all_gather_object(items, item)
        return items

    def behind(self) -> list[Finding]:
        """Who is silent, or least far while the others wait for it; after the last exchange nobody but this rank.

        Then the others have returned and are silent because they are done, and what takes long is the look at the
        run's files, which leaving out a node need not mend: no node is blamed.
        """
        if self._stage == STAGES[-1]:
            text = (
                f"rank {self.place.rank} on {self.place.node} has not finished its look at the run (data, checkpoint, "
                "disk, configuration); all ranks were heard. Is the file system slow? --timeout-s gives it longer"
            )
            return [Finding("time", Level.BAD, text)]
        if self._signs is None:
            return [Finding("time", Level.BAD, "this process did not finish", self.place.node)]
        before = self._read_signs()
        time.sleep(SILENT_S)
        after = self._read_signs()
        others = [
            rank for rank in range(self.place.world_size) if rank != self.place.rank
        ]  # this thread writes no more
        silent = [rank for rank in others if before[rank] and before[rank] == after[rank]]
        return find_behind([sign and (sign[0], sign[2]) for sign in after], silent)

    def _sign(self) -> None:
        if self._signs is not None:
            self._beats += 1
            sign = f"{STAGES.index(self._stage)} {self._beats} {self.place.node}"
            self._signs.set(f"preflight/{self.place.rank}", sign)

    def _read_signs(self) -> list[tuple[int, int, str] | None]:
        """Of each rank stage, beat and node; None where it has not started."""
        assert self._signs is not None
        signs: list[tuple[int, int, str] | None] = []
        for rank in range(self.place.world_size):
            key = f"preflight/{rank}"
            if self._signs.check([key]):
                stage, beat, node = self._signs.get(key).decode().split(" ", 2)
                signs.append((int(stage), int(beat), node))
            else:
                signs.append(None)
        return signs


def find_behind(written: Sequence[tuple[int, str] | None], silent: Sequence[int]) -> list[Finding]:
    """Blame the ranks that are gone, or less far than others.

    Args:
        written: of each rank the stage it began and its node; None where it never started.
        silent: ranks that had started and give no sign any more.
    """
    check, started = "time", [(rank, each[0], each[1]) for rank, each in enumerate(written) if each is not None]
    missing = [rank for rank, each in enumerate(written) if each is None]
    if missing:
        text = f"ranks {missing} never started: does the name of the first node resolve on theirs?"
        return [Finding(check, Level.BAD, text)]
    if silent:
        return [
            Finding(check, Level.BAD, f"rank {rank} gives no sign of life since {STAGES[stage]!r}", node)
            for rank, stage, node in started
            if rank in silent
        ]
    last = min(stage for _, stage, _ in started)
    late = [(rank, node) for rank, stage, node in started if stage == last]
    if len(late) == len(started):
        text = f"all ranks are stuck in {STAGES[last]!r}: a matter of the network between them?"
        return [Finding(check, Level.BAD, text)]
    text = f"is stuck in {STAGES[last]!r} while others wait for it"
    return [Finding(check, Level.BAD, f"rank {rank} {text}", node) for rank, node in late]
