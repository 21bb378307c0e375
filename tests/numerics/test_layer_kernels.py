"""SwiGLU, RMSNorm and cross entropy of every path against float64, by the rule of the attention kernels.

At most twice the error of plain torch in the same dtype, plus a rounding floor; outputs and all gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from megatron_ledom.model.cross_entropy import vocab_parallel_cross_entropy
from megatron_ledom.ops.conformance import error
from megatron_ledom.ops.cross_entropy import logit_gradient_, logit_statistics
from megatron_ledom.ops.kernels import cpu_paths
from megatron_ledom.ops.reference import reference_cross_entropy, reference_rms_norm, reference_swiglu
from megatron_ledom.ops.rms_norm import rms_norm
from megatron_ledom.ops.swiglu import swiglu

DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = (1, 15, 64, 131, 896, 2500)  # less than a vector; whole vectors; a rest; more than a chunk of a sum
SHAPES = ((1,), (3, 1), (67, 2))  # rows: one; few; several blocks of the norm and a rest
EPS = 1e-5

Inputs = list[torch.Tensor]
Function = Callable[..., torch.Tensor]


def results(function: Function, inputs: Inputs, d_output: torch.Tensor) -> Inputs:
    """The output and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, d_output.to(output.dtype))]


def faults_against_torch(
    ours: Callable[[str], Function], exact: Function, inputs: Inputs, shape: tuple[int, ...]
) -> list:
    """Every result of a path whose error is beyond the rule."""
    dtype = inputs[0].dtype
    d_output = torch.randn(shape).to(dtype)
    reference = results(exact, [x.double() for x in inputs], d_output)
    plain = results(ours("torch"), inputs, d_output)
    floor = 2 * torch.finfo(dtype).eps
    found = []
    for path in cpu_paths():
        for i, values in enumerate(zip(results(ours(path), inputs, d_output), plain, reference, strict=True)):
            own, other, truth = values
            limit = 2 * error(other, truth) + floor
            if not error(own, truth) <= limit or own.dtype != other.dtype or own.shape != other.shape:
                found.append((path, dtype, list(shape), i, error(own, truth), limit))
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(width: int) -> None:
    torch.manual_seed(width)
    faults = []
    for rows in SHAPES:
        for dtype in DTYPES:
            x = (3 * torch.randn(*rows, 2 * width)).to(dtype)
            faults += faults_against_torch(
                lambda path: partial(swiglu, path=path), reference_swiglu, [x], (*rows, width)
            )
    assert not faults, faults


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int) -> None:
    torch.manual_seed(width)
    faults = []
    for rows in SHAPES:
        for dtype in DTYPES:
            x, weight = torch.randn(*rows, width).to(dtype), torch.randn(width).to(dtype)
            faults += faults_against_torch(
                lambda path: partial(rms_norm, eps=EPS, path=path),
                lambda x, weight: reference_rms_norm(x, weight, EPS),
                [x, weight],
                (*rows, width),
            )
    assert not faults, faults


def loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor, d_loss: torch.Tensor, path: str, cut: int) -> Inputs:
    """As ranks that hold the ids below and from `cut` on would compute them together."""
    parts = [(logits[:, :cut], 0), (logits[:, cut:], cut)] if cut else [(logits, 0)]
    each = [logit_statistics(part, targets, first, path) for part, first in parts]
    largest = torch.stack([maximum for maximum, _, _ in each]).amax(dim=0)
    total = sum(total * torch.exp(maximum - largest) for maximum, total, _ in each)
    lse = torch.log(total) + largest
    loss = lse - sum(predicted for _, _, predicted in each)
    gradients = [logit_gradient_(part.contiguous().clone(), targets, lse, d_loss, first, path) for part, first in parts]
    return [loss, torch.cat(gradients, dim=-1)]


@pytest.mark.parametrize("width", WIDTHS)
def test_cross_entropy_whole_and_in_parts(width: int) -> None:
    torch.manual_seed(width)
    faults = []
    for rows in (1, 5, 40):
        for dtype in DTYPES:
            logits = (4 * torch.randn(rows, width)).to(dtype)
            targets, d_loss = torch.randint(width, (rows,)), torch.randn(rows)
            exact = results(lambda x, t=targets: reference_cross_entropy(x, t), [logits.double()], d_loss)
            plain = loss_and_gradient(logits, targets, d_loss, "torch", 0)
            for path in cpu_paths():
                for cut in {0, width // 3}:
                    own = loss_and_gradient(logits, targets, d_loss, path, cut)
                    for i, dtype_of in enumerate((torch.float32, dtype)):
                        floor = 4 * torch.finfo(dtype_of).eps
                        limit = 2 * error(plain[i], exact[i]) + floor
                        if not error(own[i], exact[i]) <= limit:
                            faults.append((path, dtype, rows, cut, i, error(own[i], exact[i]), limit))
    assert not faults, faults


def test_the_loss_for_megatron_is_torchs_and_a_second_backward_is_refused() -> None:
    torch.manual_seed(0)
    given, targets = torch.randn(6, 2, 50, requires_grad=True), torch.randint(50, (6, 2))
    logits = given * 1.0
    losses = vocab_parallel_cross_entropy(logits, targets)
    losses.sum().backward(retain_graph=True)
    own, given.grad = given.grad, None
    exact = torch.nn.functional.cross_entropy(given.view(12, 50), targets.view(12), reduction="none").view(6, 2)
    exact.sum().backward()
    assert own is not None and given.grad is not None
    torch.testing.assert_close(losses, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own, given.grad, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("path", cpu_paths())
def test_extreme_values(path: str) -> None:
    edge = torch.tensor([[-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30, torch.inf, torch.nan]])
    one = torch.ones_like(edge)
    found = swiglu(torch.cat([edge, one], dim=-1), path)
    torch.testing.assert_close(found[:, :8], torch.nn.functional.silu(edge)[:, :8], rtol=1e-6, atol=1e-30)
    assert found[0, 8] == torch.inf and found[0, 9].isnan()
    for value in (torch.nan, torch.inf):
        x = torch.randn(2, 40)
        x[0, 39] = value
        assert not rms_norm(x, torch.ones(40), EPS, path)[0].isfinite().all()
        assert rms_norm(x, torch.ones(40), EPS, path)[1].isfinite().all()
        maximum, total, _ = logit_statistics(x, torch.tensor([0, 0]), 0, path)
        assert not (torch.log(total) + maximum)[0].isfinite() and (torch.log(total) + maximum)[1].isfinite()
    for bits in (0x7FFFFFFF, 0x7FC00001, -1):  # NaN with bits set that an addition of exponents would carry on
        nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        x, one = torch.randn(1, 40), torch.ones(1)
        x[0, 3] = nan
        assert swiglu(torch.cat([x, x], dim=-1), path)[0, 3].isnan()
        assert logit_statistics(x, torch.tensor([0]), 0, path)[1].isnan()
        assert logit_gradient_(x.clone(), torch.tensor([0]), one, one, 0, path)[0, 3].isnan()
        assert logit_gradient_(x.nan_to_num(), torch.tensor([0]), nan[None], one, 0, path).isnan().all()
    far = torch.full((1, 100), -torch.inf)
    far[0, 7] = 1e4
    maximum, total, predicted = logit_statistics(far, torch.tensor([7]), 0, path)
    assert (maximum, total, predicted) == (1e4, 1.0, 1e4)


@pytest.mark.parametrize("path", cpu_paths())
def test_no_bit_depends_on_the_number_of_threads(path: str) -> None:
    torch.manual_seed(0)
    x, weight, d_y = torch.randn(301, 130), torch.randn(130), torch.randn(301, 130)
    targets, number = torch.randint(130, (301,)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                [
                    *results(lambda x, w: rms_norm(x, w, EPS, path), [x, weight], d_y),
                    *results(lambda x: swiglu(x, path), [torch.cat([x, d_y], dim=-1)], d_y),
                    *loss_and_gradient(x, targets, d_y[:, 0], path, 0),
                ]
            )
    finally:
        torch.set_num_threads(number)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
