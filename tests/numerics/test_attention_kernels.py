"""Every kernel path against float64: at most twice the error of plain torch in the same dtype, plus a rounding floor.

All masks x head sizes x grouped heads x odd lengths; outputs, the rows' logarithms and all gradients.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_ledom.ops.attention import attention_with_lse
from megatron_ledom.ops.conformance import NAMES, documents, error, masks
from megatron_ledom.ops.fallback import torch_attention
from megatron_ledom.ops.kernels import cpu_paths, describe_kernels
from megatron_ledom.ops.reference import positions, reference_attention, reference_rope, rope_tables
from megatron_ledom.ops.rope import rope

HEAD_DIMS = (64, 128, 192, 40)
HEADS = ((4, 4), (4, 2), (3, 1))
LENGTHS = (1, 97, 250)  # one row; one tile of 96 keys and a row; more than a forward block of 192 rows
DTYPES = (torch.float32, torch.bfloat16)


def gradients(output: torch.Tensor, d_output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [output.detach(), *torch.autograd.grad(output, inputs, d_output.to(output.dtype))]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [error(f, e) for f, e in zip(found, exact, strict=True)]


def test_this_machine_runs_compiled_kernels() -> None:
    assert cpu_paths(), describe_kernels()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seq", LENGTHS)
def test_errors_are_at_most_twice_torchs(seq: int, head_dim: int) -> None:
    torch.manual_seed(seq + head_dim)
    worst, faults = 0.0, []
    for heads, groups in HEADS:
        batch = 2 if groups == 2 else 1
        for name, mask in masks(batch, seq).items():
            for dtype in DTYPES:
                inputs = [
                    torch.randn(batch, seq, h, head_dim).to(dtype).requires_grad_() for h in (heads, groups, groups)
                ]
                d_output = torch.randn(batch, seq, heads, head_dim).to(dtype)
                scale = 1 / math.sqrt(head_dim)
                wide = [x.detach().double().requires_grad_() for x in inputs]
                output, exact_lse = reference_attention(*wide, mask)
                exact = gradients(output, d_output, wide)
                torchs = errors(gradients(torch_attention(*inputs, mask, scale), d_output, inputs), exact)
                floor = 2 * torch.finfo(dtype).eps
                for path in cpu_paths():
                    output, lse = attention_with_lse(*inputs, mask, scale, path)
                    ours = errors(gradients(output, d_output, inputs), exact)
                    case = f"{path} {dtype} {heads}/{groups} heads, {name}"
                    for what, our, their in zip(NAMES, ours, torchs, strict=True):
                        worst = max(worst, our / (2 * their + floor))
                        if not our <= 2 * their + floor:
                            faults.append(f"{case}: {what} {our:.2e}, torch {their:.2e}")
                    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=2e-6, msg=case)
    print(f"S {seq} D {head_dim}: the worst error is {worst:.2f} of what is allowed")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", cpu_paths())
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00001, 0x7FC00000])
def test_nan_stays_nan_whatever_its_payload(bits: int, path: str) -> None:
    torch.manual_seed(1)
    mask = masks(1, 70)["reversed"]
    q, k, v = (torch.randn(1, 70, 2, 16) for _ in range(3))
    d_output = torch.randn(1, 70, 2, 16)
    q.view(torch.int32)[0, 40, 1, 5] = bits
    inputs = [x.requires_grad_() for x in (q, k, v)]
    output, _ = attention_with_lse(*inputs, mask, 0.3, path)
    rows = output.detach().isnan().all(-1)
    assert rows[0, 40, 1] and rows.sum() == 1 == output.detach().isnan().any(-1).sum()
    d_q, d_k, d_v = torch.autograd.grad(output, inputs, d_output)
    assert d_q[0, 40, 1].isnan().all() and all(x[0, 40:, 1].isnan().all() for x in (d_k, d_v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_positions_against_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    frequencies = 10000.0 ** -(torch.arange(20, dtype=torch.float64) / 20)
    floor = torch.finfo(dtype).eps
    for docs, from_end, interleaved, inverse in itertools.product((None, documents(2, 61)), *[(False, True)] * 3):
        x = torch.randn(2, 61, 3, 48).to(dtype).requires_grad_()
        d_y = torch.randn(2, 61, 3, 48).to(dtype)
        at = positions(docs, 2, 61, from_end=from_end)
        wide = x.detach().double().requires_grad_()
        exact_y = reference_rope(wide, at, frequencies, interleaved=interleaved, inverse=inverse)
        exact = [exact_y.detach(), torch.autograd.grad(exact_y, wide, d_y.double())[0]]
        found = {}
        for path in ("auto", "torch"):
            y = rope(
                x, *rope_tables(frequencies, 61), from_end=from_end, documents=docs, interleaved=interleaved,
                inverse=inverse, path=path,
            )  # fmt: skip
            found[path] = errors([y.detach(), torch.autograd.grad(y, x, d_y)[0]], exact)
        for ours, torchs in zip(found["auto"], found["torch"], strict=True):
            assert ours <= 2 * torchs + floor, (docs, from_end, interleaved, inverse)
