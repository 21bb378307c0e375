"""Real data, a small real configuration and real gloo ranks, for the tests that start several processes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer
from small_run import SMALL, Pretrain

from megatron_ledom.testing import run_distributed


@pytest.fixture(scope="session")
def data_arguments(prefixes: dict[str, Path], tokenizer_folder: Path) -> list[object]:
    """The data and tokenizer flags of a reverse run."""
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder]
    return ["--data-path", prefixes["reverse"], *tokenizer]


@pytest.fixture(scope="session")
def pretrain(data_arguments: list[object]) -> Pretrain:
    """Run tools/pretrain.py under torchrun on the small configuration and check that it succeeded."""

    def run(run_dir: Path, num_processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
        done = run_distributed("pretrain.py", num_processes, *SMALL, *data_arguments, "--run-dir", run_dir, *arguments)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """A process that has imported Megatron and starts ranks at once."""
    server = ForkServer()
    yield server
    server.close()
