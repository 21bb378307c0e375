"""The row-wise operations as torch operations, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.ops.cross_entropy import logit_gradient_, logit_gradient_op, logit_statistics, logit_statistics_op
from megatron_ledom.ops.kernels import cpu_paths, kernels
from megatron_ledom.ops.rms_norm import rms_norm, rms_norm_op
from megatron_ledom.ops.swiglu import swiglu, swiglu_op

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", ["swiglu", "rms_norm", "logit_statistics", "logit_gradient_"])
def test_they_are_sound_torch_operations(name: str) -> None:
    path = cpu_paths()[0]
    x, weight, targets = torch.randn(5, 6, requires_grad=True), torch.randn(6, requires_grad=True), torch.arange(5)
    cases = {
        "swiglu": (swiglu_op, (x, path)),
        "rms_norm": (rms_norm_op, (x, weight, 1e-5, path)),
        "logit_statistics": (logit_statistics_op, (x.detach(), targets, 0, path)),
        "logit_gradient_": (logit_gradient_op, (x.detach(), targets, torch.ones(5), torch.ones(5), 0, path)),
    }
    build, arguments = cases[name]
    found = torch.library.opcheck(build(), arguments, test_utils=CHECKS)
    assert set(found.values()) == {"SUCCESS"}, found


def test_gaps_in_memory_and_empty_tensors() -> None:
    x = torch.randn(8, 10, 12)
    for given in (x.transpose(0, 1), x[:, ::2], x[..., ::2]):
        torch.testing.assert_close(swiglu(given), swiglu(given, "torch"))
        weight = torch.randn(given.shape[-1])
        torch.testing.assert_close(rms_norm(given, weight, 1e-5), rms_norm(given, weight, 1e-5, "torch"))
    assert swiglu(torch.empty(0, 4)).shape == (0, 2)
    assert rms_norm(torch.empty(3, 0), torch.empty(0), 1e-5).shape == (3, 0)


def test_other_dtypes_are_torchs() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    assert swiglu(x).dtype == torch.float64
    assert rms_norm(x.bfloat16(), torch.ones(4), 1e-5).shape == (3, 4)  # a weight in another dtype
    with pytest.raises(UsageError, match=r"no kernel for torch\.float64"):
        swiglu(x, cpu_paths()[0])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\[3, 5\]"):
        swiglu(torch.ones(3, 5))
    with pytest.raises(UsageError, match=r"\[4\] does not fit .*\[3, 5\]"):
        rms_norm(torch.ones(3, 5), torch.ones(4), 1e-5)
    with pytest.raises(UsageError, match=r"\[3, 5\] and targets torch\.int64 \[4\]"):
        logit_statistics(torch.ones(3, 5), torch.zeros(4, dtype=torch.int64), 0)
    with pytest.raises(UsageError, match="contiguous"):
        logit_gradient_(torch.ones(5, 3).t(), torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.ones(3), 0)


def test_the_c_interface_checks_its_arguments() -> None:
    x, y = torch.ones(4, 8), torch.empty(4, 4)
    call = kernels().swiglu_forward_cpu
    for shape, path, message in (
        ([7, 1, 4, 4], "", "dtype"),
        ([0, 1, 0, 4], "", "size below 1"),
        ([0, 1, 4, 4], "no such path", "no such path"),
    ):
        with pytest.raises(ValueError, match=message):
            call(shape, x.data_ptr(), y.data_ptr(), path)
    with pytest.raises(ValueError, match="missing"):
        call([0, 1, 4, 4], x.data_ptr(), 0, "")
