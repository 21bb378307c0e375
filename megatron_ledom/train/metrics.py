"""Numbers of a run, read back: curves from its TensorBoard files, lines from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ledom.errors import InputError
from megatron_ledom.train.events import read_lines

TRAIN_LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"
METRICS_FILE = "metrics.jsonl"
"""In the run directory: a line every --log-interval steps; `train.watch` says what is in it."""


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
    curves = read_curves(run)
    if tag not in curves:
        num_files = len(event_files(run))
        found = ", ".join(sorted(curves)[:20]) or f"none ({num_files} event files)"
        raise InputError(f"{run}/tensorboard has no curve {tag!r}; found: {found}")
    return curves[tag]


def event_files(run: Path) -> list[Path]:
    """TensorBoard's files of a run; names carry the start time, so later launches come later."""
    return sorted((run / "tensorboard").glob("events.out.tfevents.*"))


def read_curves(run: Path) -> dict[str, dict[int, float]]:
    """Read every curve from RUN/tensorboard as `read_scalars` does one: tag -> iteration -> value; {} without files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    curves: dict[str, dict[int, float]] = {}
    for file in event_files(run):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                number = make_ndarray(value.tensor)
                if number.size == 1 and number.dtype.kind in "fiu":  # not the text that Megatron logs as well
                    curves.setdefault(value.tag, {})[event.step] = float(number)
    return {tag: dict(sorted(curve.items())) for tag, curve in curves.items()}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read RUN/metrics.jsonl in the order of writing: a resumed run may repeat steps; [] where there is none."""
    return [line for line in read_lines(run / METRICS_FILE) if isinstance(line.get("step"), int)]
