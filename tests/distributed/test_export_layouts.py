"""However Megatron laid the weights out when it saved them, the export is the folder that the run began from.

Imported, trained for two steps at a learning rate of zero, saved by Megatron, exported:
TP 2 x PP 2 is in `numerics/test_round_trip.py`, here are the layouts that cut or write otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from random_models import save_model
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.checkpoint.diff import diff_tensors
from megatron_ledom.convert.from_hf import ImportOptions, import_folder
from megatron_ledom.convert.hf import ExportOptions, export_checkpoint
from megatron_ledom.convert.hf_weights import HfWeights
from megatron_ledom.convert.inspection import HfSource
from megatron_ledom.testing import run_distributed

pytestmark = pytest.mark.distributed

NUM_ROWS = 1031
"""Of the tables: more than the tokenizer's ids, and divisible by no layout."""
STACK = "decoder.layers.mlp.linear_fc2.weight"
PIPELINE = ("--pipeline-model-parallel-size", 2)


def imported_model(folder: Path, tokenizer_folder: Path, *, tied: bool) -> tuple[Path, Path]:
    """A Llama of four layers as a Hugging Face folder, and the checkpoint made of it."""
    config = LlamaConfig(
        vocab_size=NUM_ROWS,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=0,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    original = save_model(LlamaForCausalLM, config, folder / "hf", tokenizer_folder, "reverse")
    import_folder(original, folder / "megatron", options=ImportOptions(parity=False))
    return original, folder / "megatron"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[Path, Path]:
    return imported_model(tmp_path_factory.mktemp("untied"), tokenizer_folder, tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[Path, Path]:
    return imported_model(tmp_path_factory.mktemp("tied"), tokenizer_folder, tied=True)


def train_and_check(model: tuple[Path, Path], data: Path, folder: Path, *layout: object) -> Checkpoint:
    """Train at a layout of two ranks, export, compare with the original folder; return what Megatron saved."""
    original, checkpoint = model
    done = run_distributed(
        "pretrain.py",
        2,
        *("--device", "cpu", "--pretrained-checkpoint", checkpoint, "--use-checkpoint-args"),
        *("--run-dir", folder / "run", "--data-path", data, "--seq-length", 64),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", checkpoint / "tokenizer"),
        *("--micro-batch-size", 1, "--global-batch-size", 2, "--train-iters", 2, "--lr", 0, "--min-lr", 0),
        *("--eval-iters", 0, "--save-interval", 2, "--log-interval", 1, *layout),
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    saved = Checkpoint.open(folder / "run" / "checkpoints")
    assert saved.iteration == 2
    export_checkpoint(saved.folder, folder / "back", options=ExportOptions(parity=False))
    found = diff_tensors(*(HfSource(HfWeights.open(each)) for each in (original, folder / "back")))
    assert found.is_equal, found
    assert len(found.values) == 4 * 9 + (3 if saved.args.untie_embeddings_and_output_weights else 2)
    return saved


def writers(saved: Checkpoint, name: str) -> list[tuple[tuple[int, ...], str]]:
    """Where each chunk of a tensor begins, and the rank that wrote it, in order."""
    chunks: Any = saved.tensors[name].chunks
    return sorted((chunk.offsets, chunk.stored.file_name.split("_")[2]) for chunk in chunks)


def test_virtual_pipeline_stages(untied: tuple[Path, Path], prefixes: dict[str, Path], tmp_path: Path) -> None:
    """Each rank holds every other layer."""
    layout = (*PIPELINE, "--num-virtual-stages-per-pipeline-rank", 2)
    saved = train_and_check(untied, prefixes["reverse"], tmp_path, *layout)
    assert saved.args.virtual_pipeline_model_parallel_size == 2
    assert writers(saved, STACK) == [((layer, 0, 0), str(layer % 2)) for layer in range(4)]


def test_data_parallel_without_parallel_save(
    untied: tuple[Path, Path], prefixes: dict[str, Path], tmp_path: Path
) -> None:
    """One rank writes all weights; the optimizer's shards keep their ranks' form and are not taken for weights."""
    layout = ("--no-ckpt-fully-parallel-save", "--use-distributed-optimizer")
    saved = train_and_check(untied, prefixes["reverse"], tmp_path, *layout)
    assert (saved.args.data_parallel_size, saved.args.ckpt_fully_parallel_save) == (2, False)
    weights = [name for name in saved.tensor_names() if not name.startswith(("optimizer.", "chained_"))]
    assert {rank for name in weights for _, rank in writers(saved, name)} == {"0"}
    assert len(weights) == 9 < len(saved.tensor_names())


def test_tied_embeddings_on_two_stages(tied: tuple[Path, Path], prefixes: dict[str, Path], tmp_path: Path) -> None:
    """The table is on both stages and in the checkpoint once."""
    saved = train_and_check(tied, prefixes["reverse"], tmp_path, *PIPELINE)
    assert saved.args.pipeline_model_parallel_size == 2 and not saved.args.untie_embeddings_and_output_weights
    assert "output_layer.weight" not in saved.tensors
    assert writers(saved, "embedding.word_embeddings.weight") == [((0, 0), "0")]
    assert [rank for _, rank in writers(saved, STACK)] == ["0", "0", "1", "1"]
