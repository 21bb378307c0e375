"""One Slurm of our own for the session, and what submits scripts to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_slurm import LocalSlurm
from slurm_jobs import Scripts


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    """A running Slurm; the session ends it."""
    cluster = LocalSlurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture
def scripts(slurm: LocalSlurm, tmp_path: Path) -> Scripts:
    """Submits scripts, with logs in this test's folder."""
    return Scripts(slurm, tmp_path)
