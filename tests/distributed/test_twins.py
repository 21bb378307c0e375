"""A reverse model and its forward twin, from text to losses: both learn, on text that neither has seen."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_ledom.testing import english_documents, run_distributed, run_tool, write_jsonl

pytestmark = pytest.mark.distributed

MARGIN = 1.0
"""Nats per token by which a hundred steps of the tiny model must beat the unigram model; 1.4 was seen."""


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_both_twins_beat_a_unigram_model_on_held_out_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = english_documents()
    train = write_jsonl(tmp_path / "train.jsonl", [d for i, d in enumerate(documents) if i % 8])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", documents[::8])
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder]
    for direction in ("reverse", "forward"):
        prefix, run = tmp_path / direction, tmp_path / f"run-{direction}"
        data = ["--input", train, "--output-prefix", prefix, "--direction", direction, "--append-eod"]
        succeed(run_tool("preprocess_data.py", *data, *tokenizer))
        flags = [
            "--preset",
            "tiny",
            "--device",
            "cpu",
            "--direction",
            direction,
            "--run-dir",
            run,
            "--train-iters",
            100,
        ]
        succeed(run_distributed("pretrain.py", 2, *flags, "--data-path", f"{prefix}_text_document", *tokenizer))
        export = ["--load", run / "checkpoints", "--output", tmp_path / f"hf-{direction}"]
        succeed(run_tool("convert_to_hf.py", *export))

    print(
        succeed(
            run_tool(
                "evaluate_loss.py",
                *("--models", tmp_path / "hf-reverse", tmp_path / "hf-forward", "--input", held_out),
                *("--train-data", tmp_path / "reverse_text_document", "--output", tmp_path / "losses.json"),
            )
        )
    )
    record = json.loads((tmp_path / "losses.json").read_text())
    losses = {model["direction"]: model["loss_per_token"] for model in record["models"]}
    assert losses.keys() == {"reverse", "forward"}
    for direction, loss in losses.items():
        assert loss < record["unigram"]["loss_per_token"] - MARGIN, direction
    assert losses["reverse"] == pytest.approx(losses["forward"], abs=1.0), "twins of one size on the same tokens"
