"""Emulated FP8 with delayed scales: at any layout the same training, and a resume keeps the history of the scales."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from small_run import Pretrain

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.model.precision import decode_history
from megatron_ledom.train.metrics import TRAIN_LOSS, read_scalars

pytestmark = pytest.mark.distributed

LAYERS, SAVED, LAST = 4, 3, 6
MODULES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
MICRO_BATCHES = 8
"""A step: 8 samples, one at a time."""


def read_histories(checkpoints: Path, step: int) -> dict[str, torch.Tensor]:
    """The histories of every layer as a checkpoint holds them: name -> fp32 [3, length]."""
    from torch.distributed.checkpoint import FileSystemReader

    folder = Checkpoint.open(checkpoints, step=step).folder
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    found = {}
    for index, place in metadata.storage_data.items():
        if "_extra_state/" in index.fqn and any(module in index.fqn for module in MODULES):
            data = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
            (state,) = torch.load(io.BytesIO(data))
            assert pickle.loads(state.numpy().tobytes()) is None, "Transformer Engine unpickles it and finds nothing"
            history = decode_history(state)
            assert history is not None, index.fqn
            found[index.fqn] = history
    return found


def test_a_resume_at_another_layout_keeps_the_scales(tmp_path: Path, pretrain: Pretrain) -> None:
    length = ["--num-layers", LAYERS, "--train-iters", LAST, "--save-interval", SAVED, "--precision", "fp8-delayed"]
    length += ["--eval-iters", 0]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    pretrain(whole, 2, *length, "--tensor-model-parallel-size", 2, "--sequence-parallel")
    start = ["--load", whole / "checkpoints", "--ckpt-step", SAVED]
    pretrain(resumed, 2, *length, *start, "--pipeline-model-parallel-size", 2)

    expected, found = read_scalars(whole, TRAIN_LOSS), read_scalars(resumed, TRAIN_LOSS)
    steps = range(SAVED + 1, LAST + 1)
    print("\nlosses", [expected[s] for s in steps], "resumed", [found[s] for s in steps])
    assert [found[s] for s in steps] == pytest.approx(
        [expected[s] for s in steps], abs=5e-3
    )  # BF16 and FP8 round sums of other parts

    before, after = read_histories(whole / "checkpoints", SAVED), read_histories(whole / "checkpoints", LAST)
    other = read_histories(resumed / "checkpoints", LAST)
    assert set(other) == set(after) and len(after) == LAYERS * len(MODULES)
    for name, history in after.items():
        assert history.shape == (3, 1024)
        for kept, num_steps in ((before[name], SAVED), (history, LAST), (other[name], LAST)):
            seen = num_steps * MICRO_BATCHES
            assert (kept[:, :seen] > 0).all() and not kept[:, seen:].any(), f"{name}: {num_steps} steps"
        old = (LAST - SAVED) * MICRO_BATCHES
        assert torch.equal(other[name][:, old:], history[:, old:]), "what was seen before the save, untouched"
        torch.testing.assert_close(other[name][:, :old], history[:, :old], rtol=0.5, atol=0)
