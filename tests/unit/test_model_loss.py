"""The loss as (sum, count), and the local norm, against plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_ledom.model.loss import REPORT_KEY, build_loss_function, masked_loss_sum
from megatron_ledom.model.spec import RMSNorm


def test_sum_and_count_give_the_mean_over_the_tokens_that_count() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (2, 6))
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1]], dtype=torch.float32)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 6)
    total, count, report = masked_loss_sum(mask, losses)
    expected = losses[mask.bool()].mean()
    assert count.item() == 8 and count.dtype == torch.int32
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-6)
    assert report[REPORT_KEY].tolist() == pytest.approx([total.item(), 8.0])
    assert not report[REPORT_KEY].requires_grad

    (total / count).backward(retain_graph=True)
    found = logits.grad.clone()
    logits.grad = None
    expected.backward()
    assert torch.allclose(found, logits.grad, rtol=1e-5, atol=1e-7)


def test_a_batch_without_a_counted_token_has_no_loss() -> None:
    total, count, _ = build_loss_function(torch.zeros(1, 4), check_finite=False)(torch.ones(1, 4))
    assert (total.item(), count.item()) == (0.0, 0)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_local_norm_is_rms_norm_and_tells_megatron_about_sequence_parallelism(sequence_parallel: bool) -> None:
    config = SimpleNamespace(
        normalization="RMSNorm", layernorm_zero_centered_gamma=False, sequence_parallel=sequence_parallel
    )
    norm = RMSNorm(config, 16, eps=1e-5)
    x = torch.randn(3, 2, 16)
    expected = x / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert torch.allclose(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert norm.weight.sequence_parallel is sequence_parallel
