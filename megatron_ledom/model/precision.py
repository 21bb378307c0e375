"""Linear layers that compute as in 8 bits: Megatron's own, with the products of an FP8 recipe emulated.

On a GPU Transformer Engine does this; here its recipes run on any machine, to see what they do to a loss. Only the
three products of a linear layer are touched (Megatron's `_forward_impl`, one method); weights, initialisation, tensor
and sequence parallelism, checkpoints are Megatron's. The embedding, the attention scores, the norms and the output
layer stay as they are, as they do with Transformer Engine.

    y = x w^T            x: E4M3     w: E4M3         forward
    dx = dy w            dy: E5M2    w: E4M3         backward, gradients of the input     (blockwise: dy in E4M3)
    dw = dy^T x          dy: E5M2    x: E4M3         backward, gradients of the weight

    recipe       scale of a tensor
    tensorwise   448 / its largest value
    delayed      448 / the largest value of the micro-batches before it (1,024 of them); 1 at the start
    blockwise    a power of two for each 1 x 128 (x, dy) or 128 x 128 (w)

Legend: M tokens, K input width, N output width; of this tensor-parallel rank.
Source of the recipes: Transformer Engine's `DelayedScaling`, `Float8CurrentScaling`, `Float8BlockScaling`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_ledom.engine.precision import emulated_recipe
from megatron_ledom.ops import float8
from megatron_ledom.ops.float8 import E4M3, E5M2, Rounded

TENSORWISE, DELAYED, BLOCKWISE = "tensorwise", "delayed", "blockwise"
RECIPES = (TENSORWISE, DELAYED, BLOCKWISE)
INPUT, WEIGHT, GRADIENT = 0, 1, 2
"""The rows of a history: whose largest values they hold."""


@dataclass
class Emulation:
    """What all emulated layers of a process share.

    Attributes:
        recipe: one of `RECIPES`.
        history_length: micro-batches that a delayed scale looks back on.
        bf16_ends: (first, last): how many layers at each end of the network compute in BF16.
        is_on: False: every layer computes in BF16, as if there were no emulation.
        is_compared: every forward product is also made in BF16, and the gap is kept in `gaps`.
        gaps: layer -> |y8 - y16| / |y16|, the largest of its products while `is_compared`.
    """

    recipe: str
    history_length: int = 1024
    bf16_ends: tuple[int, int] = (0, 0)
    is_on: bool = True
    is_compared: bool = False
    gaps: dict[torch.nn.Module, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.recipe in RECIPES, self.recipe

    def applies_to(self, layer: int, num_layers: int) -> bool:
        """Whether the layer with this index, from 0 on over the whole network, is emulated."""
        first, last = self.bf16_ends
        return first <= layer < num_layers - last


def plan_emulation(args: argparse.Namespace) -> Emulation | None:
    """What a run on the CPU emulates, from Megatron's namespace with ours; None where there is nothing to emulate."""
    recipe = emulated_recipe(args, args.device)
    if recipe is None:
        return None
    ends = (args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16) if args.first_last_layers_bf16 else (0, 0)
    return Emulation(recipe, history_length=args.fp8_amax_history_len, bf16_ends=ends)


class History:
    """The largest values that a layer has met, from which delayed scales are made.

    Attributes:
        amaxes: fp32 [3, length], the newest first; rows `INPUT`, `WEIGHT`, `GRADIENT`.
    """

    def __init__(self, length: int) -> None:
        self.amaxes = torch.zeros(3, length, dtype=torch.float32)

    def scale(self, row: int, dtype: torch.dtype) -> torch.Tensor:
        """The scale for the next tensor of this row."""
        return float8.scale_from_amax(self.amaxes[row].max(), dtype)

    def push(self, rows: slice, found: torch.Tensor) -> None:
        """Add what was found, fp32 [number of rows]; the largest over the ranks that share a scale."""
        group = _amax_group()
        if group is not None:
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=group)
        self.amaxes[rows] = torch.cat([found[:, None], self.amaxes[rows, :-1]], dim=1)

    def restore(self, saved: torch.Tensor) -> None:
        """Take the history of a checkpoint; of one with another length, the newest that fit."""
        length = min(saved.shape[1], self.amaxes.shape[1])
        self.amaxes.zero_()
        self.amaxes[:, :length] = saved[:, :length]


def _amax_group() -> Any:
    """Megatron's group of the ranks whose tensors are parts of one tensor; None where this rank is alone."""
    if not (torch.distributed.is_initialized() and parallel_state.model_parallel_is_initialized()):
        return None
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    return group if group.size() > 1 else None


class _Products(torch.autograd.Function):
    """The three products of a linear layer with rounded operands; x [M, K], w [N, K] to y [M, N] in x's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: torch.Tensor, w_NK: torch.Tensor, recipe: str, history: History, is_learning: bool
    ) -> torch.Tensor:
        """Return y [M, N] from the rounded operands, and keep these for the gradients."""
        ctx.recipe, ctx.history, ctx.is_learning = recipe, history, is_learning
        x8, w8 = _round(x_MK, INPUT, recipe, history), _round(w_NK, WEIGHT, recipe, history)
        # Blocks of x run along the summed axis, which is K here and M for the gradient of the weight.
        turned = float8.quantise_blocks(x_MK.t(), E4M3, rows=1) if recipe == BLOCKWISE else x8
        ctx.save_for_backward(turned.values, turned.inverse_scale, w8.values, w8.inverse_scale)
        ctx.dtypes = x_MK.dtype, w_NK.dtype
        if is_learning and recipe == DELAYED:
            history.push(slice(INPUT, GRADIENT), torch.stack([float8.amax(x_MK), float8.amax(w_NK)]))
        return float8.multiply(x8, w8, x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x and w, from the rounded gradient of y."""
        (dy_MN,) = grads
        x_values, x_inverse, w_values, w_inverse = ctx.saved_tensors
        dy8 = _round(dy_MN, GRADIENT, ctx.recipe, ctx.history)
        dx_dtype, dw_dtype = ctx.dtypes
        dx_MK = (dy8.restored() @ Rounded(w_values, w_inverse).restored()).to(dx_dtype)
        if ctx.recipe == BLOCKWISE:
            dy8_NM = float8.quantise_blocks(dy_MN.t(), E4M3, rows=1).restored()
            x8_MK = Rounded(x_values, x_inverse).restored().t()
        else:
            dy8_NM, x8_MK = dy8.restored().t(), Rounded(x_values, x_inverse).restored()
        dw_NK = (dy8_NM @ x8_MK).to(dw_dtype)
        if ctx.is_learning and ctx.recipe == DELAYED:
            ctx.history.push(slice(GRADIENT, GRADIENT + 1), float8.amax(dy_MN)[None])
        return dx_MK, dw_NK, None, None, None


def _round(tensor: torch.Tensor, row: int, recipe: str, history: History) -> Rounded:
    """Round one operand as the recipe says."""
    if recipe == BLOCKWISE:
        return float8.quantise_blocks(tensor, E4M3, rows=float8.BLOCK if row == WEIGHT else 1)
    dtype = E5M2 if row == GRADIENT else E4M3
    if recipe == TENSORWISE:
        return float8.quantise_tensor(tensor, dtype)
    return float8.round_to(tensor, history.scale(row, dtype), dtype)


def emulated_linear(
    x: torch.Tensor, w_NK: torch.Tensor, recipe: str, history: History | None = None, *, is_learning: bool = True
) -> torch.Tensor:
    """A linear layer without bias, computed with an FP8 recipe in both directions.

    Args:
        x: fp32 or bf16 [..., K].
        w_NK: the weight, fp32 or bf16.
        recipe: one of `RECIPES`.
        history: for delayed scales; needed by that recipe alone, which changes it.
        is_learning: whether the history takes note of these tensors.

    Returns:
        [..., N] in x's dtype.
    """
    assert history is not None or recipe != DELAYED, "delayed scales need a history"
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN: torch.Tensor = _Products.apply(x_MK, w_NK, recipe, history, is_learning)
    return y_MN.view(*x.shape[:-1], w_NK.shape[0])


class _Emulated:
    """What the two layers below share; a mixin before Megatron's class."""

    emulation: Emulation
    history: History
    training: bool

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Megatron's hook for the product: the same communication, with our three products.

        Source: `megatron.core.tensor_parallel.layers.linear_with_grad_accumulation_and_async_allreduce`.
        """
        if not self.emulation.is_on:
            return self._in_bf16(input, weight, **kwargs)
        assert not kwargs.get("gradient_accumulation_fusion"), "the CPU has no fused accumulation of gradients"
        group, total = kwargs.get("tp_group"), input
        if kwargs.get("sequence_parallel"):
            total = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=group)
        elif kwargs.get("allreduce_dgrad"):
            total = copy_to_tensor_model_parallel_region(input, group=group)
        is_learning = self.training and torch.is_grad_enabled()
        output = emulated_linear(total, weight, self.emulation.recipe, self.history, is_learning=is_learning)
        if self.emulation.is_compared:
            self._keep_gap(output, total, weight)
        bias = kwargs.get("bias")
        return output if bias is None else output + bias

    def _in_bf16(self, input: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Megatron's own product."""
        product: torch.Tensor = super()._forward_impl(input, weight, **kwargs)  # type: ignore[misc]
        return product

    @torch.no_grad()
    def _keep_gap(self, output: torch.Tensor, total: torch.Tensor, weight: torch.Tensor) -> None:
        expected = torch.nn.functional.linear(total, weight).float()
        gap = float((output.float() - expected).norm() / expected.norm().clamp(min=1e-30))
        assert isinstance(self, torch.nn.Module)
        self.emulation.gaps[self] = max(gap, self.emulation.gaps.get(self, 0.0))

    def get_extra_state(self) -> torch.Tensor | None:
        """The history, for Megatron's checkpoint, where Transformer Engine keeps its own; None without one."""
        return encode_history(self.history.amaxes) if self.emulation.recipe == DELAYED else None

    def set_extra_state(self, state: Any) -> None:
        """Take the history of a checkpoint; of one that was written in another precision there is none."""
        saved = decode_history(state)
        if saved is not None and self.emulation.recipe == DELAYED:
            self.history.restore(saved)


_NO_STATE = b"\x80\x04N."
"""A pickled None: what Transformer Engine reads of a state before it stops, so that it begins with no history."""
_MARK = b"ledom amax history\n"


def encode_history(amaxes: torch.Tensor) -> torch.Tensor:
    """A history [3, length] as the bytes that a checkpoint holds; uint8, one axis."""
    data = _NO_STATE + _MARK + amaxes.contiguous().numpy().tobytes()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decode_history(state: Any) -> torch.Tensor | None:
    """The inverse of `encode_history`; None for the state of another precision or of Transformer Engine.

    >>> decode_history(encode_history(torch.ones(3, 2))).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    if not (isinstance(state, torch.Tensor) and state.dtype == torch.uint8 and state.dim() == 1):
        return None
    data, prefix = state.cpu().contiguous().numpy().tobytes(), _NO_STATE + _MARK
    if not data.startswith(prefix) or (len(data) - len(prefix)) % 12:
        return None
    return torch.frombuffer(bytearray(data[len(prefix) :]), dtype=torch.float32).view(3, -1)


class EmulatedColumnParallelLinear(_Emulated, ColumnParallelLinear):
    """Megatron's layer whose output is cut over the tensor-parallel ranks, with the products of a recipe."""

    def __init__(self, *args: Any, emulation: Emulation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.emulation, self.history = emulation, History(emulation.history_length)


class EmulatedRowParallelLinear(_Emulated, RowParallelLinear):
    """Megatron's layer whose input is cut over the tensor-parallel ranks, with the products of a recipe."""

    def __init__(self, *args: Any, emulation: Emulation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.emulation, self.history = emulation, History(emulation.history_length)
