"""The time that a verification may take."""

from __future__ import annotations

import time


class Clock:
    """Counts from its making.

    Args:
        limit_s: after this nothing new is begun.
    """

    def __init__(self, limit_s: float) -> None:
        self._started, self.limit_s = time.monotonic(), limit_s

    @property
    def elapsed_s(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._started

    @property
    def is_over(self) -> bool:
        """Whether the limit is reached."""
        return self.elapsed_s >= self.limit_s
