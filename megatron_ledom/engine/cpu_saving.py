"""Checkpoints written in the background on the CPU: by a fork of the rank.

Megatron's persistent worker gets tensors of a GPU, copies them to the host, and lets the training go on. Tensors
that are on the host already it would share with the run, which goes on changing them: a checkpoint of two steps
at once. A fork holds the memory as it was. It is Megatron's own `TemporalAsyncCaller`, which 0.19.2 still has and
no longer offers.

What the fork has written it tells through a file in memory, made before the fork. Megatron's way, a manager process,
takes three seconds to start, and outlives a rank that is killed.
"""

from __future__ import annotations

import os
import pickle
import queue
from typing import Any


class ResultInMemory:
    """A queue of one value at a time, which a forked process fills and its parent reads when the other has ended."""

    def __init__(self) -> None:
        self._file = os.memfd_create("write-results")

    def put(self, value: Any) -> None:
        """Leave `value`."""
        with os.fdopen(os.dup(self._file), "wb") as file:
            file.truncate(0)
            file.seek(0)
            pickle.dump(value, file)

    def get_nowait(self) -> Any:
        """Take what was left.

        Raises:
            queue.Empty: nothing was.
        """
        with os.fdopen(os.dup(self._file), "rb+") as file:
            file.seek(0)
            try:
                value = pickle.load(file)  # of this process's own fork, never of a file
            except EOFError:
                raise queue.Empty from None
            file.truncate(0)
        return value


def replacements() -> list[tuple[Any, str, Any]]:
    """What `engine.cpu` puts in place of Megatron's: (owner, name, value)."""
    import megatron.training.initialize as initialize
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    results: dict[int, ResultInMemory] = {}

    def own_results(mp_mode: str = "spawn") -> ResultInMemory:
        """Of this process: ranks that were forked from one process must not share theirs."""
        if os.getpid() not in results:
            results[os.getpid()] = ResultInMemory()
        return results[os.getpid()]

    return [
        (filesystem_async, "get_write_results_queue", own_results),
        (async_utils.AsyncCallsQueue, "_get_async_caller", lambda self: async_utils.TemporalAsyncCaller()),
        (initialize, "init_persistent_async_worker", lambda *args, **kwargs: None),
    ]
