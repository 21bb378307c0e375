"""Our core attention as a part of Megatron's layers: the fused kernels of `ops`, with rotary positions of its own.

Megatron's layer stays whole: projections, tensor and sequence parallelism, recomputation and checkpoints are its own.
Ours takes the place of two modules: the core attention, and `SelfAttention`, only so that the angles of the rotary
embedding reach the core attention, which alone knows from which end positions are counted.

    kind      samples            attends               positions from
    kernels   the model's order  causal                the beginning
    ledom     natural order      reversed-causal       the end                 (causal, beginning: forward model)
    megatron  the model's order  Megatron's own core attention, untouched

Legend: S sequence, B batch, H query heads, G key heads, D head dim, R rotary dim, all of this tensor-parallel rank.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.log import get_logger
from megatron_ledom.ops.attention import attention
from megatron_ledom.ops.kernels import load_kernels
from megatron_ledom.ops.mask import AttentionMask, Documents, model_order_mask, natural_order_mask
from megatron_ledom.ops.path import prepare_paths
from megatron_ledom.ops.rope import rope

MEGATRON, KERNELS, LEDOM = "megatron", "kernels", "ledom"


@dataclass(frozen=True)
class AttentionPlan:
    """What computes attention in a run, and in which order samples come to it.

    Attributes:
        kind: `MEGATRON`, `KERNELS` or `LEDOM`.
        direction: the model's.
        reason: why this kind, in words.
        device: "cpu" or "cuda".
    """

    kind: str
    direction: Direction
    reason: str
    device: str = "cpu"

    @property
    def is_ours(self) -> bool:
        """Whether our core attention is used; documents then come as bounds, not as a dense mask."""
        return self.kind != MEGATRON

    @property
    def needs_turned_samples(self) -> bool:
        """Whether samples are put into natural order, which differs from the model's for a reverse model only."""
        return self.kind == LEDOM and self.direction is Direction.REVERSE


def plan_attention(args: argparse.Namespace, device: str) -> AttentionPlan:
    """Decide what computes attention, from `--attention` and the model's flags.

    Args:
        args: Megatron's namespace with ours.
        device: "cpu" or "cuda".

    Raises:
        UsageError: `--attention ledom` with a model that the kernels do not compute.
    """
    direction = Direction(args.direction)
    if args.attention == MEGATRON:
        return AttentionPlan(MEGATRON, direction, "asked for", device)
    fault = _fault_of_model(args)
    if args.attention == LEDOM:
        if fault:
            raise UsageError(f"--attention ledom: {fault}. Change that, or use --attention auto")
        return AttentionPlan(LEDOM, direction, "asked for", device)
    if device != "cpu":
        return AttentionPlan(MEGATRON, direction, "the default on CUDA", device)
    found = load_kernels()
    fault = fault or (found if isinstance(found, str) else None)
    if fault:
        return AttentionPlan(MEGATRON, direction, fault)
    return AttentionPlan(KERNELS, direction, "the default on the CPU")


def _fault_of_model(args: argparse.Namespace) -> str | None:
    """Why our core attention cannot compute this model; None where it can."""
    positions = args.position_embedding_type
    faults = {
        "--context-parallel-size: all keys must be on one rank": args.context_parallel_size > 1,
        f"--attention-dropout {args.attention_dropout}: the kernels have none": args.attention_dropout > 0,
        "--num-experts: its layers are Megatron's": args.num_experts is not None,
        "--multi-latent-attention: its heads have two sizes": args.multi_latent_attention,
        f"--softmax-type {args.softmax_type}: the kernels have the plain one": args.softmax_type != "vanilla",
        "--apply-query-key-layer-scaling: the kernels scale all layers alike": args.apply_query_key_layer_scaling,
        "--fp16: the kernels have fp32 and bf16": args.fp16,
        "--spec: its layers are another's": args.spec is not None,
        f"--position-embedding-type {positions}: there are rotary ones or none": positions not in ("rope", "none"),
    }
    return next((fault for fault, is_so in faults.items() if is_so), None)


def agree_on_kernels(plan: AttentionPlan, config: Any) -> None:
    """Let all ranks of a run on GPUs settle together which kernels serve, and say which.

    Collective: every rank calls it while it builds its model, before the first forward pass.

    Args:
        plan: what computes attention.
        config: a `TransformerConfig`; its dtype and head size are what is settled.
    """
    if plan.device != "cuda" or not plan.is_ours:
        return
    device, dtype = torch.device("cuda", torch.cuda.current_device()), config.params_dtype
    path = prepare_paths(device.index, dtype, config.kv_channels)
    get_logger(__name__).info("attention kernels on %s: %s (%s)", device, path.name, path.reason)


class CoreAttention(torch.nn.Module):
    """Megatron's core attention, computed by `ops.attention`.

    Args:
        config: a `TransformerConfig`.
        layer_number: from 1 on.
        attn_mask_type: Megatron's word for the mask; ours follows from `plan`.
        attention_type: "self".
        attention_dropout: must be 0.
        softmax_scale: of the scores; None for 1 / sqrt(D).
        cp_comm_type: for context parallelism, which is refused.
        pg_collection: Megatron's process groups; heads are those of this rank already.
        plan: what computes attention, and in which order.

    Source: the signature is that of `megatron.core.transformer.dot_product_attention.DotProductAttention`.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        plan: AttentionPlan,
    ) -> None:
        super().__init__()
        assert attention_type == "self", f"built for self-attention, asked for {attention_type}"
        if config.context_parallel_size > 1:
            raise UsageError(
                f"--context-parallel-size {config.context_parallel_size}: this attention needs all keys on one rank"
            )
        assert (config.attention_dropout if attention_dropout is None else attention_dropout) == 0
        self.plan, self.scale = plan, softmax_scale
        self.is_interleaved = config.rotary_interleaved
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if has_window else None
        self.angles: torch.Tensor | None = None
        self._tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S, B, H, D], without rotary positions.
            key: [S, B, G, D], the same.
            value: [S, B, G, D].
            attention_mask: None, or the first and the last token of every token's document, int32 [B, 2, S].
            attn_mask_type: not used.
            attention_bias: must be None.
            packed_seq_params: must be None.

        Returns:
            [S, B, H * D].
        """
        assert attention_bias is None and packed_seq_params is None, "no bias and no packed sequences here"
        documents = None
        if attention_mask is not None:
            assert attention_mask.dtype == torch.int32, f"document bounds are int32, found {attention_mask.dtype}"
            documents = Documents(*(bounds.contiguous() for bounds in attention_mask.unbind(1)))
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if self.angles is not None:
            q, k = (self._turn(x, self.angles, documents) for x in (q, k))
        output = attention(q, k, v, self._mask(documents), scale=self.scale)
        return output.transpose(0, 1).reshape(*query.shape[:2], -1)

    def _mask(self, documents: Documents | None) -> AttentionMask:
        if self.plan.kind == LEDOM:
            return natural_order_mask(self.plan.direction, self.window, documents)
        return model_order_mask(self.window, documents)

    def _turn(self, x_BSHD: torch.Tensor, angles: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        """Apply the rotary positions whose angles Megatron made: [S, 1, 1, R], each pair's angle twice."""
        if self._tables is None or self._tables[0] is not angles:
            half = angles.shape[-1] // 2
            each = angles[:, 0, 0, ::2] if self.is_interleaved else angles[:, 0, 0, :half]
            self._tables = angles, torch.cos(each.float()), torch.sin(each.float())
        _, cosines, sines = self._tables
        return rope(
            x_BSHD,
            cosines,
            sines,
            from_end=self.plan.needs_turned_samples,
            documents=documents,
            interleaved=self.is_interleaved,
        )


class SelfAttentionWithAngles(SelfAttention):
    """Megatron's self-attention, whose core attention applies the rotary positions."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any) -> Any:
        """Hand the angles to the core attention and do the rest as Megatron does."""
        angles = kwargs.pop("rotary_pos_emb", None)
        assert kwargs.get("inference_context") is None, "this attention is for training; generate with the export"
        assert angles is None or torch.is_tensor(angles), "queries and keys have the same angles here"
        self.core_attention.angles = angles
        return super().forward(hidden_states, attention_mask, **kwargs)
