"""tools/check_layout.py with a fault planted in the ranks of the layout: a script for test_check_layout.

    python planted_bugs.py OUT.json

Every case runs the tool's own `main`. The fault is patched into the forked ranks, after the fork and only where there
are several of them; neither the tool nor the package knows of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ledom.cluster import check_layout
from megatron_ledom.testing import REPOSITORY
from megatron_ledom.train import pretrain

sys.path.insert(0, str(REPOSITORY / "tools"))
import check_layout as tool

TENSOR, PIPELINE = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")


def split_qkv_wrongly() -> None:
    """Under tensor parallelism each rank takes its query heads in another order than it cut the weights."""
    import torch
    from megatron.core.transformer.attention import SelfAttention

    original = SelfAttention.get_query_key_value_tensors

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        query, key, value = original(self, *args, **kwargs)
        return torch.roll(query, 1, dims=2), key, value

    SelfAttention.get_query_key_value_tensors = wrong


def forget_gradient_reduction() -> None:
    """Data-parallel ranks keep the gradients of their own samples."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    _ParamAndGradBucketGroup.start_grad_sync = lambda self, *args, **kwargs: None
    _ParamAndGradBucketGroup.finish_grad_sync = lambda self, *args, **kwargs: None


def drop_a_microbatch() -> None:
    """The pipeline's schedule runs one micro-batch less than the step has."""
    from megatron.core.pipeline_parallel import schedules

    original = schedules.forward_backward_pipelining_without_interleaving

    def one_less(*, num_microbatches: int, **kwargs: Any) -> Any:
        return original(num_microbatches=num_microbatches - 1, **kwargs)

    schedules.forward_backward_pipelining_without_interleaving = one_less


CASES: dict[str, tuple[int, tuple[str, ...], Callable[[], None] | None]] = {
    # The first is checked as a user does it; the others in its twin, against the run of one rank that it has made.
    "right: TP2 PP2, sequence parallelism": (4, (*TENSOR, *PIPELINE, "--sequence-parallel"), None),
    "right: DP2": (2, (), None),
    "QKV split": (2, TENSOR, split_qkv_wrongly),
    "gradient reduction": (2, (), forget_gradient_reduction),
    "dropped micro-batch": (2, PIPELINE, drop_a_microbatch),
}


class OneReference:
    """Lets the tool run one rank once: starting Python's ranks is what these tests spend their time on."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._reduce, self._run = folder, check_layout.reduce_run, check_layout.run_reference
        self._reference: Any = None
        self._twin: Any = None

    def reduce_run(self, argv: Sequence[str], world_size: int, max_ranks: int) -> Any:
        twin, one = self._reduce(argv, world_size, max_ranks)
        if self._twin is None:
            self._twin = twin
        return dataclasses.replace(self._twin, layout=twin.layout, num_ranks=world_size, describes=twin.describes), one

    def run_reference(self, twin: Any, one: Sequence[str], folder: Path, timeout_s: float) -> Any:
        if self._reference is None:
            self._reference = self._run(twin, one, self._folder, timeout_s)
        return self._reference


def run_case(num_gpus: int, flags: Sequence[str], plant: Callable[[], None] | None) -> dict[str, Any]:
    """Run the tool and return its status and output."""
    train = pretrain.main

    def train_with_fault(argv: Sequence[str]) -> int:
        if plant is not None and int(os.environ["WORLD_SIZE"]) > 1:
            plant()
        return train(argv)

    pretrain.main = train_with_fault
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            status = tool.main(["--preset", "tiny", "--gpus-per-node", str(num_gpus), *flags])
    finally:
        pretrain.main = train
    return {"status": status, "output": printed.getvalue()}


def main(out: Path) -> None:
    """Run every case."""
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        reference = OneReference(Path(scratch))
        check_layout.reduce_run, check_layout.run_reference = reference.reduce_run, reference.run_reference
        for name, case in CASES.items():
            results[name] = run_case(*case)
            print(name, results[name], flush=True)
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
