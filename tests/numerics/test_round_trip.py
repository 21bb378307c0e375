"""Hugging Face -> Megatron -> Hugging Face gives every bit back, also with Megatron itself in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import save_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ledom.convert.from_hf import ImportOptions, import_folder
from megatron_ledom.convert.hf import ExportOptions, export_checkpoint
from megatron_ledom.direction import Direction
from megatron_ledom.testing import run_distributed, run_tool

PRIME = 1031
"""Rows of the tables: more than the tokenizer's 1,024 ids, and divisible by no layout."""
BASE: dict[str, Any] = {
    "vocab_size": PRIME,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
    "bos_token_id": 7,
    "eos_token_id": 0,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "factor": 16.0}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 20},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    "rope llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}},
    "bfloat16": {"dtype": "bfloat16"},
    "several ends": {"eos_token_id": [0, 5], "bos_token_id": None},
}
ONE_SIDED = {
    *("ledom", "torch_dtype", "rope_theta", "rope_scaling"),
    *("transformers_version", "pad_token_id", "pretraining_tp"),
}
"""What an export writes for other readers, and transformers' fields without influence on a Llama."""


def make_folder(folder: Path, tokenizer_folder: Path, **changes: Any) -> Path:
    config = LlamaConfig(**(BASE | changes))
    save_model(LlamaForCausalLM, config, folder, tokenizer_folder, "reverse", seed=len(changes))
    if config.dtype == torch.bfloat16:
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
        add_record(folder)
    return folder


def add_record(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ledom": {"format_version": 1, "direction": "reverse"}}))


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def check_equal(found: Path, expected: Path) -> None:
    ours, theirs = load_all(found), load_all(expected)
    assert set(ours) == set(theirs)
    assert [key for key in theirs if ours[key].dtype != theirs[key].dtype or not ours[key].equal(theirs[key])] == []


@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_comes_back(shape: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    original = make_folder(tmp_path / "hf", tokenizer_folder, **SHAPES[shape])
    imported = import_folder(original, tmp_path / "megatron", options=ImportOptions(parity=False))
    export_checkpoint(imported.folder, tmp_path / "back", options=ExportOptions(parity=False, max_shard_bytes=50_000))
    check_equal(tmp_path / "back", original)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "back"))
    assert {k: v for k, v in after.items() if k not in ONE_SIDED} == {
        k: v for k, v in before.items() if k not in ONE_SIDED
    }
    assert after["ledom"]["direction"] == "reverse"


def test_shards_and_older_configurations_are_read(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Many small files, `rope_theta` and `rope_scaling` as transformers 4 wrote them, no record."""
    original = make_folder(tmp_path / "hf", tokenizer_folder, **SHAPES["rope linear"])
    older = tmp_path / "older"
    LlamaForCausalLM.from_pretrained(original).save_pretrained(older, max_shard_size="40KB")
    config = json.loads((older / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "linear", "factor": 4.0}}
    (older / "config.json").write_text(json.dumps(config))
    assert len(list(older.glob("*.safetensors"))) > 5
    options = ImportOptions(direction=Direction.REVERSE, parity=False)
    for folder in (original, older):
        import_folder(folder, tmp_path / f"{folder.name}-megatron", options=options)
    files = [tmp_path / f"{name}-megatron" / "release" / "__0_0.distcp" for name in ("hf", "older")]
    stored = [path.stat().st_size for path in files]
    assert abs(stored[0] - stored[1]) < 5_000  # the older folder brought no tokenizer
    export = ExportOptions(parity=False, tokenizer=tokenizer_folder)
    export_checkpoint(tmp_path / "older-megatron", tmp_path / "back", options=export)
    check_equal(tmp_path / "back", original)


@pytest.mark.distributed
def test_megatron_itself_keeps_every_bit_at_tp2_pp2(
    tmp_path: Path, tokenizer_folder: Path, prefixes: dict[str, Path]
) -> None:
    """Loaded by Megatron on four ranks, trained one step at a rate of zero, saved by Megatron, exported."""
    original = make_folder(tmp_path / "hf", tokenizer_folder)
    imported = run_tool("convert_from_hf.py", "--load", original, "--save", tmp_path / "megatron")
    assert imported.returncode == 0, imported.stderr
    assert "reverse model, 173,136 parameters in float32" in imported.stdout
    assert "parity: " in imported.stdout
    trained = run_distributed(
        "pretrain.py",
        4,
        *("--device", "cpu", "--pretrained-checkpoint", tmp_path / "megatron", "--use-checkpoint-args"),
        *("--run-dir", tmp_path / "run", "--data-path", prefixes["reverse"], "--seq-length", 64),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "megatron" / "tokenizer"),
        *("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
        *("--micro-batch-size", 1, "--global-batch-size", 2, "--train-iters", 1, "--lr", 0, "--min-lr", 0),
        *("--eval-iters", 1, "--save-interval", 1, "--log-interval", 1, "--use-distributed-optimizer"),
    )
    assert trained.returncode == 0, f"{trained.stdout[-3000:]}\n{trained.stderr[-3000:]}"
    exported = run_tool("convert_to_hf.py", "--load", tmp_path / "run" / "checkpoints", "--output", tmp_path / "back")
    assert exported.returncode == 0, exported.stderr
    check_equal(tmp_path / "back", original)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["rms_norm_eps"]) == (PRIME, 7, 1e-6)
    assert config["ledom"]["iteration"] == 1
