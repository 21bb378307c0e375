"""What a run tells while it goes on: metrics.jsonl, events, scalars for TensorBoard and W&B, a line for the terminal.

Megatron logs the loss, the gradient norm, the learning rate and memory to TensorBoard (and W&B, with
`--wandb-project`) by itself. This adds what it leaves out, every `--log-interval` steps, on the last rank, which has
the loss and Megatron's writers:

    tokens-per-second   of all ranks together, evaluations and saves not counted
    mfu                 share of the devices' peak, where the peak is known
    skipped-steps       steps of this launch that changed no weights
    memory-peak-bytes   of this rank
    data-epochs/NAME    how often each source has been read so far

RUN/metrics.jsonl has the same numbers, and loss, gradient norm and learning rate, one JSON object a line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_ledom.engine.watching import flops_of_step, peak_flops, samples_of_step
from megatron_ledom.log import format_seconds
from megatron_ledom.train import events
from megatron_ledom.train.metrics import METRICS_FILE, TRAIN_LOSS

if TYPE_CHECKING:
    from megatron_ledom.data.blend import SourcePlan


class Watch:
    """Writes down what `engine.watching` reports; a context that also notes the end of the launch.

    Args:
        args: Megatron's namespace with ours, validated.
        plans: what the run reads of each source from its first step to its last.
        num_samples: samples of the whole run.
        start: `steps` and `samples` that the run has behind it.
        started: when this process did, in seconds since 1970.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        plans: list[SourcePlan],
        num_samples: int,
        start: Mapping[str, int],
        started: float,
    ) -> None:
        self._args, self._run = args, Path(args.run_dir)
        self._epochs = {plan.source.prefix: plan.epochs / max(num_samples, 1) for plan in plans}  # a sample
        self._is_writer = args.rank == args.world_size - 1
        self._start, self._step = start["steps"], start["steps"]
        self._num_steps, self._logged_time = 0, time.monotonic()  # steps made since the last line
        self._paused_s = 0.0  # spent in evaluations and saves since the last line
        self._first: tuple[int, float] | None = None
        self._printed = time.monotonic()
        self._skipped, self._validation, self._started = 0, "", started

    def __enter__(self) -> Watch:
        args = self._args
        tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        layout = f"TP {tensor} x PP {pipeline} x DP {args.data_parallel_size}"
        fields = {"world_size": args.world_size, "layout": layout, "precision": args.precision}
        fields["started"] = round(self._started, 3)
        if self._start:
            self.record(events.RESUME, self._start, f"from the checkpoint of step {self._start}, {layout}", fields)
        else:
            self.record(events.LAUNCH, 0, layout, fields)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        has_ended_well = kind is None or (isinstance(error, SystemExit) and not error.code)
        if has_ended_well:
            self.record(events.END, self._step, f"after step {self._step}", {})
        else:
            self.record(events.FAILED, self._step, f"{kind.__name__ if kind else ''}: {error}", {})

    def record(self, kind: str, step: int, text: str, fields: dict[str, Any]) -> None:
        """Write an event, on the rank that writes."""
        if self._is_writer:
            events.record_event(self._run, kind, step, text, fields)

    def begins(self) -> None:
        """See `Watcher`."""
        self._logged_time = time.monotonic()
        seconds = time.time() - self._started
        self.record(events.BEGIN, self._step, f"ready after {format_seconds(seconds)}", {"seconds": round(seconds, 3)})

    def step(
        self, iteration: int, losses: dict[str, Any], learning_rate: float | None, skipped: int, grad_norm: float | None
    ) -> None:
        """See `Watcher`."""
        for number in range(self._step + 1, iteration):
            self._note_skipped(number, "passed over, as --iterations-to-skip says")
        if skipped:
            self._note_skipped(iteration, "its update was refused")
        self._step, self._num_steps = iteration, self._num_steps + 1
        if self._first is None:
            self._first = (iteration, time.monotonic())
        if iteration % self._args.log_interval or not self._is_writer:
            return
        line = self._measure(iteration)
        line |= {"learning_rate": learning_rate, "grad_norm": grad_norm}
        if TRAIN_LOSS in losses:
            line["loss"] = _scalar(losses[TRAIN_LOSS])
        self._write(iteration, line)
        if time.monotonic() - self._printed >= self._args.summary_every:
            self._printed = time.monotonic()
            print(self._summary(line), file=sys.stderr, flush=True)

    def evaluated(self, iteration: int, seconds: float, losses: list[dict[str, Any]]) -> None:
        """See `Watcher`."""
        self._paused_s += seconds
        found = [_scalar(each[TRAIN_LOSS]) for each in losses if TRAIN_LOSS in each]
        text = ", ".join(f"loss {loss:.4f}" for loss in found) or "no loss"
        self._validation = f", validation {found[0]:.3f}" if found else ""
        fields: dict[str, Any] = {"loss": found[0] if found else None, "seconds": round(seconds, 3)}
        if len(found) > 1:
            fields["losses"] = found
        self.record(events.EVALUATION, iteration, text, fields)

    def saved(self, iteration: int, seconds: float) -> None:
        """See `Watcher`."""
        self._paused_s += seconds
        self.record(events.SAVE, iteration, f"took {format_seconds(seconds)}", {"seconds": round(seconds, 3)})

    def _note_skipped(self, step: int, text: str) -> None:
        self._skipped += 1
        self.record(events.SKIPPED, step, text, {"skipped_in_launch": self._skipped})

    def _measure(self, iteration: int) -> dict[str, Any]:
        """The numbers of the steps since the last line."""
        import torch

        args, now = self._args, time.monotonic()
        num_steps = self._num_steps
        step_s = max(1e-9, now - self._logged_time - self._paused_s) / num_steps
        self._num_steps, self._logged_time, self._paused_s = 0, now, 0.0
        tokens = samples_of_step() * args.seq_length
        flops, peak = flops_of_step(args) / step_s / args.world_size, peak_flops(args)
        samples = args.consumed_train_samples
        return {
            "time": round(time.time(), 3),
            "step": iteration,
            "num_steps": num_steps,
            "samples": samples,
            "tokens": samples * args.seq_length,
            "step_s": round(step_s, 6),
            "tokens_per_s": round(tokens / step_s, 3),
            "tflops_per_device": round(flops / 1e12, 6),
            "mfu": None if peak is None else round(flops / peak, 6),
            "skipped_steps": self._skipped,
            "memory_peak_bytes": int(torch.cuda.max_memory_allocated()),
            "data_epochs": {prefix: round(each * samples, 6) for prefix, each in self._epochs.items()},
        }

    def _write(self, iteration: int, line: dict[str, Any]) -> None:
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        events.append_line(self._run / METRICS_FILE, line)
        scalars = {
            "tokens-per-second": line["tokens_per_s"],
            "mfu": line["mfu"],
            "skipped-steps": line["skipped_steps"],
            "memory-peak-bytes": line["memory_peak_bytes"],
        }
        scalars |= {f"data-epochs/{Path(prefix).name}": value for prefix, value in line["data_epochs"].items()}
        known = {tag: value for tag, value in scalars.items() if value is not None}
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer:
            for tag, value in known.items():
                writer.add_scalar(tag, value, iteration)
        if wandb:
            wandb.log(known, iteration)

    def _summary(self, line: dict[str, Any]) -> str:
        """The line for the terminal."""
        args, step = self._args, line["step"]
        text = f"step {step:,}"
        if args.train_iters:
            text += f"/{args.train_iters:,} ({100 * step / args.train_iters:.0f} %)"
        if line.get("loss") is not None:
            text += f", loss {line['loss']:.3f}"
        text += f"{self._validation}, {line['tokens_per_s']:,.0f} tokens/s"
        if line["mfu"] is not None:
            text += f", MFU {100 * line['mfu']:.1f} %"
        if self._skipped:
            text += f", {self._skipped} skipped"
        if line["data_epochs"]:
            text += f", {max(line['data_epochs'].values()):.2f} epochs"
        assert self._first is not None
        first_step, first_time = self._first
        if step > first_step and args.train_iters:
            each_s = (time.monotonic() - first_time) / (step - first_step)  # with evaluations and saves
            text += f", {format_seconds(each_s * (args.train_iters - step))} left"
        return text


def _scalar(value: Any) -> float:
    return float(value.float().sum())
