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
    """All ranks over gloo, for objects, and a store in which each writes how far it is.

    Args:
        place: this process.
        timeout_s: for everything together.
    """

    def __init__(self, place: Place, timeout_s: float) -> None:
        self.place = place
        self._deadline = time.monotonic() + timeout_s
        self._store: torch.distributed.Store | None = None
        if place.world_size == 1:
            return
        import torch.distributed as dist

        timeout = datetime.timedelta(seconds=timeout_s)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(host, port, place.world_size, place.rank == 0, timeout, wait_for_workers=False)
        self.reach("start")

    def watch(self, on_timeout: Callable[[list[Finding]], int]) -> None:
        """End this process when the time is up; rank 0 first says, by `on_timeout`, who is behind.

        Args:
            on_timeout: given what was found about missing ranks, reports and returns the exit status.
        """

        def wait() -> None:
            late = 0 if self.place.rank == 0 else 5
            time.sleep(max(0.0, self._deadline - time.monotonic()) + late)
            os._exit(on_timeout(self.behind()) if self.place.rank == 0 else 1)

        threading.Thread(target=wait, name="preflight timeout", daemon=True).start()

    def join(self) -> None:
        """Connect the ranks; they wait for each other here."""
        if self._store is not None:
            import torch.distributed as dist

            dist.init_process_group("gloo", store=self._store, rank=self.place.rank, world_size=self.place.world_size)

    def reach(self, stage: str) -> None:
        """Write down that this rank begins `stage`, one of STAGES."""
        if self._store is not None:
            self._store.set(f"preflight/{self.place.rank}", f"{STAGES.index(stage)} {self.place.node}")

    def gather(self, item: Any) -> list[Any]:
        """Every rank's `item`, on every rank."""
        if self._store is None:
            return [item]
        import torch.distributed as dist

        items: list[Any] = [None] * self.place.world_size
        dist.all_gather_object(items, item)
        return items

    def behind(self) -> list[Finding]:
        """Who is least far, when the others wait for it."""
        if self._store is None:
            return [Finding("time", Level.BAD, "this process did not finish", self.place.node)]
        written: list[tuple[int, str] | None] = []
        for rank in range(self.place.world_size):
            key = f"preflight/{rank}"
            stage, node = self._store.get(key).decode().split(" ", 1) if self._store.check([key]) else ("", "")
            written.append((int(stage), node) if node else None)
        return find_behind(written)


def find_behind(written: Sequence[tuple[int, str] | None]) -> list[Finding]:
    """Blame the ranks that are less far than others.

    Args:
        written: of each rank the stage it began and its node; None where it never started.
    """
    missing = [rank for rank, each in enumerate(written) if each is None]
    if missing:
        return [
            Finding("time", Level.BAD, f"ranks {missing} never started: does the first node's name resolve on theirs?")
        ]
    stages = [each[0] for each in written if each is not None]
    last = min(stages)
    if last == max(stages):
        return [
            Finding(
                "time", Level.BAD, f"all ranks are stuck in {STAGES[last]!r}: a matter of the network between them?"
            )
        ]
    return [
        Finding("time", Level.BAD, f"rank {rank} is stuck in {STAGES[last]!r} while others wait for it", each[1])
        for rank, each in enumerate(written)
        if each is not None and each[0] == last
    ]
