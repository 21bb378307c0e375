"""Linear layers by oneDNN against float64: the value and both gradients, by the rule of the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ledom.ops import products
from megatron_ledom.ops.conformance import error


@pytest.mark.parametrize("num_inputs", [1, 15, 256])
@pytest.mark.parametrize("num_outputs", [1, 33, 768])
@pytest.mark.parametrize("rows", [(1, 1), (67, 2)])
def test_value_and_gradients(rows: tuple[int, int], num_outputs: int, num_inputs: int) -> None:
    torch.manual_seed(num_inputs)
    x, w_NK = torch.randn(*rows, num_inputs), torch.randn(num_outputs, num_inputs)
    dy = torch.randn(*rows, num_outputs)

    def results(function: object, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w_NK)]
        y = function(*leaves)  # type: ignore[operator]
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    truth = results(torch.nn.functional.linear, torch.float64)
    plain = results(torch.nn.functional.linear, torch.float32)
    ours = results(products.linear, torch.float32)
    again = results(products.linear, torch.float32)
    for own, repeated, other, exact in zip(ours, again, plain, truth, strict=True):
        assert error(own, exact) <= 2 * error(other, exact) + 2 * torch.finfo(torch.float32).eps
        assert own.shape == other.shape and torch.equal(own, repeated)


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    x, w_NK = torch.randn(3, 5), torch.randn(7, 5, requires_grad=True)
    products.linear(x, w_NK).sum().backward()
    assert w_NK.grad is not None and x.grad is None
    x, w_NK = x.requires_grad_(), w_NK.detach()
    products.linear(x, w_NK).sum().backward()
    assert x.grad is not None and w_NK.grad is None


@pytest.mark.parametrize(
    ("capability", "vendor", "is_faster"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
        ("AVX512", None, False),
    ],
)
def test_the_processors_that_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, vendor: str | None, is_faster: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n" if vendor else "processor\t: 0\n")
    monkeypatch.setattr(products, "CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    products.is_onednn_faster.cache_clear()
    assert products.is_onednn_faster() == is_faster
    products.is_onednn_faster.cache_clear()
