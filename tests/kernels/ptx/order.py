"""Which accesses are ordered: vector clocks over the threads of every block, and over what works on their behalf.

Every instruction that is run has a number, the step. known[lane, u] is the last step of thread u of the same block of
which `lane` may see the effects: barriers and arrivals make it grow, the mere passing of time does not. Agents are
further columns: they stand for what completes without a thread, the copies that one barrier counts.

A lane is a thread of any block of the grid; all lanes of a block follow each other.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

NEVER = np.int32(2**31 - 1)
"""The step of what has not happened yet: nobody knows of it."""

OWN = np.int32(2**31 - 2)
"""A thread knows all its own steps."""

UNWRITTEN = np.int32(-1)


class Order:
    """What every lane knows."""

    def __init__(self, num_blocks: int, threads: int, num_agents: int) -> None:
        self.threads = threads
        self.num_warps = -(-threads // 32)
        self.num_agents = num_agents
        self.own = np.tile(np.arange(threads), num_blocks)  # lane -> its column
        lanes = np.arange(num_blocks * threads)
        self.known = np.full((len(lanes), threads + num_agents), UNWRITTEN, np.int32)
        self.known[lanes, self.own] = OWN
        # The same for readers, who are noted by warp: what is known of all threads of a warp.
        self.known_of_readers = np.full((len(lanes), self.num_warps), UNWRITTEN, np.int32)

    def published(self, lanes: Array, step: int) -> Array:
        """What the lanes know together, themselves up to `step` included: [threads + agents]."""
        rows = self.known[lanes]
        rows[np.arange(len(lanes)), self.own[lanes]] = step
        return rows.max(axis=0)

    def learn(self, lanes: Array, published: Array) -> None:
        """The lanes see what was published: [threads + agents], or one row for each lane."""
        rows = np.maximum(self.known[lanes], published)
        rows[np.arange(len(lanes)), self.own[lanes]] = OWN
        self.known[lanes] = rows
        self._update_readers(lanes)

    def meet(self, lanes: Array, step: int) -> None:
        """Lanes of one block wait for each other."""
        self.learn(lanes, self.published(lanes, step))

    def meet_in_warps(self, lanes: Array, step: int) -> None:
        """Whole warps, whose lanes wait for each other."""
        rows = self.known[lanes]
        rows[np.arange(len(lanes)), self.own[lanes]] = step
        best = rows.reshape(-1, 32, rows.shape[1]).max(axis=1)
        self.learn(lanes, np.repeat(best, 32, axis=0))

    def _update_readers(self, lanes: Array) -> None:
        threads = self.known[lanes, : self.threads]
        if self.threads % 32:
            threads = np.pad(threads, ((0, 0), (0, -self.threads % 32)), constant_values=OWN)
        self.known_of_readers[lanes] = threads.reshape(len(lanes), self.num_warps, 32).min(axis=2)
