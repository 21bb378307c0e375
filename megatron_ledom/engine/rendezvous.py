"""What ranks tell each other beside the process group: before it exists, and when it hangs.

The key-value store of the launch is used, a second client of it: under torchrun the agent's, otherwise the one
that rank 0 opens for `torch.distributed` too. Keys carry a prefix, so that nothing of torch's is touched.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

_PREFIX = "megatron_ledom"


def own_rank() -> tuple[int, int]:
    """(rank, number of ranks) of this process, from the environment."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Agreement:
    """Small decisions that every rank must take alike; with one rank, nothing but a memory.

    Args:
        timeout_s: how long a rank waits for an answer of another; hashing a large checkpoint takes minutes.
    """

    def __init__(self, timeout_s: float = 7200.0) -> None:
        self.rank, self.world_size = own_rank()
        self._store = open_store(timeout_s) if self.world_size > 1 else None
        self._memory: dict[str, str] = {}

    def post(self, key: str, value: str) -> None:
        """Say something once, under a key that nobody else uses."""
        if self._store is None:
            self._memory[key] = value
        else:
            self._store.set(key, value)

    def read(self, key: str) -> str:
        """Wait until somebody has posted `key`, and return it."""
        return self._memory[key] if self._store is None else self._store.get(key).decode()

    def post_first(self, key: str, value: str) -> None:
        """Say something under a key that several may use: the first one's word stays. It is there when this returns."""
        if self._store is None:
            self._memory.setdefault(key, value)
        else:
            self._store.compare_set(key, "", value)  # unlike `set`, it waits for the answer

    def find(self, key: str) -> str | None:
        """What has been posted under `key`, or None; does not wait."""
        if self._store is None:
            return self._memory.get(key)
        return self._store.get(key).decode() if self._store.check([key]) else None


def open_store(timeout_s: float) -> Any:
    """Another client of the launch's store."""
    import torch

    timeout = datetime.timedelta(seconds=timeout_s)
    store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return torch.distributed.PrefixStore(_PREFIX, store)
