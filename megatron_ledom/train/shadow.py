"""The BF16 shadow of a run in FP8: every N steps one micro-batch is computed in both, and the losses are compared.

    step 400   loss in FP8 3.4127   in BF16 3.4125   gap +0.0002    within --shadow-tolerance

The shadow is a forward pass without gradients, of the same weights on the same tokens, with the FP8 recipe off: it
changes no weight, no history and no random state. A gap beyond the tolerance is a breach: said, or the end of the run,
or the end of FP8 (`--shadow-policy`). A run that went on in BF16 also resumes in BF16: the checkpoint's arguments say
so. Where the recipe is emulated, the layer whose product is farthest from BF16 is named.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron_ledom.engine.precision import STOP, SWITCH
from megatron_ledom.errors import PrecisionError
from megatron_ledom.log import get_logger

if TYPE_CHECKING:
    import torch

    from megatron_ledom.model.precision import Emulation

SWITCHED = "precision_switched_at"
"""The argument, stored in every checkpoint, that says from which step on a run has been in BF16."""

Record = Callable[[str, int, str, dict[str, Any]], None]
"""Takes an event: kind, step, text, fields."""


class Shadow:
    """Compares FP8 with BF16 while a run goes on.

    Args:
        args: Megatron's namespace with ours.
        emulation: of the FP8 recipe; None where Transformer Engine computes it.
        record: is told of every comparison and breach, on every rank.
        resumed: the arguments of the checkpoint that the run continues, or None.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        emulation: Emulation | None,
        record: Record,
        resumed: argparse.Namespace | None = None,
    ) -> None:
        self._args, self._emulation, self._record = args, emulation, record
        self._is_settled = False
        setattr(args, SWITCHED, getattr(resumed, SWITCHED, None))  # in every checkpoint from now on
        self._last = -1  # the iteration that was looked at last
        self._bf16_loss = math.nan

    def before(self, model: Any, batch_loss: Callable[[], torch.Tensor]) -> bool:
        """Compute the shadow's loss, where one is due.

        Args:
            model: this rank's network.
            batch_loss: runs the micro-batch and gives its loss, a scalar.

        Returns:
            Whether `after` is to be called with the loss in FP8.
        """
        args = self._args
        iteration = args.curr_iteration if model.training else -1  # Megatron sets it when training begins
        if self.is_over and not self._is_settled:
            self._is_settled = True
            turn_off(model, self._emulation)
            get_logger(__name__).info("this run has been in BF16 since step %d", getattr(args, SWITCHED))
        is_due = args.shadow_every and not self.is_over and iteration % args.shadow_every == 0
        if not (model.training and is_due and iteration != self._last):
            return False
        self._last = iteration
        self._bf16_loss = float(self._in_bf16(model, batch_loss))
        if self._emulation is not None:
            self._emulation.gaps.clear()
            self._emulation.is_compared = True
        return True

    def after(self, model: Any, loss: torch.Tensor) -> None:
        """Compare with the loss in FP8 and do what the policy says; all ranks come to the same verdict.

        Raises:
            PrecisionError: a breach, with the policy "stop".
        """
        args, emulation = self._args, self._emulation
        if emulation is not None:
            emulation.is_compared = False
        fp8, bf16, worst_gap = _mean_over_ranks(float(loss), self._bf16_loss, max(self._gaps(), default=0.0))
        gap, step = fp8 - bf16, args.curr_iteration + 1  # Megatron logs the step under way by this number
        fields = {"fp8_loss": fp8, "bf16_loss": bf16, "gap": gap, "tolerance": args.shadow_tolerance}
        text = f"loss in FP8 {fp8:.4f}, in BF16 {bf16:.4f}: gap {gap:+.4f} nats a token"
        if emulation is not None and emulation.gaps:
            layer = max(emulation.gaps, key=lambda module: emulation.gaps[module])
            fields |= {"worst_layer": _name_of(model, layer), "worst_layer_gap": worst_gap}
            text += f"; farthest product: {fields['worst_layer']}, off by {worst_gap:.1%}"
        is_breach = not abs(gap) <= args.shadow_tolerance  # also of a gap that is not a number
        self._record("shadow breach" if is_breach else "shadow", step, text, fields)
        if not is_breach:
            get_logger(__name__).info("shadow check at step %d: %s", step, text)
            return
        self._act(model, step, text)

    @property
    def is_over(self) -> bool:
        """Whether the run computes in BF16 by now."""
        return getattr(self._args, SWITCHED, None) is not None

    def _gaps(self) -> list[float]:
        return [] if self._emulation is None else list(self._emulation.gaps.values())

    def _act(self, model: Any, step: int, text: str) -> None:
        logger, args = get_logger(__name__), self._args
        logger.warning(
            "warning: shadow check at step %d: %s; more than --shadow-tolerance %g", step, text, args.shadow_tolerance
        )
        if args.shadow_policy == STOP:
            raise PrecisionError(
                f"stopped at step {step} by --shadow-policy stop: {text}. Go on from the last checkpoint with "
                "--precision bf16, or with another recipe"
            )
        if args.shadow_policy == SWITCH:
            setattr(args, SWITCHED, step)
            turn_off(model, self._emulation)
            logger.warning("warning: the run goes on in BF16")
            self._record("precision switch", step, "goes on in BF16", {})

    def _in_bf16(self, model: Any, batch_loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        import torch

        with torch.no_grad(), _same_random_numbers(), bf16_arithmetic(model, self._emulation):
            return batch_loss()


def turn_off(model: Any, emulation: Emulation | None) -> None:
    """Let the network compute in BF16 from here on."""
    if emulation is not None:
        emulation.is_on = False
    for config in _configs(model):
        config.fp8 = None


@contextmanager
def bf16_arithmetic(model: Any, emulation: Emulation | None) -> Iterator[None]:
    """Let the network compute in BF16 in this block; Megatron opens its FP8 context where `config.fp8` is set."""
    was_on = emulation is not None and emulation.is_on
    configs = [(config, config.fp8) for config in _configs(model)]
    turn_off(model, emulation)
    try:
        yield
    finally:
        if emulation is not None:
            emulation.is_on = was_on
        for config, fp8 in configs:
            config.fp8 = fp8


def _configs(model: Any) -> list[Any]:
    """Every configuration object of the network that has an FP8 setting, each once."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "fp8")}
    return list(found.values())


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leave every random state as it was: dropout in the run is what it would be without a shadow."""
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker, cpu = get_cuda_rng_tracker(), torch.get_rng_state()
    device, states = torch.cuda.get_rng_state(), tracker.get_states()
    try:
        yield
    finally:
        tracker.set_states(states)
        torch.cuda.set_rng_state(device)
        torch.set_rng_state(cpu)


def _mean_over_ranks(fp8: float, bf16: float, worst: float) -> tuple[float, float, float]:
    """The means of the losses over all ranks, and the largest gap of a layer."""
    import torch

    losses = torch.tensor([fp8, bf16], dtype=torch.float64, device=torch.cuda.current_device())
    largest = torch.tensor([worst], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(losses)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    mean = (losses / torch.distributed.get_world_size()).tolist()
    return mean[0], mean[1], float(largest)


def _name_of(model: Any, module: torch.nn.Module) -> str:
    names = {id(m): name for name, m in model.named_modules()}
    return names[id(module)].removeprefix("module.").removeprefix("module.")
