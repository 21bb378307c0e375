"""What rank 0 of a preflight looks at in the run, within the minute that it has."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from megatron_ledom.checkpoint import integrity
from megatron_ledom.checkpoint.writer import CheckpointWriter
from megatron_ledom.cluster.findings import Level
from megatron_ledom.cluster.preflight import Options, look_at_run
from megatron_ledom.engine import cpu
from megatron_ledom.errors import CheckpointError


def test_the_preflight_leaves_the_hashing_of_checkpoints_to_the_run(tmp_path: Path) -> None:
    """It would take one rank minutes; whether it was done is seen from damage that only a hash shows."""
    folder = tmp_path / "release"
    folder.mkdir(parents=True)
    with CheckpointWriter(folder) as writer:
        writer.write_chunk("weight", torch.ones(4, 4), shape=(4, 4), offsets=(0, 0))
        writer.write_common(argparse.Namespace(direction="reverse"), iteration=0)
    integrity.write_checksums(folder, writer.hashes)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (file,) = folder.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="has changed since it was saved"):
        integrity.verify_checksums(folder)

    run = ["--preset", "tiny", "--run-dir", str(tmp_path / "run"), "--mock-data", "--vocab-size", "1024"]
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--pretrained-checkpoint", str(tmp_path)]
    (tmp_path / "run").mkdir()
    try:
        findings = look_at_run(Options("cpu", [*run, *tokenizer]))
    finally:
        cpu.restore()
    lines = [finding.line() for finding in findings]
    assert all(finding.level is Level.OK for finding in findings), lines
    text = "ok          checkpoint: --pretrained-checkpoint at step 0; the run itself compares its checksums"
    assert text in lines
