"""What a run writes down and reads back: its record, its curves, its time left."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_ledom.errors import InputError
from megatron_ledom.log import get_logger
from megatron_ledom.train.metrics import TRAIN_LOSS, TimeLeft, read_scalars
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


def test_time_left_is_printed_from_the_pace_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 30.0, 60.0, 61.0])
    monkeypatch.setattr("megatron_ledom.train.metrics.time.monotonic", lambda: next(clock))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = get_logger("megatron_ledom.train.metrics")
    time_left = TimeLeft(every_s=30)
    logger.addHandler(handler)
    try:
        for iteration in (10, 20, 30, 31):
            time_left.update(iteration, 100)
    finally:
        logger.removeHandler(handler)
    assert lines == [
        "iteration 20/100, 3.00 s each, 4 min 00 s left",
        "iteration 30/100, 3.00 s each, 3 min 30 s left",
    ]


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
