"""What a checkpoint holds, as plain values: for people, for JSON, and to compare two of them.

It reads the index and the arguments, no tensor. What the tensors mean to a model is
`convert.names`' business; here they are weights, optimizer state, or something else.
"""

from __future__ import annotations

import argparse
import json
import math
import types
from pathlib import Path
from typing import Any

from megatron_ledom.checkpoint.integrity import read_checksums
from megatron_ledom.checkpoint.locate import SEAL
from megatron_ledom.checkpoint.reader import Checkpoint
from megatron_ledom.checkpoint.unpickle import SavedValue
from megatron_ledom.errors import CheckpointError

LAYOUT = (
    *("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "data_parallel_size", "context_parallel_size", "sequence_parallel"),
    *("use_distributed_optimizer", "dist_ckpt_optim_fully_reshardable"),
)
MODEL = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("group_query_attention", "padded_vocab_size", "vocab_size", "max_position_embeddings", "seq_length"),
    *("position_embedding_type", "rotary_base", "use_rope_scaling", "rope_scaling_factor", "rotary_percent"),
    *("rotary_seq_len_interpolation_factor", "rotary_interleaved", "window_size", "softmax_type"),
    *("normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "swiglu"),
    *("untie_embeddings_and_output_weights", "num_experts"),
)
BESIDE = {
    "rope_scaling_factor": "use_rope_scaling",
    "window_attn_skip_freq": "window_size",
    "mup_attn_scale_power": "use_mup",
    "mup_base_head_dim": "use_mup",
    "mup_base_hidden_size": "use_mup",
    "mup_embedding_mult": "use_mup",
    "mup_output_mult": "use_mup",
    "moe_layer_freq": "num_experts",
    "moe_router_topk": "num_experts",
    "moe_router_score_function": "num_experts",
    "moe_router_pre_softmax": "num_experts",
    "moe_router_topk_scaling_factor": "num_experts",
    "moe_router_num_groups": "num_experts",
    "moe_router_group_topk": "num_experts",
    "moe_apply_probs_on_input": "num_experts",
    "rope_type": "multi_latent_attention",
    "rotary_scaling_factor": "multi_latent_attention",
    "mscale": "multi_latent_attention",
    "mscale_all_dim": "multi_latent_attention",
}
"""Arguments that count only where another one is set."""
MEANING = (
    *(*MODEL, "direction", "tokenizer_fingerprint", *BESIDE),
    *("squared_relu", "quick_geglu", "openai_gelu", "onnx_safe"),  # the activation of what has no SwiGLU
)
"""Arguments that decide what the weights compute, and on which ids.

Those in which a model can differ from a Llama are in `convert.llama_config`; `convert.inspection` adds them.
"""
_OPTIMIZER = "optimizer."
_MAX_DEPTH = 20


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `checkpoint` holds, in plain values that JSON can say.

    Raises:
        CheckpointError: its list of checksums is damaged.
    """
    args, folder = checkpoint.args, checkpoint.folder
    groups = _groups(checkpoint)
    listed = read_checksums(folder)
    files = [path for path in folder.iterdir() if path.is_file()]
    return {
        "kind": "megatron torch_dist checkpoint",
        "folder": str(folder),
        "step": checkpoint.iteration,
        "direction": plain(getattr(args, "direction", None)),
        "preset": plain(getattr(args, "preset", None)),
        "tokenizer": {
            "type": plain(getattr(args, "tokenizer_type", None)),
            "model": plain(getattr(args, "tokenizer_model", None)),
            "fingerprint": plain(getattr(args, "tokenizer_fingerprint", None)),
        },
        "format": json.loads((folder / SEAL).read_text(encoding="utf-8")),
        "layout": {name: plain(getattr(args, name, None)) for name in LAYOUT},
        "model": {name: plain(getattr(args, name, None)) for name in MODEL},
        "dtype": plain(getattr(args, "params_dtype", None)),
        "num_parameters": groups.get("weights", {}).get("elements", 0),
        "groups": groups,
        "num_objects": len(checkpoint.objects),
        "num_files": len(files),
        "bytes_on_disk": sum(path.stat().st_size for path in files),
        "checksums": None if listed is None else len(listed),
    }


def tensor_table(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return name, group, shape, dtype and bytes of every tensor, in the order of the index."""
    return [
        {
            "name": tensor.name,
            "group": _group(tensor.name),
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": math.prod(tensor.shape) * tensor.dtype.itemsize,
            "chunks": len(tensor.chunks),
        }
        for tensor in checkpoint.tensors.values()
    ]


def saved_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return all of a run's arguments in plain values."""
    return dict(sorted({str(name): plain(value) for name, value in vars(args).items()}.items()))


def unreadable_tensors(checkpoint: Checkpoint) -> list[str]:
    """Read every tensor, one stored chunk at a time; return what cannot be read, one line each."""
    faults = []
    for name in checkpoint.tensor_names():
        try:
            for offsets, sizes in checkpoint.boxes(name):
                checkpoint.read_box(name, offsets, sizes)
        except CheckpointError as error:
            faults.append(str(error))
    return faults


def plain(value: Any, *, max_values: int = 10_000) -> Any:
    """Turn anything that an argument can hold into something that JSON can say.

    Containers beyond a depth, or after `max_values` values, become "...": a pickle can be deeper than Python calls
    reach, and can hold itself.
    """
    return _plain(value, _MAX_DEPTH, [max_values])


def _plain(value: Any, depth: int, left: list[int]) -> Any:
    """`plain` for `depth` more levels and `left[0]` more values."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        value = vars(value)
    if isinstance(value, list | tuple | set | frozenset | dict | SavedValue):
        if depth == 0 or left[0] <= 0:
            return "..."
        left[0] -= 1 if isinstance(value, SavedValue) else len(value)
    if isinstance(value, dict):
        return {str(name): _plain(each, depth - 1, left) for name, each in value.items()}
    if isinstance(value, SavedValue):
        return f"{value.type_name.rpartition('.')[2]}{tuple(_plain(value.arguments, depth - 1, left))!r}"
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each, depth - 1, left) for each in value]
    if isinstance(value, Path):
        return str(value)
    return str(value).removeprefix("torch.")


def _groups(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for tensor in checkpoint.tensors.values():
        group = groups.setdefault(_group(tensor.name), {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": []})
        group["tensors"] += 1
        group["elements"] += math.prod(tensor.shape)
        group["bytes"] += math.prod(tensor.shape) * tensor.dtype.itemsize
        group["dtypes"] = sorted({*group["dtypes"], str(tensor.dtype).removeprefix("torch.")})
    return groups


def _group(name: str) -> str:
    return "optimizer" if name.startswith(_OPTIMIZER) else "weights"
