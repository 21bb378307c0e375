"""Torch's reader, asked for boxes: equal to our own reader's, and a refusal for what is not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from convert_cases import ITERATION

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.checkpoint.torch_reader import TorchReader
from megatron_ledom.errors import CheckpointError

STACK = "decoder.layers.mlp.linear_fc2.weight"
TABLE = "embedding.word_embeddings.weight"


def test_boxes_are_those_of_our_own_reader(run: Path) -> None:
    """A run of TP 2 x PP 2: boxes that cut across chunks, into a target of another dtype too."""
    checkpoint = Checkpoint.open(run / "checkpoints")
    reader, shape = TorchReader(checkpoint), checkpoint.shape(STACK)
    box = torch.empty(1, shape[1] - 3, shape[2] - 30)
    reader.fill(box, STACK, shape, (3, 3, 30))
    assert torch.equal(box, checkpoint.read(STACK)[3:, 3:, 30:])
    rows = torch.empty(700, checkpoint.shape(TABLE)[1], dtype=torch.float64)
    reader.fill(rows, TABLE, checkpoint.shape(TABLE), (150, 0))
    assert torch.equal(rows, checkpoint.read(TABLE)[150:850].double())


def test_what_the_checkpoint_does_not_hold_is_refused(cases: Path) -> None:
    checkpoint = Checkpoint.open(cases / "gqa_padded")
    reader = TorchReader(checkpoint)
    with pytest.raises(CheckpointError, match=r"wants decoder\.layers\.other \[2, 3\], there is no such tensor"):
        reader.fill(torch.empty(2, 3), "decoder.layers.other", (2, 3), (0, 0))
    with pytest.raises(CheckpointError, match=r"wants .*linear_fc2\.weight \[3, 48, 80\], there is \[2, 48, 80\]"):
        reader.fill(torch.empty(1, 48, 80), STACK, (3, 48, 80), (0, 0, 0))
    with pytest.raises(CheckpointError, match=r"hold 0 of 3840 elements"):
        reader.fill(torch.empty(1, 48, 80), STACK, (2, 48, 80), (2, 0, 0))


def test_a_damaged_chunk_is_named(cases: Path, tmp_path: Path) -> None:
    save = Path(shutil.copytree(cases / "gqa_padded", tmp_path / "save"))
    data = save / f"iter_{ITERATION:07d}" / "__0_0.distcp"
    checkpoint = Checkpoint.open(save)
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight is damaged"):
        TorchReader(checkpoint).fill(torch.empty(1, 48, 80), STACK, (2, 48, 80), (0, 0, 0))
