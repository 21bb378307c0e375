"""The loss of a language model as (sum, count), in either direction.

The labels come from the data: in reversed data the next id of the model's order is
the previous token of the text, so the same function gives the paper's objective
P(x) = prod_t P(x_t given x_{t+1..T}) for a reverse model.

Legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]

REPORT_KEY = "lm loss"
"""Name of the loss in Megatron's log line and in TensorBoard."""


def masked_loss_sum(loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> LossOutput:
    """Sum the losses of the tokens that count; Megatron divides by the count.

    Args:
        loss_mask_BS: 1 where a token counts, 0 where it doesn't; float.
        losses_BS: cross-entropy in nats for each token, as the model returns it with labels.

    Returns:
        The sum (differentiable, fp32 scalar), the number of tokens (int32 scalar), and
        what is reported: {"lm loss": [sum, count]}, to be summed over data-parallel ranks.
    """
    import torch

    losses = losses_BS.view(-1).float()
    mask = loss_mask_BS.view(-1).float()
    total = torch.sum(losses * mask)
    count = mask.sum()
    report = torch.stack([total.detach(), count])
    return total, count.to(torch.int), {REPORT_KEY: report}


def mean_loss(loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> torch.Tensor:
    """The mean loss of the tokens that count, a detached fp32 scalar; arguments as of `masked_loss_sum`."""
    total, count, _ = masked_loss_sum(loss_mask_BS, losses_BS.detach())
    return total / count.clamp(min=1)


def checked_loss(loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor, *, check_finite: bool) -> LossOutput:
    """`masked_loss_sum`, stopping the run through Megatron's rerun state machine when the sum is NaN or infinite."""
    total, count, report = masked_loss_sum(loss_mask_BS, losses_BS)
    if check_finite:
        import torch
        from megatron.core.rerun_state_machine import get_rerun_state_machine

        for is_bad, word in ((torch.isnan, "NaN"), (torch.isinf, "infinity")):
            get_rerun_state_machine().validate_result(
                result=total,
                rejection_func=is_bad,
                message=f"found {word} in the loss of this rank",
                tolerance=0.0,
                fatal=True,
            )
    return total, count, report


def build_loss_function(loss_mask_BS: torch.Tensor, *, check_finite: bool) -> Callable[[torch.Tensor], LossOutput]:
    """Bind the mask of a batch, as Megatron's schedules want it: a function of the model's output alone."""
    return partial(checked_loss, loss_mask_BS, check_finite=check_finite)
