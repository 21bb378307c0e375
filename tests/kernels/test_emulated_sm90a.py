"""The sm_90a forward kernel, run on the CPU by the emulation, against float64: at most twice torch's error in bf16."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from emulation import FLOOR, HEAD_DIMS, HEADS, RUNS, Completion, Emulation, Run, inputs_of

from megatron_ledom.ops.conformance import error, masks
from megatron_ledom.ops.fallback import torch_attention
from megatron_ledom.ops.mask import AttentionMask
from megatron_ledom.ops.reference import reference_attention

FORWARD = "ledom_attention_forward_sm90a"
LENGTHS = (1, 97, 203)  # one row; less than a tile; two blocks of rows and two or three tiles, with odd ends


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seq", LENGTHS)
def test_errors_are_at_most_twice_torchs(emulation: Emulation, seq: int, head_dim: int) -> None:
    torch.manual_seed(seq + head_dim)
    worst, faults, runs, turns = 0.0, [], itertools.cycle(RUNS), itertools.cycle(HEADS)
    for name in masks(1, seq):
        heads, groups = next(turns)
        batch = 2 if groups == 2 and heads == 2 else 1
        mask = masks(batch, seq)[name]
        inputs = inputs_of(batch, seq, heads, groups, head_dim)
        exact, exact_lse = reference_attention(*(x.double() for x in inputs), mask)
        torchs = torch_attention(*inputs, mask, 1 / math.sqrt(head_dim))
        run = next(runs)
        case = f"{heads}/{groups} heads, {name}, {run}"
        output, lse = emulation.forward(*inputs, mask, run, FORWARD)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=2e-6, msg=case)
        off, allowed = error(output, exact), 2 * error(torchs, exact) + FLOOR
        worst = max(worst, off / allowed)
        if not off <= allowed:
            faults.append(f"{case}: {off:.2e}, allowed {allowed:.2e}")
    print(f"S {seq} D {head_dim}: the worst error is {worst:.2f} of what is allowed")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_both_stages_are_walked_twice(emulation: Emulation, head_dim: int) -> None:
    torch.manual_seed(4)
    seq = 550
    inputs = inputs_of(1, seq, 1, 1, head_dim)
    for name in ("reversed", "causal, documents"):
        exact, _ = reference_attention(*(x.double() for x in inputs), masks(1, seq)[name])
        output, _ = emulation.forward(*inputs, masks(1, seq)[name], RUNS[-1], FORWARD)
        assert error(output, exact) < 2 * FLOOR, name


def test_a_section_of_heads_may_be_smaller_than_the_others(emulation: Emulation) -> None:
    """Keys and values of two heads fill the cache that launches reckon with: the third head is a section of its own."""
    torch.manual_seed(7)
    q, k, v = inputs_of(1, 15_000, 3, 3, 192)
    output, _ = emulation.forward(q, k, v, AttentionMask(0, 0), Run(), FORWARD)
    assert torch.equal(output, v)  # each row attends itself alone


def test_order_and_completion_change_no_bit(emulation: Emulation) -> None:
    torch.manual_seed(5)
    q, k, v = inputs_of(1, 300, 2, 1, 64)
    mask = masks(1, 300)["reversed, documents"]
    expected = emulation.forward(q, k, v, mask, Run(completion=Completion.EAGER), FORWARD)
    for run in RUNS:
        found = emulation.forward(q, k, v, mask, run, FORWARD)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), run


def test_tiles_that_no_row_attends_are_not_walked(emulation: Emulation) -> None:
    q, k, v = inputs_of(1, 768, 1, 1, 64)
    products = {}
    for name, mask in {"all": AttentionMask(None, None), "window": AttentionMask(0, 15)}.items():
        emulation.forward(q, k, v, mask, Run(), FORWARD)
        products[name] = emulation.counts.products
    # 4 blocks of 192 rows and 6 tiles of 128 keys; with a window of 16 keys rows 0 .. 191 reach keys 0 .. 206
    # (2 tiles), rows 192 .. 383 keys 192 .. 398 (3), rows 384 .. 575 keys 384 .. 590 (2), rows 576 .. 767 keys
    # 576 .. 767 (2).
    assert products["window"] * 24 == products["all"] * 9


def test_strides_are_the_tensors_own(emulation: Emulation) -> None:
    """Megatron's layout [S, B, H, D], and q, k and v in one tensor."""
    torch.manual_seed(6)
    packed = torch.randn(70, 2, 4, 64 * 3).to(torch.bfloat16).transpose(0, 1)
    q, k, v = packed.split(64, dim=3)
    mask = masks(2, 70)["reversed"]
    expected = emulation.forward(*(x.contiguous() for x in (q, k, v)), mask, Run(), FORWARD)
    found = emulation.forward(q, k, v, mask, Run(), FORWARD)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_the_kernel_does_not_serve_is_refused(emulation: Emulation) -> None:
    mask = AttentionMask(0, None)
    with pytest.raises(ValueError, match="returns 8"):
        emulation.forward(*inputs_of(1, 8, 1, 1, 40), mask, Run(), FORWARD)
    shifted = [torch.randn(1, 8, 1, 65).to(torch.bfloat16)[..., 1:] for _ in range(3)]
    with pytest.raises(ValueError, match="returns 8"):
        emulation.forward(*shifted, mask, Run(), FORWARD)
