"""tools/evaluate_loss.py as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from random_models import save_random_model

from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
from megatron_ledom.direction import Direction
from megatron_ledom.testing import english_documents, run_tool, write_jsonl


@pytest.fixture(scope="module")
def models(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save_random_model(root / name, tokenizer_folder, name) for name in ("reverse", "forward")]


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("heldout") / "heldout.jsonl", [d[:900] for d in english_documents()[:4]])


def test_prints_and_writes_the_table(models: list[Path], heldout: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    config = PreprocessConfig(
        inputs=[write_jsonl(tmp_path / "train.jsonl", english_documents()[10:14])],
        output_prefix=str(tmp_path / "train"),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tokenizer_folder),
        direction=Direction.REVERSE,
        append_eod=True,
    )
    preprocess(config)
    data = ["--input", heldout, "--train-data", tmp_path / "train_text_document"]
    output = ["--output", tmp_path / "table.json"]
    result = run_tool("evaluate_loss.py", "--models", *models, *data, *output, "--context", 128, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    reverse, forward = table["models"]
    assert (reverse["direction"], forward["direction"]) == ("reverse", "forward")
    assert reverse["num_tokens"] == forward["num_tokens"] == table["unigram"]["num_tokens"]
    assert (table["context_tokens"], table["stride_tokens"], table["num_documents"]) == (128, 64, 4)
    header, _, first, second = result.stdout.splitlines()
    assert [c.strip() for c in header.split("|")[1:-1]][:4] == ["model", "direction", "tokens", "loss/token"]
    for line, row in ((first, reverse), (second, forward)):
        cells = [c.strip() for c in line.split("|")[1:-1]]
        assert cells[1:4] == [row["direction"], f"{row['num_tokens']:,}", f"{row['loss_per_token']:.4f}"]
        assert cells[5] == f"{table['unigram']['loss_per_token']:.4f}"
    assert "evaluate reverse: 4 docs in" in result.stderr
    again = run_tool("evaluate_loss.py", "--models", *models, *data, *output)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "absent"], "model folder absent: there is no such folder"),
        (["--input", "absent.jsonl"], "absent.jsonl"),
        (["--json-key", "body"], "body"),
        (["--train-data", "absent"], "absent.manifest.json"),
        (["--context", "4096"], "--context is 4096, it must be 1 or at most 256"),
    ],
)
def test_bad_input_is_refused(models: list[Path], heldout: Path, flags: list[str], message: str) -> None:
    result = run_tool("evaluate_loss.py", "--models", *models, "--input", heldout, *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_help_says_what_stands_beside() -> None:
    result = run_tool("evaluate_loss.py", "--help")
    assert result.returncode == 0
    assert "unigram model of the training tokens" in result.stdout
