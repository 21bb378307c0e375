"""What a plan knows of a model and of GPUs: sizes, parameters, floating-point operations, peaks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_ledom.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it.

    Attributes:
        name: as given to `--gpu`.
        memory_bytes: what the driver reports.
        peak_bf16: dense BF16 operations a second.
        memory_bandwidth: bytes a second.
        has_fp8: whether its tensor cores take FP8, at twice the BF16 rate.
        calibrated: whether the speed model was fitted on it.
    """

    name: str
    memory_bytes: int
    peak_bf16: float
    memory_bandwidth: float
    has_fp8: bool
    calibrated: bool


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 81_559 * 2**20, 989e12, 3.35e12, has_fp8=True, calibrated=True),
        Gpu("h200", 143_771 * 2**20, 989e12, 4.8e12, has_fp8=True, calibrated=False),
        Gpu("a100", 81_920 * 2**20, 312e12, 2.0e12, has_fp8=False, calibrated=False),
    )
}


@dataclass(frozen=True)
class Shape:
    """A decoder-only Transformer, as far as its cost goes.

    Attributes:
        num_layers, hidden, ffn, heads, groups, head_dim: sizes; `groups` are key heads.
        vocabulary: rows of the embedding.
        gated: three MLP matrices (SwiGLU) instead of two.
        tied: whether input and output share one table.
    """

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    @property
    def layer_matrices(self) -> int:
        """Weights of a layer's matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        return attention + self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def parameters(self) -> int:
        """All of them, norms included."""
        norms = (2 * self.num_layers + 1) * self.hidden
        tables = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.num_layers * self.layer_matrices + norms + tables

    @property
    def matrix_flops(self) -> float:
        """Operations a token of all matrix products, forward and backward, output layer included."""
        return 6.0 * (self.num_layers * self.layer_matrices + self.vocabulary * self.hidden)

    def attention_flops(self, seq_length: int) -> float:
        """Operations a token of causal attention (half the square), forward and backward."""
        return 6.0 * self.num_layers * self.heads * self.head_dim * seq_length

    def model_flops(self, seq_length: int, *, whole_square: bool = False) -> float:
        """Operations a token as reports count them: no recomputation; causal attention once, or the whole square."""
        return self.matrix_flops + self.attention_flops(seq_length) * (2 if whole_square else 1)


def shape_of(args: argparse.Namespace, vocabulary: int) -> Shape:
    """The shape that Megatron's parsed (not yet validated) arguments describe.

    Raises:
        UsageError: a kind of model that the plan does not know.
    """
    for name, flag in (("num_experts", "--num-experts"), ("multi_latent_attention", "--multi-latent-attention")):
        if getattr(args, name, None):
            raise UsageError(f"{flag}: the plan knows dense layers with ordinary attention only")
    heads = args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    return Shape(
        num_layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size or 4 * args.hidden_size,
        heads=heads,
        groups=groups,
        head_dim=args.kv_channels or args.hidden_size // heads,
        vocabulary=vocabulary,
        gated=bool(args.swiglu),
        tied=not args.untie_embeddings_and_output_weights,
    )


def get_gpu(name: str) -> Gpu:
    """Return the GPU called `name`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in GPUS:
        raise UsageError(f"--gpu {name}: known are {', '.join(GPUS)}")
    return GPUS[name]
