"""A process group of any size in one process: one rank is laid out, the others are only counted.

torch's `fake` backend answers every collective at once and moves nothing, so Megatron's own code builds the model,
the gradient buffers and the optimizer of rank 17 of 512 on a laptop. Combined with fake tensors nothing is allocated
either. What needs the contents of tensors is replaced while the block runs:

    all_gather_object       the optimizer's parameter groups, pickled: all ranks have the same, so this rank's answer
    Module.bfloat16         torch swaps parameters that change their dtype, which it refuses for fake ones
    Megatron's RNG tracker  compares states of the random generator by value; no number is drawn here
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def rank_environment(rank: int, world_size: int) -> Iterator[None]:
    """Show a rank's place in the variables that Megatron's parser reads; they are put back afterwards."""
    wanted = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Be `rank` of `world_size` ranks that do not exist, until the block ends; Megatron's groups are then gone too.

    The CPU engine must be installed, and no process group may exist.
    """
    import torch
    import torch.distributed._tools.fake_collectives  # teaches fake tensors the collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not torch.distributed.is_initialized(), "this process is a rank already"
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    originals = _replace_what_reads_values()
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        _forget_megatron()
        torch.distributed.destroy_process_group()


def _replace_what_reads_values() -> list[tuple[Any, str, Any]]:
    import megatron.core.tensor_parallel.random as megatron_random
    import torch

    new: list[tuple[Any, str, Any]] = [
        (torch.distributed, "all_gather_object", _same_everywhere),
        (torch.nn.Module, "bfloat16", _to_bfloat16),
        (megatron_random.CudaRNGStatesTracker, "fork", _draws_nothing),
        (megatron_random, "_get_all_rng_states", lambda: (None, None, None)),
        (megatron_random, "_set_all_rng_states", lambda *states: None),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in new]
    for owner, name, value in new:
        setattr(owner, name, value)
    return originals


def _same_everywhere(gathered: list[Any], value: Any, group: Any = None) -> None:
    gathered[:] = [value] * len(gathered)


@contextmanager
def _draws_nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _to_bfloat16(module: Any) -> Any:
    """Give every floating-point parameter below `module` that is not bf16 a bf16 one with the same attributes."""
    import torch

    for part in module.modules():
        for name, old in part._parameters.items():
            if old is None or not old.is_floating_point() or old.dtype == torch.bfloat16:
                continue
            part._parameters[name] = torch.nn.Parameter(old.detach().to(torch.bfloat16), old.requires_grad)
            vars(part._parameters[name]).update(vars(old))
    return module


def _forget_megatron() -> None:
    from megatron.training.training import destroy_global_state

    destroy_global_state()
