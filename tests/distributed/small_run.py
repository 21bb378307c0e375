"""The small configuration of the distributed tests, and where its losses are read."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

SMALL = [
    *("--preset", "tiny", "--device", "cpu"),
    # 8 layers, so that four stages of two virtual stages fit; narrow, so that a step takes milliseconds.
    *("--num-layers", 8, "--hidden-size", 64, "--ffn-hidden-size", 128, "--seq-length", 64),
    *("--max-position-embeddings", 64, "--make-vocab-size-divisible-by", 64),
    *("--micro-batch-size", 1, "--global-batch-size", 8),
    *("--lr", 3e-3, "--log-interval", 1),
    *("--eval-interval", 1000, "--eval-iters", 2),
]

NARROW = [
    # Still smaller, for tests that start a run many times.
    *("--preset", "tiny", "--device", "cpu", "--num-layers", 2, "--hidden-size", 32, "--ffn-hidden-size", 64),
    *("--seq-length", 32, "--max-position-embeddings", 32, "--micro-batch-size", 1, "--global-batch-size", 4),
    *("--lr", 3e-3, "--log-interval", 1, "--eval-interval", 1000, "--eval-iters", 2),
]

Pretrain = Callable[..., subprocess.CompletedProcess[str]]
