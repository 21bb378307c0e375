"""Which launch took a step, and which samples its ranks read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron.training.datasets.data_samplers import MegatronPretrainingRandomSampler, MegatronPretrainingSampler

from megatron_ledom.errors import InputError
from megatron_ledom.train.replay import find_launch, sample_places, shorten


def write_run(run: Path, starts: list[dict[str, int] | None]) -> Path:
    launches = []
    for hour, start in enumerate(starts):
        launch: dict[str, Any] = {"started_utc": f"2026-01-01T{hour:02d}", "megatron_arguments": {"launch": hour}}
        launches.append(launch if start is None else launch | {"start": start, "working_directory": "there"})
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"format_version": 1, "launches": launches}))
    return run


def test_the_last_launch_that_took_a_step_is_found(tmp_path: Path) -> None:
    """Killed after step 7, continued from the checkpoint of step 4 with another batch size."""
    run = write_run(tmp_path / "run", [{"steps": 0, "samples": 0}, {"steps": 4, "samples": 32}])
    found = [find_launch(run, step) for step in (1, 4, 5, 7)]
    assert [launch.args.launch for launch in found] == [0, 0, 1, 1]
    assert [(launch.start_steps, launch.start_samples) for launch in found] == [(0, 0)] * 2 + [(4, 32)] * 2
    with pytest.raises(InputError, match="no launch that took step 0"):
        find_launch(run, 0)
    assert find_launch(write_run(tmp_path / "old", [None]), 3).start_samples == 0


def again_and_again(sampler: Any) -> Iterator[list[int]]:
    """What Megatron's `cyclic_iter` makes of a loader."""
    while True:
        yield from sampler


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("kind", ["single", "cyclic", "cyclic without sharding"])
def test_samples_are_those_of_megatrons_sampler(kind: str, ranks: int, micro_batch: int) -> None:
    """From the first step on, past the end of the dataset, where a cyclic sampler begins anew."""
    num_samples, batch = 50, 8
    args = argparse.Namespace(
        dataloader_type=kind.split()[0],
        data_parallel_size=ranks,
        micro_batch_size=micro_batch,
        global_batch_size=batch,
        data_sharding=kind != "cyclic without sharding",
    )
    common = {"total_samples": num_samples, "consumed_samples": 0, "micro_batch_size": micro_batch}
    readers = []
    for rank in range(ranks):
        layout = common | {"data_parallel_rank": rank, "data_parallel_size": ranks}
        sampler = (
            MegatronPretrainingSampler(**layout)
            if kind == "single"
            else MegatronPretrainingRandomSampler(None, **layout, data_sharding=args.data_sharding)
        )
        readers.append(again_and_again(sampler))
    for step in range(6 if kind == "single" else 10):
        expected = [
            (position, number, rank)
            for number in range(batch // (ranks * micro_batch))
            for rank in range(ranks)
            for position in next(readers[rank])
        ]
        assert list(sample_places(args, step * batch, num_samples)) == expected


def test_long_texts_lose_their_middle() -> None:
    assert shorten("abcdefgh", 4) == "ab...gh"
    assert shorten("abcdefgh", 0) == shorten("abcdefgh", 8) == "abcdefgh"
