"""Work that a CPU run need not do, with results equal to the last bit.

gloo's reduce-scatter clones its input and adds up the clones, and its all-gather copies, also in a group of one rank,
where both leave everything as it was: 32 MB of fresh pages and three copies a step for 8 M parameters. Megatron scales
gradients through a copy of each. What is replaced is in `cpu`; the arithmetic is here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed

Collective = Callable[..., Any]


def without_peers(collective: Collective) -> Collective:
    """Wrap torch's reduce-scatter or all-gather, as Megatron's gradient buffers call them.

    In a group of one rank the output is the input: a copy, or nothing where Megatron passes the same memory twice,
    which is its usual way. The sum and the average of one are itself; any other group is torch's.
    """

    @functools.wraps(collective)
    def wrapper(output: torch.Tensor, given: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group is None or group.size() > 1 or output.numel() != given.numel():
            return collective(output, given, *args, group=group, **kwargs)
        if output.data_ptr() != given.data_ptr():
            output.copy_(given.view_as(output))
        return None  # as within Megatron's coalescing manager, which then finds nothing to wait for

    return wrapper


def scale_tensors(chunk_size: int, overflow: Any, tensor_lists: Sequence[Sequence[torch.Tensor]], scale: float) -> None:
    """Write each source times `scale` to its target, in place where they are one tensor.

    Source: the arguments are those of `megatron.core.utils.local_multi_tensor_scale`.
    """
    for source, target in zip(*tensor_lists, strict=True):
        if source is target:
            target.mul_(scale)
        else:
            torch.mul(source, scale, out=target)
