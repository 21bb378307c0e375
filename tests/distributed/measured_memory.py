"""Bytes of real training ranks beside those that a plan lays out, for several layouts: a script for test_plan_memory.

Real: Megatron's pretrain() in forked gloo ranks, second step. Weights, gradients and the optimizer's state are summed
over the tensors that exist. Activations are the most that real storages take at once during the forward and backward
passes. Beside them stands the peak of torch's CPU allocator by its own events (`profile_memory`), which knows nothing
of that count; with several ranks it is too large, since it misses what gloo's threads free.

    python measured_memory.py OUT.json
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_ledom.cluster.forked_ranks import run_ranks
from megatron_ledom.train.laid_out import LiveBytes, lay_out_rank
from megatron_ledom.train.preload import preload

MODEL = [
    *("--preset", "tiny", "--num-layers", "8", "--hidden-size", "64", "--ffn-hidden-size", "128"),
    *("--seq-length", "256", "--global-batch-size", "4", "--micro-batch-size", "1", "--train-iters", "4"),
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511"),
    *("--lr-warmup-fraction", "0", "--eval-iters", "1"),
]
TENSOR, PIPELINE = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "one rank, micro-batch 2, MLP recomputed": (
        1,
        ("--micro-batch-size", "2", "--recompute-granularity", "selective", "--recompute-modules", "mlp"),
    ),
    "TP2": (2, (TENSOR, "2")),
    "TP2, sequence parallelism, all recomputed": (2, (TENSOR, "2", "--sequence-parallel", *FULL)),
    "PP2": (2, (PIPELINE, "2")),
    "DP2, distributed optimizer": (2, ()),
    "DP2, whole optimizer": (2, ("--no-use-distributed-optimizer", "--no-dist-ckpt-optim-fully-reshardable")),
    "TP2 PP2, sequence parallelism": (4, (TENSOR, "2", PIPELINE, "2", "--sequence-parallel")),
}
MEASURED_STEP = 2
H200_MODEL = [
    *("--preset", "2b", "--global-batch-size", "8"),
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "1023"),
]
SHORT = ("--seq-length", "2048", "--max-position-embeddings", "2048", "--micro-batch-size", "2")
H200 = {
    # Runs on an H200 without Transformer Engine (docs/planning.md), which nothing here was fitted to.
    "H200, 2048, local attention": (*SHORT, "--attention", "megatron"),
    "H200, 2048, fused attention": SHORT,
    "H200, 8192, fused attention": (),
}


def train_and_measure(argv: list[str], out: Path) -> None:
    """Be a rank of a training run, measure its second step, and end."""
    import megatron.training.training as training

    from megatron_ledom.train.pretrain import main

    original, calls = training.train_step, itertools.count(1)

    def train_step(
        step: Any, data: Any, model: Any, optimizer: Any, scheduler: Any, config: Any, schedule: Any, **kw: Any
    ) -> Any:
        if next(calls) < MEASURED_STEP:
            return original(step, data, model, optimizer, scheduler, config, schedule, **kw)
        peaks: dict[str, int] = {}
        counter = LiveBytes()
        counter.ignore(t for chunk in model for p in chunk.parameters() for t in (p, p.main_grad))
        watched = functools.partial(profiled, schedule, counter, peaks)
        original(step, data, model, optimizer, scheduler, config, watched, **kw)
        found = existing_bytes(model, optimizer) | peaks
        (out / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        training.torch.distributed.barrier()
        raise SystemExit(0)

    training.train_step = train_step
    main(argv)
    assert next(calls) > MEASURED_STEP, "the run ended before the step that is measured"


def profiled(schedule: Any, counter: LiveBytes, peaks: dict[str, int], **kwargs: Any) -> Any:
    """Run Megatron's schedule and note the most that was alive in it, by storages and by the allocator."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, counter:
        result = schedule(**kwargs)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    assert len(events) > 500, f"only {len(events)} allocations seen"
    peaks |= {
        "activations": counter.peak,
        "allocator": max(itertools.accumulate(event.nbytes() for event in events)),
    }
    return result


def existing_bytes(model: Any, optimizer: Any) -> dict[str, int]:
    """Bytes of the weights, gradient buffers and optimizer state that exist."""
    storages: dict[int, int] = {}

    def add(tensors: Any) -> int:
        new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        new = {key: size for key, size in new.items() if key not in storages}
        storages.update(new)
        return sum(new.values())

    parameters = [p for chunk in model for p in chunk.parameters()]
    weights, gradients = add(parameters), add(p.main_grad for p in parameters)
    inner = [each.optimizer for each in getattr(optimizer, "chained_optimizers", [optimizer])]
    main = add(p for each in inner for group in each.param_groups for p in group["params"])
    state = sum(
        value.numel() * value.element_size()
        for each in inner
        for values in each.state.values()
        for value in values.values()
        if hasattr(value, "numel") and value.numel() > 1
    )
    return {"weights": weights, "gradients": gradients, "optimizer": main + state}


def measure(num_ranks: int, flags: tuple[str, ...]) -> dict[int, dict[str, int]]:
    """Train in a layout and return the bytes of its first and its last rank."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        argv = [*MODEL, *flags, "--device", "cpu", "--run-dir", str(folder / "run")]
        run_ranks(num_ranks, functools.partial(train_and_measure, argv, folder), folder / "logs", timeout_s=400)
        return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in sorted({0, num_ranks - 1})}


def main(out: Path) -> None:
    """Measure and lay out every layout; write {layout: [{"rank", "measured", "planned"}, ...]}."""
    preload()
    measured = {name: measure(*case) for name, case in LAYOUTS.items()}  # first: autograd's threads forbid forks later
    table: dict[str, list[dict[str, Any]]] = {}
    for name, (num_ranks, flags) in LAYOUTS.items():
        table[name] = []
        for rank, found in measured[name].items():
            laid = lay_out_rank([*MODEL, *flags], rank, num_ranks, for_cuda=False, num_microbatches=4)
            planned = {part: getattr(laid, part) for part in found if part != "allocator"}
            table[name].append({"rank": rank, "measured": found, "planned": planned})
            print(name, table[name][-1], flush=True)
    for name, flags in H200.items():
        laid = lay_out_rank([*H200_MODEL, *flags], 0, 1, for_cuda=True, num_microbatches=1)
        table[name] = [dataclasses.asdict(laid)]
        print(name, table[name], flush=True)
    out.write_text(json.dumps(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
