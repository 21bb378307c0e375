"""Forked ranks: each knows its place, and a rank that fails or hangs ends all of them and says why."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_ledom.cluster.forked_ranks import run_ranks
from megatron_ledom.errors import ParityError, UsageError


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    def work() -> None:
        print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} at {os.environ['MASTER_PORT']}")

    run_ranks(3, work, tmp_path, timeout_s=30)
    lines = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in range(3)]
    assert [line[:11] for line in lines] == [f"rank {rank} of 3" for rank in range(3)]
    assert len({line[11:] for line in lines}) == 1


def test_a_failure_ends_the_others_and_is_quoted(tmp_path: Path) -> None:
    def work() -> None:
        if os.environ["RANK"] == "1":
            raise ValueError("the seventh layer is missing")
        time.sleep(60)

    with pytest.raises(ParityError, match=r"rank 1 of 2 ended with status 1(.|\n)*the seventh layer is missing"):
        run_ranks(2, work, tmp_path, timeout_s=30)


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    def work() -> None:
        raise UsageError("that cannot be")

    with pytest.raises(ParityError) as caught:
        run_ranks(1, work, tmp_path, timeout_s=30)
    assert str(caught.value).splitlines()[1:] == ["error: that cannot be"]


def test_time_runs_out(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="was not done in time"):
        run_ranks(2, lambda: time.sleep(60), tmp_path, timeout_s=0.2)
