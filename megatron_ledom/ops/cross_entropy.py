"""Cross entropy without a table of probabilities, over a part of the vocabulary: what each rank does with its logits.

    logit_statistics   three numbers a row, of which ranks make the loss     ledom::logit_statistics
    logit_gradient_    logits become their gradient, in place                ledom::logit_gradient_

        loss = log(sum over all parts of sum * exp(maximum - largest maximum)) + largest maximum - predicted

The two are kernels and no differentiable operation: between them ranks must agree (`model/cross_entropy.py`). Legend:
N rows, V entries of this part of the vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.ops.kernels import kernels
from megatron_ledom.ops.rows import row_kernels, row_shape

Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def logit_statistics(logits_NV: torch.Tensor, targets_N: torch.Tensor, first: int, path: str = "auto") -> Statistics:
    """Read the logits once.

    Args:
        logits_NV: fp32 or bf16.
        targets_N: int64, ids of the whole vocabulary.
        first: the id of this part's first entry.
        path: "auto", or one of `path.PATHS`.

    Returns:
        fp32 [N] each: the largest logit, the sum of exp(logit - largest), and the target's logit, 0 where the target is
        in another part.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, or a path that cannot serve.
    """
    _check_shapes(logits_NV, targets_N)
    chosen = row_kernels(logits_NV, path)
    if chosen is not None:
        result: Statistics = logit_statistics_op()(logits_NV, targets_N, first, chosen)
        return result
    logits = logits_NV.float()
    maximum = logits.amax(dim=-1)
    is_here, place = _places(logits_NV, targets_N, first)
    predicted = logits.gather(-1, place[:, None]).squeeze(-1).masked_fill(~is_here, 0.0)
    return maximum, torch.exp(logits - maximum[:, None]).sum(dim=-1), predicted


def logit_gradient_(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    lse_N: torch.Tensor,
    d_loss_N: torch.Tensor,
    first: int,
    path: str = "auto",
) -> torch.Tensor:
    """Turn logits into the gradient of the loss with respect to them, in place.

    Args:
        logits_NV: contiguous; overwritten.
        targets_N: as for `logit_statistics`.
        lse_N: fp32, the logarithm of the sum of exp(logit) over the whole vocabulary.
        d_loss_N: fp32, the gradient of each row's loss.
        first: as for `logit_statistics`.
        path: the same.

    Returns:
        `logits_NV`.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, logits that are not contiguous, or a path that cannot
            serve.
    """
    _check_shapes(logits_NV, targets_N)
    _check_rows(logits_NV, lse_N=lse_N, d_loss_N=d_loss_N)
    if not logits_NV.is_contiguous():
        raise UsageError(f"logit_gradient_: logits {list(logits_NV.shape)} have gaps: give a contiguous tensor")
    chosen = row_kernels(logits_NV, path)
    if chosen is not None:
        logit_gradient_op()(logits_NV, targets_N, lse_N, d_loss_N, first, chosen)
        return logits_NV
    is_here, place = _places(logits_NV, targets_N, first)
    gradient = torch.exp(logits_NV.float() - lse_N[:, None])
    gradient[torch.arange(len(place)), place] -= is_here.float()
    return logits_NV.copy_(gradient * d_loss_N[:, None])


def _check_shapes(logits: torch.Tensor, targets: torch.Tensor) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise UsageError(
            f"cross entropy: logits {list(logits.shape)} and targets {targets.dtype} {list(targets.shape)} must be "
            "[N, V] and int64 [N]"
        )
    if targets.device != logits.device:
        raise UsageError(f"cross entropy: targets are on {targets.device}, logits on {logits.device}")


def _check_rows(logits: torch.Tensor, **numbers: torch.Tensor) -> None:
    """Each row has one fp32 number in each of `numbers`: the kernels read their memory as it stands."""
    for name, x in numbers.items():
        if x.shape != logits.shape[:1] or x.dtype != torch.float32 or x.device != logits.device:
            raise UsageError(
                f"logit_gradient_: {name} is {x.dtype} {list(x.shape)} on {x.device}, and logits {list(logits.shape)} "
                f"on {logits.device} need float32 [{len(logits)}] there"
            )


def _places(logits: torch.Tensor, targets: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each target is in this part, and its column (0 where it is not)."""
    place = targets - first
    is_here = (place >= 0) & (place < logits.shape[1])
    return is_here, place.where(is_here, 0)


@functools.cache
def logit_statistics_op() -> Any:
    """Register `ledom::logit_statistics` at first use and return it."""

    @torch.library.custom_op("ledom::logit_statistics", mutates_args=(), device_types="cpu")
    def statistics(
        logits: torch.Tensor, targets: torch.Tensor, first: int, path: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute maximum, sum and predicted logit of every row."""
        logits, targets = logits.contiguous(), targets.contiguous()
        results = _empty_statistics(logits)
        kernels().cross_entropy_forward_cpu(
            row_shape(logits, logits.shape[1]),
            *(first, logits.data_ptr(), targets.data_ptr(), [result.data_ptr() for result in results], path),
        )
        return results

    @statistics.register_fake
    def fake(logits: Any, targets: Any, first: Any, path: Any) -> Any:
        return _empty_statistics(logits)

    return statistics


@functools.cache
def logit_gradient_op() -> Any:
    """Register `ledom::logit_gradient_` at first use and return it; it changes its first argument, and returns None."""

    @torch.library.custom_op("ledom::logit_gradient_", mutates_args=("logits",), device_types="cpu")
    def gradient(
        logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, d_loss: torch.Tensor, first: int, path: str
    ) -> None:
        targets, lse, d_loss = targets.contiguous(), lse.contiguous(), d_loss.contiguous()
        kernels().cross_entropy_backward_cpu(
            row_shape(logits, logits.shape[1]),
            *(first, [tensor.data_ptr() for tensor in (logits, targets, lse, d_loss)], logits.data_ptr(), path),
        )

    @gradient.register_fake
    def fake(logits: Any, targets: Any, lse: Any, d_loss: Any, first: Any, path: Any) -> None:
        return None

    return gradient


def _empty_statistics(logits: torch.Tensor) -> Statistics:
    rows = logits.shape[:1]
    maximum, total, predicted = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return maximum, total, predicted
