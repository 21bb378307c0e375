"""How Megatron packs weights and how to take them apart: pure functions, each with its inverse.

Megatron keeps the projections that share an input in one matrix; Hugging Face keeps
them apart. Rows are output features, columns input features. Nothing here knows names
or files. Shape letters: H query heads, G key-value groups, R = H / G query heads per
group, D head size, F feed-forward size, V vocabulary, N hidden size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_ledom.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def split_qkv(
    qkv: torch.Tensor, *, num_heads: int, num_query_groups: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take Megatron's packed query, key and value projection apart.

    The rows come group by group, so that a tensor-parallel rank holds whole groups; with
    H = 4 heads in G = 2 groups (R = 2), each box D rows high:

        linear_qkv        q_proj    k_proj    v_proj
        +----------+      +----+    +----+    +----+
        | q head 0 |      | q0 |    | k0 |    | v0 |
        | q head 1 |      | q1 |    | k1 |    | v1 |
        | k group 0|  =>  | q2 |    +----+    +----+
        | v group 0|      | q3 |
        | q head 2 |      +----+
        | q head 3 |
        | k group 1|
        | v group 1|
        +----------+

    G = H is ordinary multi-head attention, G = 1 multi-query attention.

    Args:
        qkv: [G * (R + 2) * D, N].
        num_heads: H, a multiple of G.
        num_query_groups: G.
        head_dim: D.

    Returns:
        Query [H * D, N], key [G * D, N], value [G * D, N].

    Raises:
        CheckpointError: the rows do not fit the three numbers.

    Source: `megatron.core.transformer.attention.SelfAttention.get_query_key_value_tensors`.
    """
    per_group = _query_heads_per_group(num_heads, num_query_groups)
    num_rows = num_query_groups * (per_group + 2) * head_dim
    _check_rows("the packed query, key and value projection", qkv, num_rows)
    grouped = qkv.reshape(num_query_groups, per_group + 2, head_dim, *qkv.shape[1:])
    query, key, value = grouped.split([per_group, 1, 1], dim=1)
    rest = qkv.shape[1:]
    return query.reshape(-1, *rest), key.reshape(-1, *rest), value.reshape(-1, *rest)


def merge_qkv(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_heads: int, num_query_groups: int, head_dim: int
) -> torch.Tensor:
    """Pack query, key and value projections as Megatron does: the inverse of `split_qkv`.

    Args:
        query: [H * D, N].
        key: [G * D, N].
        value: [G * D, N].
        num_heads: H, a multiple of G.
        num_query_groups: G.
        head_dim: D.

    Returns:
        [G * (R + 2) * D, N].

    Raises:
        CheckpointError: the rows of one of them do not fit the three numbers.
    """
    import torch

    per_group = _query_heads_per_group(num_heads, num_query_groups)
    _check_rows("the query projection", query, num_heads * head_dim)
    _check_rows("the key projection", key, num_query_groups * head_dim)
    _check_rows("the value projection", value, num_query_groups * head_dim)
    rest = query.shape[1:]
    parts = [
        part.reshape(num_query_groups, count, head_dim, *rest)
        for part, count in ((query, per_group), (key, 1), (value, 1))
    ]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def split_gate_up(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the two halves of a SwiGLU input projection apart.

        linear_fc1 [2F, N]        gate_proj [F, N]    up_proj [F, N]
        +------------+            +------------+      +------------+
        | gate       |      =>    | gate       |      | up         |
        +------------+            +------------+      +------------+
        | up         |
        +------------+            output = silu(gate x) * (up x)

    A tensor-parallel rank holds a piece of each half; in a `torch_dist` checkpoint the
    whole tensor is in the order drawn here, whatever the layout was.

    Raises:
        CheckpointError: the number of rows is odd.

    Source: `megatron.core.transformer.mlp.MLP`, `apply_swiglu_sharded_factory`.
    """
    if gate_up.shape[0] % 2:
        raise CheckpointError(f"a SwiGLU projection has an even number of rows, found {gate_up.shape[0]}")
    gate, up = gate_up.chunk(2, dim=0)
    return gate, up


def merge_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Stack the gate [F, N] over the up projection [F, N]: the inverse of `split_gate_up`.

    Raises:
        CheckpointError: their shapes differ.
    """
    import torch

    if gate.shape != up.shape:
        raise CheckpointError(f"gate and up projection must be alike, found {list(gate.shape)} and {list(up.shape)}")
    return torch.cat([gate, up], dim=0)


def remove_vocabulary_padding(table: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Drop the rows that Megatron adds so that the vocabulary divides by the tensor-parallel size.

        [V + padding, N] => [V, N]      the padding is always at the end

    Raises:
        CheckpointError: the table has fewer rows than the vocabulary.

    Source: `megatron.training.vocab_utils.calculate_padded_vocab_size`.
    """
    if table.shape[0] < vocab_size:
        raise CheckpointError(f"the table has {table.shape[0]} rows, the tokenizer {vocab_size} ids")
    return table[:vocab_size]


def add_vocabulary_padding(table: torch.Tensor, padded_vocab_size: int) -> torch.Tensor:
    """Append rows of zeros up to `padded_vocab_size`: the inverse of `remove_vocabulary_padding`.

    Raises:
        CheckpointError: the table is longer than that already.
    """
    num_missing = padded_vocab_size - table.shape[0]
    if num_missing < 0:
        raise CheckpointError(f"the table has {table.shape[0]} rows, more than the {padded_vocab_size} to pad to")
    import torch

    return torch.cat([table, table.new_zeros(num_missing, *table.shape[1:])], dim=0)


def to_finite_dtype(tensor: torch.Tensor, dtype: str, name: str, *, remedy: str) -> torch.Tensor:
    """Round a tensor to another dtype and refuse a result that is not finite.

    Args:
        tensor: any shape; returned as it is where it has the dtype already.
        dtype: "float32", "bfloat16" or "float16".
        name: of the tensor, for the message.
        remedy: what to do where the values are not finite before rounding.

    Raises:
        CheckpointError: an element is infinite or NaN in `dtype`.
    """
    import torch

    converted = tensor.to(getattr(torch, dtype))
    if not is_finite(converted):
        remedy = "choose another --dtype" if is_finite(tensor) else remedy
        raise CheckpointError(f"{name} is not finite in {dtype}: {remedy}")
    return converted


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN; without the two copies that `torch.isfinite` makes."""
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _query_heads_per_group(num_heads: int, num_query_groups: int) -> int:
    if num_query_groups < 1 or num_heads % num_query_groups:
        raise CheckpointError(f"{num_heads} query heads cannot be shared out over {num_query_groups} groups")
    return num_heads // num_query_groups


def _check_rows(what: str, tensor: torch.Tensor, num_rows: int) -> None:
    if tensor.shape[0] != num_rows:
        raise CheckpointError(f"{what} should have {num_rows} rows, found {list(tensor.shape)}")
