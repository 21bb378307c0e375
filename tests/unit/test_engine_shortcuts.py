"""What a CPU run leaves out: the results are those of the work that it would have done, to the last bit."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

from megatron_ledom.engine.cpu_shortcuts import scale_tensors, without_peers


def test_gradients_are_scaled_as_megatron_does() -> None:
    given = [torch.randn(7), torch.randn(3, 2)]
    expected = [x * 0.37 for x in given]
    apart = [torch.empty_like(x) for x in given]
    scale_tensors(2048, None, [given, apart], 0.37)
    assert all(torch.equal(a, b) for a, b in zip(apart, expected, strict=True))
    scale_tensors(2048, None, [given, given], 0.37)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def collectives_of_each_group(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=torch.distributed.FileStore(store, 2))
    alone = [torch.distributed.new_group([r]) for r in range(2)][rank]
    scatter = without_peers(torch.distributed.reduce_scatter_tensor)
    gather = without_peers(torch.distributed.all_gather_into_tensor)
    given = torch.arange(4.0) + rank
    # In a group of one: the same memory, and another.
    for output in (given, torch.empty(4)):
        scatter(output, given, group=alone)
        assert torch.equal(output, torch.arange(4.0) + rank)
        gather(output, given, group=alone)
        assert torch.equal(output, torch.arange(4.0) + rank)
    # In a group of two torch's own work is done.
    half, whole = torch.empty(2), torch.empty(8)
    scatter(half, given, group=torch.distributed.group.WORLD)
    assert torch.equal(half, (2 * torch.arange(4.0) + 1)[2 * rank : 2 * rank + 2])
    gather(whole, given, group=torch.distributed.group.WORLD)
    assert torch.equal(whole, torch.cat([torch.arange(4.0), torch.arange(4.0) + 1]))
    torch.distributed.destroy_process_group()


def test_collectives_of_one_rank_and_of_two(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(collectives_of_each_group, (str(tmp_path / "store"),), nprocs=2)
