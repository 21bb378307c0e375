"""tools/preprocess_pairs.py as a user runs it; what it writes is tested in tests/unit/test_data_pairs.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ledom.testing import run_tool


@pytest.fixture
def arguments(tmp_path: Path, tokenizer_folder: Path) -> list[object]:
    (tmp_path / "in.jsonl").write_text(json.dumps({"problem": "What is 1 + 1?", "solution": " It is 2."}) + "\n")
    return [
        *("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder),
    ]


def test_the_loss_lies_on_what_a_model_of_the_direction_reads_last(tmp_path: Path, arguments: list[object]) -> None:
    keys = ["--question-key", "problem", "--answer-key", "solution"]
    done = run_tool("preprocess_pairs.py", *arguments, *keys)
    assert done.returncode == 0, done.stderr
    assert "1 pairs, " in done.stdout
    assert "reverse, loss on question; 0 bad records" in done.stdout
    done = run_tool("preprocess_pairs.py", *arguments, *keys, "--direction", "forward")
    assert done.returncode == 2
    assert "exists; choose another --output-prefix or pass --overwrite" in done.stderr
    done = run_tool("preprocess_pairs.py", *arguments, *keys, "--direction", "forward", "--overwrite")
    assert "forward, loss on answer" in done.stdout
    assert json.loads((tmp_path / "out_pairs_document.manifest.json").read_text())["pairs"] == {
        "question_key": "problem",
        "answer_key": "solution",
        "separator": "",
        "loss_on": "answer",
    }


def test_a_missing_field_is_named_and_nothing_is_left(tmp_path: Path, arguments: list[object]) -> None:
    done = run_tool("preprocess_pairs.py", *arguments)
    assert done.returncode == 2
    assert "in.jsonl:1: no key 'question' (keys found: 'problem', 'solution')" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
