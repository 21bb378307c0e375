"""The CUDA kernels, run on the CPU by the emulation, against float64: at most twice the error of plain torch in bf16.

Nothing here ran on a GPU: docs/kernels-cuda.md says what that leaves open.
"""

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

LENGTHS = (1, 97, 193)  # one row; a tile of keys and a bit; blocks of rows, tiles of keys and a bit


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seq", LENGTHS)
def test_errors_are_at_most_twice_torchs(emulation: Emulation, seq: int, head_dim: int) -> None:
    torch.manual_seed(seq + head_dim)
    worst, faults, runs, turns = 0.0, [], itertools.cycle(RUNS), itertools.cycle(HEADS)
    names = masks(1, seq)
    # The longest sequences take one grouping for each mask, in turn.
    groupings = HEADS if seq < max(LENGTHS) else [None]
    for grouping in groupings:
        for name in names:
            heads, groups = grouping or next(turns)
            batch = 2 if groups == 2 else 1
            mask = masks(batch, seq)[name]
            inputs = [x.requires_grad_() for x in inputs_of(batch, seq, heads, groups, head_dim)]
            d_output = torch.randn(batch, seq, heads, head_dim).to(torch.bfloat16)
            wide = [x.detach().double().requires_grad_() for x in inputs]
            exact_output, exact_lse = reference_attention(*wide, mask)
            exact = [exact_output.detach(), *torch.autograd.grad(exact_output, wide, d_output.double())]
            output = torch_attention(*inputs, mask, 1 / math.sqrt(head_dim))
            torchs = [output.detach(), *torch.autograd.grad(output, inputs, d_output)]
            run = next(runs)
            detached = [x.detach() for x in inputs]
            case = f"{heads}/{groups} heads, {name}, {run}"
            results = emulation.forward(*detached, mask, run)
            torch.testing.assert_close(results[1].double(), exact_lse, rtol=2e-6, atol=2e-6, msg=case)
            assert emulation.counts.bank_conflicts == 0, case
            gradients = emulation.backward(detached, mask, results, d_output, run)
            assert emulation.counts.bank_conflicts == 0, case
            ours = [results[0], *gradients]
            for what, our, their, right in zip(("o", "d_q", "d_k", "d_v"), ours, torchs, exact, strict=True):
                off, allowed = error(our, right), 2 * error(their, right) + FLOOR
                worst = max(worst, off / allowed)
                if not off <= allowed:
                    faults.append(f"{case}: {what} {off:.2e}, allowed {allowed:.2e}")
    print(f"S {seq} D {head_dim}: the worst error is {worst:.2f} of what is allowed")
    assert not faults, "\n".join(faults)


def test_order_and_completion_change_no_bit(emulation: Emulation) -> None:
    torch.manual_seed(5)
    q, k, v = inputs_of(1, 300, 2, 1, 64)
    mask = masks(1, 300)["reversed, documents"]
    d_output = torch.randn_like(q)

    def results_of(run: Run) -> list[torch.Tensor]:
        results = emulation.forward(q, k, v, mask, run)
        return [*results, *emulation.backward((q, k, v), mask, results, d_output, run)]

    expected = results_of(Run(completion=Completion.EAGER))
    for run in RUNS:
        for ours, first in zip(results_of(run), expected, strict=True):
            assert torch.equal(ours, first), run


def test_tiles_that_no_row_attends_are_not_walked(emulation: Emulation) -> None:
    q, k, v = inputs_of(1, 512, 1, 1, 64)
    products = {}
    for name, mask in {"all": AttentionMask(None, None), "window": AttentionMask(0, 15)}.items():
        emulation.forward(q, k, v, mask, Run())
        products[name] = emulation.counts.products
    # 4 blocks of 128 rows and 8 tiles of 64 keys; a window of 16 keys reaches 3 tiles from a block, the last one 2.
    assert products["window"] * 32 == products["all"] * 11


def test_strides_are_the_tensors_own(emulation: Emulation) -> None:
    """Megatron's layout [S, B, H, D], and q, k and v in one tensor."""
    torch.manual_seed(6)
    packed = torch.randn(70, 2, 4, 64 * 3).to(torch.bfloat16).transpose(0, 1)
    q, k, v = packed.split(64, dim=3)
    mask = masks(2, 70)["reversed"]
    d_output = torch.randn(70, 2, 4, 64).to(torch.bfloat16).transpose(0, 1)
    whole = tuple(x.contiguous() for x in (q, k, v))
    expected = emulation.forward(*whole, mask, Run())
    found = emulation.forward(q, k, v, mask, Run())
    expected += emulation.backward(whole, mask, expected, d_output.contiguous(), Run())
    found += emulation.backward((q, k, v), mask, found[:2], d_output, Run())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_the_kernels_do_not_serve_is_refused(emulation: Emulation) -> None:
    mask = AttentionMask(0, None)
    with pytest.raises(ValueError, match="returns 8"):
        emulation.forward(*inputs_of(1, 8, 1, 1, 40), mask, Run())
    shifted = [torch.randn(1, 8, 1, 65).to(torch.bfloat16)[..., 1:] for _ in range(3)]
    with pytest.raises(ValueError, match="returns 8"):
        emulation.forward(*shifted, mask, Run())
