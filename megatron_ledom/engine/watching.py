"""Where a run can be watched: our code is called after Megatron has logged a step, evaluated, or saved.

Megatron has no hook for this. Five of its functions are wrapped while a run lasts, on every device; what they do and
return is unchanged. It owns the wrapping, the flags, and what a step costs; what is written is `train.watch`'s.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from megatron_ledom.engine.patching import Patches

PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    # Dense tensor-core peaks in BF16 and in FP8, from NVIDIA's data sheets (without sparsity).
    "H100 PCIe": (756.0, 1513.0),
    "H100 NVL": (835.0, 1671.0),
    "H100": (989.4, 1978.9),
    "H200": (989.4, 1978.9),
    "A100": (312.0, 312.0),
    "L40S": (362.0, 733.0),
}


class Watcher(Protocol):
    """What is called; every method on every rank."""

    def begins(self) -> None:
        """Model, optimizer and data are there; the first step comes next."""

    def step(
        self, iteration: int, losses: dict[str, Any], learning_rate: float | None, skipped: int, grad_norm: float | None
    ) -> None:
        """A step is done and logged; `losses` holds scalar tensors, on the last pipeline stage only."""

    def evaluated(self, iteration: int, seconds: float, losses: list[dict[str, Any]]) -> None:
        """An evaluation is done; `losses` holds scalar tensors for each validation set, on the last pipeline stage."""

    def saved(self, iteration: int, seconds: float) -> None:
        """Megatron's save has returned."""


def add_watch_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of watching."""
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="T",
        help="peak of one device in TFLOP/s, for the MFU; default: that of the GPU's name, none on the CPU",
    )
    group.add_argument(
        "--summary-every",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="print a line with loss, rate and time left this often (default: 30)",
    )


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` while the block runs."""
    import megatron.training.training as training

    evaluate, print_results = training.evaluate, training.evaluate_and_print_results
    losses: list[dict[str, Any]] = []

    @functools.wraps(evaluate)
    def kept(*args: Any, **kwargs: Any) -> Any:
        answer = evaluate(*args, **kwargs)
        losses.append(dict(answer[0] or {}))
        return answer

    def evaluated(iteration: int, seconds: float) -> None:
        watcher.evaluated(iteration, seconds, list(losses))
        losses.clear()

    train = training.train

    @functools.wraps(train)
    def announced(*args: Any, **kwargs: Any) -> Any:
        watcher.begins()
        return train(*args, **kwargs)

    patches = Patches()
    patches.replace(training, "train", announced)
    patches.replace(training, "training_log", _after_step(training.training_log, watcher))
    patches.replace(training, "evaluate", kept)  # the losses reach only the log line otherwise
    patches.replace(training, "evaluate_and_print_results", _timed(print_results, evaluated, 4))
    patches.replace(training, "save_checkpoint_and_time", _timed(training.save_checkpoint_and_time, watcher.saved, 0))
    try:
        yield
    finally:
        patches.restore()


def _after_step(training_log: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    @functools.wraps(training_log)
    def logged(*args: Any, **kwargs: Any) -> Any:
        losses, _, learning_rate, iteration, _, _, skipped, grad_norm = args[:8]
        answer = training_log(*args, **kwargs)
        watcher.step(iteration, losses, learning_rate, int(skipped), None if grad_norm is None else float(grad_norm))
        return answer

    return logged


def _timed(function: Callable[..., Any], report: Callable[[int, float], None], position: int) -> Callable[..., Any]:
    """Wrap a function whose argument at `position` is the iteration."""

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        answer = function(*args, **kwargs)
        iteration = kwargs["iteration"] if "iteration" in kwargs else args[position]
        report(int(iteration), time.monotonic() - started)
        return answer

    return timed


def samples_of_step() -> int:
    """Samples of the step under way; fewer than `--global-batch-size` while that is ramped up."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    return int(get_current_global_batch_size())


def flops_of_step(args: argparse.Namespace) -> float:
    """Floating-point operations of one step over all ranks, by Megatron's own formula."""
    from megatron.training.training import num_floating_point_operations

    return float(num_floating_point_operations(args, samples_of_step()))


def peak_flops(args: argparse.Namespace) -> float | None:
    """The peak of one device in FLOP/s, in the run's precision; None where it is not known."""
    if args.peak_tflops:
        return float(args.peak_tflops) * 1e12
    if args.device != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name()
    found = next((peaks for part, peaks in PEAK_TFLOPS.items() if all(word in name for word in part.split())), None)
    return None if found is None else found[args.fp8 is not None] * 1e12
