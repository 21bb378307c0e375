"""The loss over a vocabulary that is cut over tensor-parallel ranks, from the kernels of `ops.cross_entropy`.

    rank      logits                  statistics            together
    0         [N, ids 0 .. V)         maximum, sum, logit   largest maximum; sums brought to it and added; logits added
    1         [N, ids V .. 2 V)       maximum, sum, logit       -> log of the whole sum, and the loss

Legend: S sequence, B batch, V entries of a rank's part of the vocabulary, N = S * B.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from megatron_ledom.ops.cross_entropy import logit_gradient_, logit_statistics


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits; backward turns them into their gradient in place, once (torch refuses a second time)."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, group: Any) -> torch.Tensor:
        """Return the loss of each row, fp32 [N]; V is cut over the ranks of `group`."""
        ranks = 1 if group is None else group.size()
        first = 0 if ranks == 1 else group.rank() * logits_NV.shape[1]
        maximum, total, predicted = logit_statistics(logits_NV, targets_N, first)
        if ranks > 1:
            largest = maximum.clone()
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
            both = torch.stack([total * torch.exp(maximum - largest), predicted])
            torch.distributed.all_reduce(both, group=group)
            maximum, total, predicted = largest, both[0], both[1]
        lse = torch.log(total) + maximum
        ctx.first = first
        ctx.save_for_backward(logits_NV, targets_N, lse)
        return torch.log(total) + (maximum - predicted)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        logits, targets, lse = ctx.saved_tensors
        return logit_gradient_(logits, targets, lse, gradients[0], ctx.first), None, None


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: torch.Tensor, target: torch.Tensor, label_smoothing: float = 0.0, tp_group: Any = None
) -> torch.Tensor:
    """Compute each token's loss, in the place of Megatron's function of this name.

    The backward pass overwrites the logits, as Megatron's overwrites its copy of them. bf16 logits stay bf16.

    Args:
        vocab_parallel_logits: [S, B, V] of this rank, fp32 or bf16.
        target: int64 [S, B], ids of the whole vocabulary.
        label_smoothing: must be 0.
        tp_group: the ranks that hold the vocabulary; None for this one alone.

    Returns:
        fp32 [S, B], equal on all ranks of the group.

    Source: `megatron.core.tensor_parallel.cross_entropy.vocab_parallel_cross_entropy`.
    """
    assert label_smoothing == 0.0, f"built for no label smoothing, asked for {label_smoothing}"
    logits = vocab_parallel_logits.contiguous().view(-1, vocab_parallel_logits.shape[-1])
    losses: torch.Tensor = _CrossEntropy.apply(logits, target.reshape(-1), tp_group)
    return losses.view(target.shape)
