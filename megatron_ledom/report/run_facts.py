"""Everything a page says of a run, read from its directory; nothing here starts Megatron or writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.errors import InputError
from megatron_ledom.report.goodput import Goodput, measure_goodput, read_launches, steps_made_again
from megatron_ledom.train import events
from megatron_ledom.train.events import Event, read_events, read_lines
from megatron_ledom.train.metrics import TRAIN_LOSS, read_curves, read_metrics
from megatron_ledom.train.run_directory import read_run

Curve = dict[int, float]
LEDGER = "bad_numbers.jsonl"
"""In the run directory: why steps were not taken; one object a line with `step`, `action`, `cause` and `to`."""


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        folder: the run directory.
        launches: the entries of run.json, one a launch.
        curves: TensorBoard's tag -> iteration -> value; a later launch wins.
        lines: of metrics.jsonl whose steps count, by step.
        events: of events.jsonl, in order.
        goodput: None for a run from before launches were written down.
    """

    folder: Path
    launches: list[dict[str, Any]]
    curves: dict[str, Curve]
    lines: list[dict[str, Any]]
    events: list[Event]
    goodput: Goodput | None

    @property
    def direction(self) -> str:
        """The model's."""
        return str(self.launches[-1]["direction"])

    @property
    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments of the last launch."""
        return dict(self.launches[-1]["megatron_arguments"])

    @property
    def last_step(self) -> int:
        """The last step that is known of; 0 before the first."""
        steps = [max(self.curves.get(TRAIN_LOSS, {0: 0.0})), *(line["step"] for line in self.lines)]
        return max(steps + [e.step for e in self.events])

    @property
    def has_ended(self) -> bool:
        """Whether all steps were made."""
        return self.last_step >= int(self.arguments.get("train_iters") or 0)

    @property
    def killed_before(self) -> list[Event]:
        """The resumes whose launch before wrote no end, as one that was killed cannot."""
        found, is_open = [], False
        for event in self.events:
            if event.kind == events.RESUME and is_open:
                found.append(event)
            if event.kind in {events.LAUNCH, events.RESUME}:
                is_open = True
            elif event.kind in {events.END, events.FAILED}:
                is_open = False
        return found

    def metric(self, name: str) -> Curve:
        """A column of metrics.jsonl by step, where it has a value."""
        return {line["step"]: float(line[name]) for line in self.lines if line.get(name) is not None}

    def curve(self, tag: str) -> Curve:
        """A curve of TensorBoard; {} where there is none."""
        return self.curves.get(tag, {})


def read_facts(folder: Path) -> RunFacts:
    """Read a run directory.

    Raises:
        InputError: it is none, or its run.json is damaged or names no launch.
    """
    launches = list(read_run(folder).get("launches", []))
    if not launches:
        raise InputError(f"{folder}/run.json names no launch: nothing was started there")
    found, run_events = read_metrics(folder), explained(read_events(folder), read_lines(folder / LEDGER))
    is_lost = steps_made_again(found, read_launches(run_events))
    by_step = {line["step"]: line for line, lost in zip(found, is_lost, strict=True) if not lost}
    lines = [by_step[step] for step in sorted(by_step)]
    return RunFacts(folder, launches, read_curves(folder), lines, run_events, measure_goodput(found, run_events))


def explained(run_events: Sequence[Event], ledger: Sequence[dict[str, Any]]) -> list[Event]:
    """The events, with the causes that the ledger of bad numbers gives for steps that were skipped or rolled back."""
    entries = {entry["step"]: entry for entry in ledger if {"step", "action", "cause"} <= set(entry)}
    found = []
    for event in run_events:
        entry = entries.get(event.step) if event.kind == events.SKIPPED else None
        if entry is not None:
            is_rollback = entry["action"] == events.ROLLBACK
            text = f"{entry['cause']}; {'back to step ' + str(entry.get('to')) if is_rollback else entry['action']}"
            kind = events.ROLLBACK if is_rollback else events.SKIPPED
            event = Event(event.time, event.step, kind, text, event.fields | entry)
        found.append(event)
    return found


SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length", "padded_vocab_size")


def find_twin(run: RunFacts) -> RunFacts | None:
    """The one run in the same folder of the other direction and the same shape; None where there is none or several."""
    found = []
    for path in sorted(run.folder.absolute().parent.iterdir()):
        if path == run.folder.absolute() or not (path / "run.json").is_file():
            continue
        try:
            last = json.loads((path / "run.json").read_text(encoding="utf-8"))["launches"][-1]
            is_twin = last["direction"] != run.direction and _shape(last["megatron_arguments"]) == _shape(run.arguments)
        except (KeyError, IndexError, TypeError, json.JSONDecodeError):  # another program's run.json
            continue
        if is_twin:
            found.append(path)
    if len(found) != 1:
        return None
    return read_facts(run.folder.parent / found[0].name if run.folder.name else found[0])  # as the run was named


def _shape(arguments: dict[str, Any]) -> list[Any]:
    return [arguments.get(name) for name in SHAPE]


def changed_arguments(launches: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The arguments that differ among launches: name, and the value of each launch."""
    tables = [launch["megatron_arguments"] for launch in launches]
    names = sorted(set().union(*tables))
    ignored = {"rank", "local_rank", "load", "iteration", "consumed_train_samples", "consumed_valid_samples"}
    rows = [(name, [table.get(name) for table in tables]) for name in names if name not in ignored]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]
