"""RUN/events.jsonl: what happened to a run beside its steps, one JSON object a line.

    {"time": 1795693000.2, "step": 120, "kind": "evaluation", "text": "loss 3.301", "fields": {"loss": 3.301}}

`time` is in seconds since 1970, `step` the last finished iteration, `kind` one of the words below, `text` for people
and `fields` for programs. A line is written at once and whole; what a killed process left half is passed over by the
reader. Any part of a run may write here (`record_event`); kinds that a reader does not know are shown as they are.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_NAME = "events.jsonl"

LAUNCH, RESUME, BEGIN, END, FAILED = "launch", "resume", "begin", "end", "failed"
EVALUATION, SAVE, SKIPPED, ROLLBACK = "evaluation", "save", "skipped step", "rollback"
SHADOW, BREACH, SWITCH = "shadow", "shadow breach", "precision switch"
KINDS: dict[str, str] = {
    LAUNCH: "the run was started",
    RESUME: "the run was started again and went on from a checkpoint",
    BEGIN: "model and data were ready, the first step came next",
    END: "the run, or this launch of it, ended as it was meant to",
    FAILED: "this launch ended with an error",
    EVALUATION: "a validation loss was computed",
    SAVE: "a checkpoint was saved",
    SKIPPED: "a step changed no weights",
    ROLLBACK: "the run went back to a checkpoint",
    SHADOW: "FP8 was compared with BF16",
    BREACH: "FP8 was farther from BF16 than allowed",
    SWITCH: "the run went on in BF16",
}


@dataclass(frozen=True, eq=False)
class Event:
    """One line of the file; see the module."""

    time: float
    step: int
    kind: str
    text: str
    fields: dict[str, Any] = field(default_factory=dict)


def record_event(run: Path, kind: str, step: int, text: str, fields: dict[str, Any] | None = None) -> None:
    """Append an event to RUN/events.jsonl; call on one rank.

    Args:
        run: the run directory, which exists.
        kind: preferably one of `KINDS`.
        step: the last finished iteration.
        text: one line for people.
        fields: numbers and words for programs; what JSON cannot hold becomes text, NaN and infinities null.
    """
    record = {"time": round(time.time(), 3), "step": step, "kind": kind, "text": text, "fields": fields or {}}
    append_line(run / FILE_NAME, record)


def read_events(run: Path) -> list[Event]:
    """Read RUN/events.jsonl in the order of writing; [] where there is none."""
    return [
        Event(float(r["time"]), int(r["step"]), str(r["kind"]), str(r["text"]), dict(r.get("fields", {})))
        for r in read_lines(run / FILE_NAME)
        if {"time", "step", "kind", "text"} <= set(r)
    ]


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as a line, in one write."""
    line = json.dumps(_finite(record), default=str, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line; lines that are no whole object are passed over. [] without a file."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a process was killed while it wrote
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _finite(value: Any) -> Any:
    """The value with null in place of what JSON has no number for."""
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
