"""What the project prints: a rank-aware logger and a progress line with rate and time left.

Everything goes to standard error, so that a tool's result on standard output can
be piped. It does not own Megatron's own prints.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TextIO


class _StandardErrorHandler(logging.Handler):
    """Writes to what standard error is at that moment, also where it was replaced since."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # a stream that is closed or full ends no run: logging's own handlers do likewise
            self.handleError(record)


def get_logger(name: str) -> logging.Logger:
    """Return the logger `name`: INFO on rank 0, WARNING on other ranks (`RANK` of torchrun or Slurm)."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
        handler = _StandardErrorHandler()
        prefix = "" if rank == 0 else f"[rank {rank}] "
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        logger.propagate = False
    return logger


def format_seconds(seconds: float) -> str:
    """Write a duration for people: `9.3 s`, `4 min 05 s`, `3 h 12 min`.

    >>> format_seconds(245)
    '4 min 05 s'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


class Progress:
    """A progress line: amount done, rate and time left.

    On a terminal one line is rewritten; elsewhere (a log file, Slurm) a new line is
    printed at most every `log_every_s` seconds.

    Args:
        label: what is being done, e.g. "tokenise".
        total: the amount that means finished, or None where it is not known.
        unit: name of the amount, e.g. "docs" or "MB".
        stream: where to write; standard error by default.
    """

    def __init__(
        self, label: str, total: float | None, unit: str, *, stream: TextIO | None = None, log_every_s: float = 5.0
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._stream = sys.stderr if stream is None else stream
        self._is_tty = self._stream.isatty()
        self._every_s = 0.2 if self._is_tty else log_every_s
        self._start = self._last = time.monotonic()
        self.done = 0.0

    def update(self, amount: float) -> None:
        """Add `amount` to what is done and print, if it is time to."""
        self.done += amount
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            self._write(self.line(now - self._start), end="" if self._is_tty else "\n")

    def line(self, elapsed_s: float) -> str:
        """The text of the line after `elapsed_s` seconds."""
        rate = self.done / max(elapsed_s, 1e-9)
        if self.total is None:
            return f"{self.label}: {self.done:,.0f} {self.unit} ({rate:,.1f} {self.unit}/s)"
        left = max(self.total - self.done, 0.0) / max(rate, 1e-9)
        share = 100.0 * self.done / max(self.total, 1e-9)
        return (
            f"{self.label}: {self.done:,.0f}/{self.total:,.0f} {self.unit} {share:5.1f} % "
            f"({rate:,.1f} {self.unit}/s, {format_seconds(left)} left)"
        )

    def close(self) -> None:
        """Print the final amount, the mean rate and the time taken."""
        elapsed = time.monotonic() - self._start
        rate = self.done / max(elapsed, 1e-9)
        text = f"{self.label}: {self.done:,.0f} {self.unit} in {format_seconds(elapsed)} ({rate:,.1f} {self.unit}/s)"
        self._write(text, end="\n")

    def _write(self, text: str, *, end: str) -> None:
        print(f"\r\x1b[K{text}" if self._is_tty else text, end=end, file=self._stream, flush=True)
