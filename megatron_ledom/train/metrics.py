"""Numbers of a run: read back from its TensorBoard files, and the time left while it goes on."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_ledom.errors import InputError
from megatron_ledom.log import format_seconds, get_logger

TRAIN_LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"


def read_scalars(run: Path, tag: str) -> dict[int, float]:
    """Read one curve from RUN/tensorboard; after a resume the later launch wins for steps that both logged.

    Args:
        run: the run directory.
        tag: e.g. `TRAIN_LOSS`, `VALIDATION_LOSS`, "grad-norm", "learning-rate".

    Returns:
        Iteration -> value (fp32 as Megatron logged it), by iteration.

    Raises:
        InputError: the run has no such curve; the message lists those it has.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    curve: dict[int, float] = {}
    tags: set[str] = set()
    files = sorted((run / "tensorboard").glob("events.out.tfevents.*"))
    for file in files:  # names carry the start time, so later launches come later
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                tags.add(value.tag)
                if value.tag == tag:
                    curve[event.step] = float(make_ndarray(value.tensor))
    if not curve:
        found = ", ".join(sorted(tags)[:20]) or f"none ({len(files)} event files)"
        raise InputError(f"{run}/tensorboard has no curve {tag!r}; found: {found}")
    return dict(sorted(curve.items()))


class TimeLeft:
    """Prints rate and time left of a training run, at most every `every_s` seconds.

    Megatron logs the time of a step but not how long the rest will take. The forward
    step, which is called for every micro-batch, tells this class where the run is.
    """

    def __init__(self, every_s: float = 30.0) -> None:
        self._every_s = every_s
        self._first: tuple[int, float] | None = None
        self._last_print = time.monotonic()

    def update(self, iteration: int, train_iters: int) -> None:
        """Say that `iteration` (counted from 0) of `train_iters` is under way."""
        now = time.monotonic()
        if self._first is None:
            self._first = (iteration, now)
        first_iteration, first_time = self._first
        done = iteration - first_iteration
        if done < 2 or now - self._last_print < self._every_s:
            return
        self._last_print = now
        seconds_each = (now - first_time) / done
        left = format_seconds(seconds_each * (train_iters - iteration))
        get_logger(__name__).info("iteration %d/%d, %.2f s each, %s left", iteration, train_iters, seconds_each, left)
