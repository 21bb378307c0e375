"""AdamW where there is neither Transformer Engine nor Apex, in the shape that Megatron expects of Apex's `FusedAdam`.

Without the two, megatron-core 0.19.2 falls back to `torch.optim.AdamW`, whose state its distributed optimizer cannot
load again: it wants one step count in the parameter group, torch keeps one in every parameter's state, and a resume
ends at `assert len(steps) == 1` (seen on an H200). `TorchAdam` keeps the step where Apex keeps it and does the
arithmetic with torch's own fused AdamW, so that saving, loading and resharding take the way they take with Apex. The
CPU engine uses it, and a CUDA run without the two packages (there it has not run yet).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_ledom.engine.patching import Patches


class TorchAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay; moments in fp32, one step count a parameter group.

    Args:
        params: parameters or groups of them, fp32.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        adam_w_mode: False (decay added to the gradient) is refused.
        capturable: accepted for Apex's sake; must be False.

    Raises:
        ValueError: for the two settings that are not implemented.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("without Transformer Engine and Apex only AdamW is here: drop --no-decoupled-weight-decay")
        if capturable:
            raise ValueError("without Transformer Engine and Apex no CUDA graph: drop --optimizer-cuda-graph")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take one step; `closure` is not supported, as in Apex."""
        assert closure is None, "TorchAdam takes no closure"
        for group in self.param_groups:
            if not group["params"]:
                continue  # Megatron aligns the step of empty groups itself
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for param in params:
            state = self.state[param]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        beta1, beta2 = group["betas"]
        step = torch.tensor(float(group["step"]), device=params[0].device)
        torch._fused_adamw_(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],  # no AMSGrad maxima
            [step] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def use_torch_adam(patches: Patches) -> None:
    """Let Megatron build `TorchAdam`, and treat it as it treats Apex's."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    patches.replace(optimizer, "Adam", TorchAdam)
    patches.replace(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    patches.replace(distrib_optimizer, "Adam", TorchAdam)
    patches.replace(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    patches.replace(distrib_optimizer, "USING_APEX_OPTIMIZER", True)
