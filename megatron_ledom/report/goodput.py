"""Where the time of a run went, from its metrics and events: goodput is the share that became steps which still count.

    |start|--steps--|eval|--steps--|save|--steps that a resume made again--| nothing ran |start|--steps--|

Every second from the first launch to the last sign of life is in one class. What no line accounts for, such as the
steps between the last log line and a kill, or the time between two launches, is "idle or not logged".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ledom.train import events
from megatron_ledom.train.events import Event

STEPS, AGAIN, EVALUATION, SAVING, START, OTHER = (
    *("steps that count", "steps made again later", "evaluation", "saving", "starting"),
    "idle or not logged",
)
CLASSES = (STEPS, EVALUATION, SAVING, START, AGAIN, OTHER)


@dataclass(frozen=True)
class Goodput:
    """Seconds by class, in the order of `CLASSES`; they add up to `total_s`."""

    seconds: dict[str, float]
    total_s: float

    @property
    def share(self) -> float:
        """The share of all time that became steps which count, from 0 to 1."""
        return self.seconds[STEPS] / self.total_s if self.total_s > 0 else 0.0


@dataclass(frozen=True)
class Launch:
    """One start of the run.

    Attributes:
        started: when its process began, in seconds since 1970.
        from_step: the step of the checkpoint that it went on from.
        event: the line that says so.
    """

    started: float
    from_step: int
    event: Event


def read_launches(run_events: Sequence[Event]) -> list[Launch]:
    """The launches among the events, in order."""
    return [
        Launch(float(e.fields.get("started") or e.time), e.step, e)
        for e in run_events
        if e.kind in {events.LAUNCH, events.RESUME}
    ]


def steps_made_again(lines: Sequence[dict[str, Any]], launches: Sequence[Launch]) -> list[bool]:
    """For every line of metrics.jsonl, whether a later launch began before its step, so that its work was lost."""
    return [
        any(line["time"] < launch.event.time and line["step"] > launch.from_step for launch in launches)
        for line in lines
    ]


def measure_goodput(lines: Sequence[dict[str, Any]], run_events: Sequence[Event]) -> Goodput | None:
    """Divide the time of a run.

    Args:
        lines: of metrics.jsonl, in the order of writing.
        run_events: of events.jsonl, likewise.

    Returns:
        None for a run without launches, from before they were written down.
    """
    launches = read_launches(run_events)
    if not launches:
        return None
    times = [e.time for e in run_events] + [line["time"] for line in lines]
    total = max(times) - launches[0].started
    seconds = dict.fromkeys(CLASSES, 0.0)
    for line, is_lost in zip(lines, steps_made_again(lines, launches), strict=True):
        seconds[AGAIN if is_lost else STEPS] += line["step_s"] * line["num_steps"]
    kinds = {events.EVALUATION: EVALUATION, events.SAVE: SAVING, events.BEGIN: START}
    for event in run_events:
        if event.kind in kinds:
            seconds[kinds[event.kind]] += float(event.fields.get("seconds") or 0.0)
    seconds[OTHER] = max(0.0, total - sum(seconds.values()))
    return Goodput(seconds, total)
