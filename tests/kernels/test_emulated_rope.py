"""The CUDA kernel of rotary positions, run on the CPU by the emulation, against float64 and the kernel for processors.

Nothing here ran on a GPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulation import Completion, Emulation, Order, Run

from megatron_ledom.ops.conformance import Rotation, documents, judge_rope
from megatron_ledom.ops.launch import launch_rope
from megatron_ledom.ops.reference import rope_tables

RANDOM = Run(Order.RANDOM, Completion.LAZY)


@pytest.mark.parametrize("rotary_dim", [40, 48, 44, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_are_at_most_twice_torchs(emulation: Emulation, dtype: torch.dtype, rotary_dim: int) -> None:
    """Of 48 elements 40 in wide accesses, with a rest; all; 44 and 2 one by one."""
    verdict = judge_rope(lambda x, y, r: emulation.rope(x, y, r, RANDOM), "cpu", dtype, rotary_dim=rotary_dim)
    print(f"{dtype} R {rotary_dim}: the worst error is {verdict.worst:.2f} of what is allowed")
    assert not verdict.faults, "\n".join(verdict.faults)


def rotation(batch: int, seq: int, half: int) -> Rotation:
    tables = rope_tables(100.0 ** -(torch.arange(half, dtype=torch.float64) / half), seq)
    return Rotation(*tables, documents(batch, seq), from_end=True, interleaved=False, inverse=False)


@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts_places_and_ways_give_what_the_processor_gives(emulation: Emulation, interleaved: bool) -> None:
    """Megatron's [S, B, H, D], rows that are not aligned, more pairs than a block has threads, in place, and back."""
    torch.manual_seed(1)
    batch, seq, heads, head_dim = 2, 9, 40, 64
    way = dataclasses.replace(rotation(batch, seq, head_dim // 2), interleaved=interleaved)
    whole = torch.randn(batch, seq, heads, head_dim)
    expected = torch.empty_like(whole)
    launch_rope(whole, expected, way)
    megatrons = whole.transpose(0, 1).contiguous().transpose(0, 1)
    shifted = torch.empty(batch, seq, heads, head_dim + 1)[..., 1:].copy_(whole)
    for x in (whole.clone(), megatrons, shifted):
        y = torch.full_like(whole, torch.nan)
        emulation.rope(x, y, way, RANDOM)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        emulation.rope(x, x, way, RANDOM)
        assert torch.equal(x, y)
        emulation.rope(x, x, dataclasses.replace(way, inverse=True), RANDOM)
        torch.testing.assert_close(x, whole, rtol=1e-5, atol=1e-5)


def test_what_the_kernel_does_not_serve_is_refused(emulation: Emulation) -> None:
    x = torch.randn(1, 9, 1, 8)
    way = rotation(1, 9, 4)
    with pytest.raises(ValueError, match="returns 2"):  # a table shorter than the sequence: a GPU cannot say so later
        emulation.rope(x, x, dataclasses.replace(way, cosines=way.cosines[:8], sines=way.sines[:8]), Run())
    with pytest.raises(ValueError, match="returns 2"):
        emulation.rope(x[..., :6], x[..., :6], way, Run())
