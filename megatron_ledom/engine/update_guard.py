"""A word before every update of the weights: on all ranks at the same place, after the gradients were reduced.

    Megatron's train_step:  forward, backward, reduce -> optimizer.prepare_grads -> [hooks.may_update] -> update

`prepare_grads` is where Megatron's mixed-precision optimizers report an overflow, and "overflow" is the answer that
leaves out an update here: the scheduler does not step, the data goes on, the log counts a skipped iteration. What
Megatron's checks find on one rank (`validate_result`: a loss, the gradients before they are reduced) is reported to
the hooks instead of ending that rank. So it is within a training step alone: an evaluation updates nothing, what it
finds is no fault of the next batch, and Megatron's own check speaks there. There is no other loop and no other step
than Megatron's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from megatron_ledom.engine.patching import Patches

_patches = Patches()
_COUNTERS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


class StepHooks(Protocol):
    """What is asked and told in a step; the methods but `reject` are called on all ranks alike."""

    def reject(self, message: str) -> None:
        """A check of Megatron's failed on this rank."""

    def may_update(self, step: int, grad_norm: float) -> bool:
        """Whether the weights may take this step's gradients; raises to end the run."""

    def after_step(self, step: int, restore: Callable[[Path, int], None]) -> None:
        """The step is over; `restore(save, step)` brings weights, optimizer and schedule of a checkpoint back."""


def install(hooks: StepHooks) -> None:
    """Route Megatron's steps through `hooks`, once a process."""
    restore()
    import megatron.training.training as training
    from megatron.core.rerun_state_machine import RerunStateMachine

    train_step, megatrons_check = training.train_step, RerunStateMachine.validate_result
    is_in_step = False

    def guarded_train_step(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        """Take Megatron's step, with the hooks asked between gradients and update."""
        nonlocal is_in_step
        step = kw["iteration"] + 1
        prepare_grads = optimizer.prepare_grads

        def prepare_and_ask() -> bool:
            has_overflow = bool(prepare_grads())
            if has_overflow:  # of a loss scale: Megatron's own business
                return True
            norm = optimizer.get_grad_norm()
            return not hooks.may_update(step, float(norm if norm is not None else 0.0))

        optimizer.prepare_grads = prepare_and_ask
        is_in_step = True
        try:
            result = train_step(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, *rest, **kw)
        finally:
            is_in_step = False
            del optimizer.prepare_grads  # the class's own is found again
        hooks.after_step(step, lambda save, to: load_in_place(save, to, model, optimizer, opt_param_scheduler))
        return result

    def validate_result(
        self: Any, result: Any, rejection_func: Callable[[Any], Any], message: str = "", *args: Any, **kwargs: Any
    ) -> None:
        if not is_in_step:
            megatrons_check(self, result, rejection_func, message, *args, **kwargs)
        elif bool(rejection_func(result)):
            hooks.reject(message)

    _patches.replace(training, "train_step", guarded_train_step)
    _patches.replace(RerunStateMachine, "validate_result", validate_result)


def restore() -> None:
    """Give Megatron its own functions back."""
    _patches.restore()


def load_in_place(save: Path, step: int, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Load a checkpoint of this run into the running model; the run's counters of samples and steps stay.

    The random states come from the checkpoint as well, where the layout is the same.
    """
    import megatron.training.training as training
    from megatron.core.num_microbatches_calculator import update_num_microbatches
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args

    args = get_args()
    wanted = {"load": str(save), "ckpt_step": step, "pretrained_checkpoint": None, "finetune": False}
    wanted |= {"no_load_optim": False, "no_load_rng": False} | dict.fromkeys(_COUNTERS, 0)
    before = {name: getattr(args, name) for name in wanted}
    groups = getattr(unwrap_model(model)[0], "pg_collection", None) or SimpleNamespace()
    vars(args).update(wanted)
    try:
        training.load_checkpoint(
            model,
            optimizer,
            scheduler,
            tp_group=getattr(groups, "tp", None),
            pp_group=getattr(groups, "pp", None),
            dp_cp_group=getattr(groups, "dp_cp_gtp_remat", None),
            dp_group=getattr(groups, "dp", None),
            expt_dp_group=getattr(groups, "expt_dp", None),
        )
    finally:
        vars(args).update(before)
    update_num_microbatches(args.consumed_train_samples, consistency_check=False)
