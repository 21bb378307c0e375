"""One rank of a training run laid out in fake tensors: its bytes, without its memory.

Nothing is estimated by formula: Megatron builds this rank's part of the real model, its gradient buffers and its
optimizer, and its own schedule runs a step's forward and backward passes over them, recomputation included. All of it
in fake tensors (shape and dtype, no memory) on a process group of fake ranks. What is counted:

    weights      storages of the parameters
    gradients    storages of Megatron's gradient buffers
    optimizer    fp32 copies of the parameters and two moments, this rank's share
    activations  the most that is alive at once during the step beyond all of those (saved for backward, and
                 the temporaries of the moment)

What no tensor shows is not in it: the CUDA context, NCCL's buffers, workspaces of libraries, fragmentation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ledom.engine import cpu
from megatron_ledom.engine.arguments import set_megatron_arguments
from megatron_ledom.engine.fake_ranks import fake_ranks, rank_environment

MOMENT_BYTES = 2 * 4
"""Adam's two moments, fp32."""


@dataclass(frozen=True)
class RankBytes:
    """What one rank holds, in bytes.

    Attributes:
        weights: the parameters, in the dtype of the run.
        gradients: Megatron's gradient buffers.
        optimizer: main parameters and moments of this rank's share.
        activations: the peak of a step beyond the three others.
        num_parameters: of this rank.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    num_parameters: int

    @property
    def total(self) -> int:
        """All four together: the most that tensors take at once."""
        return self.weights + self.gradients + self.optimizer + self.activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while it is active: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note the storages of its results that were not there before."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return result

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count these tensors' storages as there before."""
        self._seen |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        num_bytes = storage.nbytes()
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.live -= num_bytes


def lay_out_rank(
    argv: Sequence[str], rank: int, world_size: int, *, for_cuda: bool, num_microbatches: int
) -> RankBytes:
    """Lay out one rank of the run that `argv` describes and count its bytes.

    Args:
        argv: flags of `tools/pretrain.py`, with `--mock-data` and a tokenizer that needs no files; `--run-dir` is set.
        rank: which rank, 0 to world_size - 1.
        world_size: ranks of the run.
        for_cuda: with the fused kernels that Megatron takes on CUDA with Transformer Engine (attention, SwiGLU, rotary
            positions); else exactly what the CPU engine runs.
        num_microbatches: of the step; more than the pipeline has stages change nothing.

    Returns:
        The rank's bytes.

    Raises:
        UsageError: Megatron refuses the flags.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with rank_environment(rank, world_size), fake_ranks(rank, world_size), _quietly() as scratch:
        args = set_megatron_arguments([*argv, "--device", "cpu", "--run-dir", scratch], "cpu")
        _settle(args, for_cuda=for_cuda)
        _start_groups(args)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model, optimizer = _build(args, for_cuda=for_cuda)
            return _count(args, model, optimizer, num_microbatches)


def _settle(args: argparse.Namespace, *, for_cuda: bool) -> None:
    """What a step in fake tensors cannot do (look at values) or need not (fill weights, overlap communication)."""
    args.perform_initialization = False
    args.use_gloo_process_groups = False
    args.check_for_nan_in_loss_and_grad = False
    args.overlap_grad_reduce = args.overlap_param_gather = args.align_param_gather = False
    args.curr_iteration = 0
    if for_cuda:
        args.bias_swiglu_fusion = bool(args.swiglu)


def _start_groups(args: argparse.Namespace) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(args.seed)


def _build(args: argparse.Namespace, *, for_cuda: bool) -> tuple[list[Any], Any]:
    """This rank's model chunks, wrapped for data parallelism, and its optimizer: by Megatron's own set-up."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.training import setup_model_and_optimizer

    from megatron_ledom.direction import Direction
    from megatron_ledom.model.attention import KERNELS, MEGATRON, AttentionPlan, plan_attention
    from megatron_ledom.model.cross_entropy import vocab_parallel_cross_entropy
    from megatron_ledom.model.fused_stand_ins import put_fused
    from megatron_ledom.model.layers import LayerPlan, plan_layers
    from megatron_ledom.model.spec import layer_spec_builder

    plan, layers = plan_attention(args, "cpu"), plan_layers(args, "cpu")
    if for_cuda:  # whatever this machine has
        kind = MEGATRON if args.attention == MEGATRON else KERNELS
        plan = AttentionPlan(kind, Direction(args.direction), "fused attention")
        layers = LayerPlan(MEGATRON, "stand-ins take their places")
    if layers.is_ours:
        cpu.use_cross_entropy(vocab_parallel_cross_entropy)
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = layer_spec_builder(plan, layers)
    model, optimizer, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model if for_cuda else ():
        put_fused(chunk)
    return model, optimizer


def _count(args: argparse.Namespace, model: list[Any], optimizer: Any, num_microbatches: int) -> RankBytes:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ledom.train.pretrain import build_forward_step

    static = static_bytes(model, optimizer)
    step = build_forward_step()
    for chunk in model:
        chunk.train()
    counter = LiveBytes()
    for chunk in model:
        counter.ignore(tensor for p in chunk.parameters() for tensor in (p, getattr(p, "main_grad", p)))
    with counter:
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[_batches(args) for _ in model] if len(model) > 1 else _batches(args),
            model=model,
            num_microbatches=num_microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.seq_length,
            forward_only=False,
        )
    return RankBytes(**static, activations=counter.peak)


def static_bytes(model: list[Any], optimizer: Any) -> dict[str, int]:
    """Count what a rank holds between steps: weights, gradients, optimizer (as it is once it has stepped), parameters.

    Works on fake and on real tensors alike; a storage that two of them share is counted once, with the first.
    """
    seen: set[int] = set()

    def storages(tensors: Iterable[torch.Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
        return total

    parameters = [p for chunk in model for p in chunk.parameters()]
    weights = storages(parameters)
    gradients = storages(p.main_grad for p in parameters if getattr(p, "main_grad", None) is not None)
    main = [p for group in optimizer.param_groups for p in group["params"]]
    moments = sum(p.numel() for p in main) * MOMENT_BYTES
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": storages(main) + moments,
        "num_parameters": sum(p.numel() for p in parameters),
    }


def _batches(args: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    shape = (args.micro_batch_size, args.seq_length)
    while True:
        whole = {name: torch.zeros(shape, dtype=torch.int64) for name in ("tokens", "labels", "position_ids")}
        yield whole | {"loss_mask": torch.ones(shape)}


@contextmanager
def _quietly() -> Iterator[str]:
    """Megatron's start prints a thousand lines; what goes wrong comes as an exception. Gives a run directory."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with tempfile.TemporaryDirectory() as scratch:
                yield scratch
    finally:
        logging.disable(disabled)
