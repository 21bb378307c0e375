"""The same weights in transformers' LlamaForCausalLM and in Megatron's GPTModel: loss, every gradient, logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import CASES, ITERATION, VOCAB_SIZE, run_this
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.convert.hf import ExportOptions, export_checkpoint
from megatron_ledom.convert.parity import check_parity
from megatron_ledom.errors import ParityError

TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def exports(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, exported; the comparison is this file's business."""
    folder = tmp_path_factory.mktemp("exports")
    for name in CASES:
        export_checkpoint(cases / name, folder / name, options=ExportOptions(parity=False, max_shard_bytes=100_000))
    return folder


@pytest.fixture(scope="session")
def comparison(cases: Path, exports: Path) -> dict[str, Any]:
    return json.loads(run_this("gradients", cases, exports).splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_agree_in_fp32(comparison: dict[str, Any], name: str) -> None:
    report = comparison[name]
    assert report["loss"] == pytest.approx(report["hf_loss"], rel=TOLERANCE)
    assert len(report["gradients"]) == 2 * 9 + (2 if name == "tied" else 3)
    assert {key: error for key, error in report["gradients"].items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_every_parameter_and_nothing_else(exports: Path, name: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(exports / name, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == VOCAB_SIZE
    assert model.dtype == (torch.bfloat16 if name == "bfloat16" else torch.float32)


def test_layouts_of_the_same_weights_give_the_same_files(exports: Path) -> None:
    """Layers stacked under one key, or each under its own: the same model, apart from the padding of the vocabulary."""
    stacked, single = (load_all(exports / name) for name in ("gqa_padded", "one_key_a_layer"))
    assert set(stacked) == set(single)
    assert all(stacked[key].shape == single[key].shape for key in stacked)


def test_weights_are_those_of_the_checkpoint(cases: Path, exports: Path) -> None:
    checkpoint, found = Checkpoint.open(cases / "gqa_padded"), load_all(exports / "gqa_padded")
    table = checkpoint.read("embedding.word_embeddings.weight")
    assert table.shape[0] == 1152
    assert torch.equal(found["model.embed_tokens.weight"], table[:VOCAB_SIZE])
    fc1 = checkpoint.read("decoder.layers.mlp.linear_fc1.weight")
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], fc1[1, 80:])
    norm = checkpoint.read_slice("decoder.layers.mlp.linear_fc1.layer_norm_weight", 0)
    assert torch.equal(found["model.layers.0.post_attention_layernorm.weight"], norm)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def test_parity_of_a_rounded_export_passes(cases: Path, tmp_path: Path) -> None:
    """fp32 weights written as bfloat16: Megatron's are rounded the same way before the comparison."""
    options = ExportOptions(dtype="bfloat16")
    result = export_checkpoint(cases / "gqa_padded", tmp_path / "hf", options=options)
    assert result.parity is not None and result.parity["passed"]
    assert result.parity["max_relative_difference"] <= TOLERANCE
    assert 0 < result.parity["mean_padding_probability"] < 1  # Megatron's softmax includes 128 rows that are cut off
    assert json.loads((tmp_path / "hf" / "parity.json").read_text()) == result.parity
    assert {t.dtype for t in load_all(tmp_path / "hf").values()} == {torch.bfloat16}


def change_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 10_500.0
    (folder / "config.json").write_text(json.dumps(config))


def test_parity_notices_a_small_mistake(cases: Path, exports: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports / "mqa", tmp_path / "hf"))
    change_rope(folder)
    with pytest.raises(ParityError, match=r"logits differ from Megatron's: .* of the largest logit"):
        check_parity(cases / "mqa" / f"iter_{ITERATION:07d}", folder)


def test_parity_that_cannot_be_computed_is_no_parity(cases: Path, exports: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports / "mqa", tmp_path / "hf"))
    (folder / "config.json").unlink()
    with pytest.raises(ParityError, match="could not be compared"):
        check_parity(cases / "mqa" / f"iter_{ITERATION:07d}", folder)
