"""What a run writes down and reads back: its record, its curves, its events, where its time went."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_ledom.errors import InputError
from megatron_ledom.report.goodput import measure_goodput
from megatron_ledom.report.run_facts import explained
from megatron_ledom.train.events import (
    BEGIN,
    END,
    EVALUATION,
    LAUNCH,
    RESUME,
    SAVE,
    SKIPPED,
    Event,
    read_events,
    record_event,
)
from megatron_ledom.train.metrics import TRAIN_LOSS, read_scalars
from megatron_ledom.train.run_directory import copy_tokenizer, read_run, tokenizer_files


def write_curve(run: Path, suffix: str, values: dict[int, float]) -> None:
    with SummaryWriter(str(run / "tensorboard"), filename_suffix=suffix) as writer:
        for step, value in values.items():
            writer.add_scalar(TRAIN_LOSS, value, step)


def test_a_later_launch_wins_where_both_logged(tmp_path: Path) -> None:
    write_curve(tmp_path, ".0", {1: 9.0, 2: 8.0, 3: 7.0})
    write_curve(tmp_path, ".1", {3: 6.5, 4: 6.0})
    assert read_scalars(tmp_path, TRAIN_LOSS) == {1: 9.0, 2: 8.0, 3: 6.5, 4: 6.0}


def test_a_missing_curve_is_refused_with_those_there_are(tmp_path: Path) -> None:
    write_curve(tmp_path, "", {1: 9.0})
    with pytest.raises(InputError, match="no curve 'lm losses'; found: lm loss"):
        read_scalars(tmp_path, "lm losses")
    with pytest.raises(InputError, match="0 event files"):
        read_scalars(tmp_path / "nowhere", TRAIN_LOSS)


def test_events_are_read_as_written_and_half_a_line_is_passed_over(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    record_event(tmp_path, SKIPPED, 7, "a NaN in the gradient", {"loss": float("nan"), "path": tmp_path, "n": [1, 2]})
    record_event(tmp_path, "something new", 8, "")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('["no object"]\n{"time": 1.0, "step": 9, "ki')
    first, second = read_events(tmp_path)
    assert (first.kind, first.step, first.text) == (SKIPPED, 7, "a NaN in the gradient")
    assert first.fields == {"loss": None, "path": str(tmp_path), "n": [1, 2]}
    assert (second.kind, second.step, second.fields) == ("something new", 8, {})
    assert 0 <= second.time - first.time < 60


def event(time: float, kind: str, step: int, **fields: object) -> Event:
    return Event(time, step, kind, "", fields)


def test_the_ledger_of_bad_numbers_explains_what_was_skipped() -> None:
    found = explained(
        [event(1, SKIPPED, 3), event(2, SAVE, 4), event(3, SKIPPED, 4), event(4, SKIPPED, 5)],
        [
            {"step": 3, "action": "skip", "cause": "the loss not finite on rank 1", "to": None},
            {"step": 4, "action": "rollback", "cause": "the loss 9 is 7 deviations above 3", "to": 2},
            {"step": 5},
        ],
    )
    assert [(e.kind, e.step) for e in found] == [(SKIPPED, 3), (SAVE, 4), ("rollback", 4), (SKIPPED, 5)]
    assert found[0].text == "the loss not finite on rank 1; skip"
    assert found[2].text == "the loss 9 is 7 deviations above 3; back to step 2"
    assert found[3].text == ""


def line(time: float, step: int, step_s: float = 2.0) -> dict[str, object]:
    return {"time": time, "step": step, "step_s": step_s, "num_steps": 1}


def test_time_of_a_killed_and_resumed_run_is_divided() -> None:
    found = [
        *(event(105, LAUNCH, 0, started=100.0), event(110, BEGIN, 0, seconds=10)),
        *(event(115, EVALUATION, 2, seconds=1), event(118, SAVE, 2, seconds=3)),
        *(event(205, RESUME, 2, started=200.0), event(206, BEGIN, 2, seconds=6), event(220, END, 4)),
    ]
    lines = [line(112, 1), line(114, 2), line(120, 3), line(122, 4), line(208, 3), line(210, 4)]
    goodput = measure_goodput(lines, found)
    assert goodput is not None and goodput.total_s == 120
    assert goodput.seconds == {
        "steps that count": 8,
        "steps made again later": 4,
        "evaluation": 1,
        "saving": 3,
        "starting": 16,
        "idle or not logged": 88,
    }
    assert goodput.share == pytest.approx(8 / 120)
    assert measure_goodput(lines, []) is None


def test_a_damaged_or_later_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"launches": [\n')
    with pytest.raises(InputError, match=r"run\.json:2: not JSON"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(InputError, match="has format 99"):
        read_run(tmp_path)


def test_the_tokenizer_is_copied_once_and_without_weights(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tokenizer_folder / name).read_bytes())
    (source / "model.safetensors").write_bytes(b"weights")
    args = argparse.Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(source))
    copy_tokenizer(tokenizer_files(args), tmp_path / "tokenizer")
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    (source / "tokenizer.json").write_text("changed")
    copy_tokenizer(tokenizer_files(args), tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == (
        tokenizer_folder / "tokenizer.json"
    ).read_bytes()


def test_the_two_files_of_gpt2_get_the_names_that_a_folder_has(tmp_path: Path) -> None:
    for name in ("gpt2-vocab.json", "gpt2-merges.txt"):
        (tmp_path / name).write_text(name)
    named = {"vocab_file": str(tmp_path / "gpt2-vocab.json"), "merge_file": str(tmp_path / "gpt2-merges.txt")}
    args = argparse.Namespace(tokenizer_type="GPT2BPETokenizer", tokenizer_model=None, **named)
    copy_tokenizer(tokenizer_files(args), tmp_path / "tokenizer")
    found = {path.name: path.read_text() for path in (tmp_path / "tokenizer").iterdir()}
    assert found == {"vocab.json": "gpt2-vocab.json", "merges.txt": "gpt2-merges.txt"}
    nothing = argparse.Namespace(tokenizer_type="NullTokenizer", tokenizer_model=None)
    copy_tokenizer(tokenizer_files(nothing), tmp_path / "none")
    assert not (tmp_path / "none").exists()
