"""Megatron's own `GPTModel` from a checkpoint, whole, in one process on the CPU.

What training computes, for comparisons: the layout of the run (TP, PP, fused kernels,
precision) is replaced by one rank in fp32, the shape and the weights are the
checkpoint's, and Megatron's `dist_checkpointing` does the loading, so that nothing here
depends on this package's own reader of tensors. It needs the memory of the whole model
in fp32; where that is too much, `streamed_model` holds one layer at a time. It activates
the CPU engine in the calling process for good: call it in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from megatron_ledom.checkpoint.unpickle import SavedValue
from megatron_ledom.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_ledom.checkpoint.reader import Checkpoint

ONE_RANK: dict[str, Any] = {
    # The layout: everything on one rank.
    "world_size": 1,
    "rank": 0,
    "local_rank": 0,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "overlap_p2p_comm": False,
    "tp_comm_overlap": False,
    "data_parallel_size": 1,
    # Precision: `build_megatron_model` chooses one.
    "fp8": None,
    "fp4": None,
    # What only training needs.
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "distribute_saved_activations": False,
    "cpu_offloading_num_layers": 0,
    "cuda_graph_impl": "none",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
"""Megatron arguments that are replaced; none of them changes the function that the weights compute."""


def load_megatron_model(checkpoint: Checkpoint) -> Any:
    """Build the checkpoint's model and load its weights.

    Args:
        checkpoint: finished, of any layout and dtype.

    Returns:
        A `GPTModel` with fp32 parameters in evaluation mode; `model(ids, positions, None)` gives
        logits [B, S, padded vocabulary].

    Raises:
        CheckpointError: Megatron cannot load the weights into the model that the arguments describe.
    """
    start_one_rank()
    model = build_megatron_model(checkpoint.args)
    with refuse_what_megatron_cannot_load(checkpoint):
        from megatron.core import dist_checkpointing

        state = {"model": model.sharded_state_dict(metadata=sharding_metadata(checkpoint))}
        model.load_state_dict(dist_checkpointing.load(state, str(checkpoint.folder))["model"])
    return model.eval()


def sharding_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `sharded_state_dict` must know: whether the checkpoint stacks its layers under one key each."""
    has_key_per_layer = any(re.match(r"decoder\.layers\.\d+\.", name) for name in checkpoint.tensors)
    return {"singleton_local_shards": False, "non_homogeneous_layers": has_key_per_layer}


@contextmanager
def refuse_what_megatron_cannot_load(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn the errors of Megatron's and torch's loaders into a refusal that names the checkpoint.

    Raises:
        CheckpointError: the block raised one of them.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (CheckpointingException, CheckpointException, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.folder}: Megatron cannot load its weights: {error}") from error


def build_megatron_model(args: argparse.Namespace, *, dtype: str = "float32", on_meta: bool = False) -> Any:
    """Build a `GPTModel` of the shape in `args` on one CPU rank, with fresh weights or none.

    Args:
        args: Megatron's arguments, live or as read from a checkpoint; not changed.
        dtype: in which it computes: "float32", "bfloat16" or "float16".
        on_meta: leave every parameter on the meta device: shape and dtype, no memory.
    """
    start_one_rank()
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_ledom.model.spec import build_layer_spec

    changed = _one_rank_arguments(args)
    changed.params_dtype = getattr(torch, dtype)
    changed.bf16, changed.fp16 = dtype == "bfloat16", dtype == "float16"
    changed.perform_initialization = not on_meta
    config = gpt_config_from_args(changed)
    config.transformer_layer_spec = build_layer_spec
    config.finalize()
    with torch.device("meta") if on_meta else nullcontext():
        model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    return model.to(changed.params_dtype)  # Megatron's Float16Module does so too: norms are made in fp32


def start_one_rank() -> None:
    """Activate the CPU engine and a process group of one; a second call does nothing."""
    from megatron_ledom.engine import cpu

    cpu.install()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1234)


def _one_rank_arguments(args: argparse.Namespace) -> argparse.Namespace:
    from megatron_ledom.engine.device import CPU_DEFAULTS

    changed = copy.copy(args)
    for name, value in vars(args).items():
        if isinstance(value, SavedValue):
            setattr(changed, name, _live_value(name, value))
    for name, value in (ONE_RANK | CPU_DEFAULTS).items():
        setattr(changed, name, value)
    return changed


def _live_value(name: str, saved: SavedValue) -> Any:
    """Turn the note of an enum member back into the member; only of classes that Megatron itself calls safe."""
    import enum

    from megatron.core.safe_globals import SAFE_GLOBALS

    known = {f"{c.__module__}.{c.__qualname__}": c for c in SAFE_GLOBALS if isinstance(c, enum.EnumMeta)}
    kind = known.get(saved.type_name)
    if kind is None:
        return None  # a path or a record: nothing that a model is built from
    try:
        return kind(*saved.arguments)
    except ValueError as error:
        raise CheckpointError(f"argument {name} of the checkpoint is {saved}, which this Megatron lacks") from error
