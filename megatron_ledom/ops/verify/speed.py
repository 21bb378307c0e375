"""How fast the kernels are on this GPU, beside torch's: medians by CUDA events, as TFLOP/s of what the mask allows.

    ours      attention on natural order: reversed-causal, no flip
    torch     what the fallback takes: scaled_dot_product_attention, causal, with q, k, v and the output flipped (and
              their gradients), by whichever kernel torch chooses; with documents the mask written out
    flash     the same by torch's FlashAttention
    cudnn     the same by cuDNN

Rates count 4 * D operations for a score that the mask allows, and 3.5 times that with the backward pass.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ledom.ops.attention import attention_with_lse
from megatron_ledom.ops.conformance import REVERSE, Rotation
from megatron_ledom.ops.fallback import attend, torch_attention
from megatron_ledom.ops.launch import launch_rope
from megatron_ledom.ops.mask import AttentionMask, dense_mask, documents_from_lengths, intervals, natural_order_mask
from megatron_ledom.ops.reference import rope_tables

SHAPES = (
    *((1, 16, 16, 2048, 64), (4, 16, 16, 4096, 64), (4, 16, 16, 4096, 128), (2, 32, 4, 8192, 128)),
    *((4, 16, 16, 4096, 192), (1, 24, 24, 8192, 192)),
)
"""B, H, G, S and D."""
QUICK_SHAPES = ((4, 16, 16, 4096, 64), (4, 16, 16, 4096, 128), (4, 16, 16, 4096, 192))
MEAN_DOCUMENT_TOKENS = 512
NUM_REPEATS, NUM_WARM_UPS = 15, 3
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def median_ms(function: Callable[[], object], repeats: int = NUM_REPEATS) -> float:
    """The median time of a call on the current stream."""
    for _ in range(NUM_WARM_UPS):
        function()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def document_mask(batch: int, seq: int, device: torch.device) -> AttentionMask:
    """Reversed-causal within documents whose lengths are drawn, with a fixed seed, around the mean."""
    generator = torch.Generator("cpu").manual_seed(11)
    lengths = torch.empty(4 * batch * seq // MEAN_DOCUMENT_TOKENS + 8, device="cpu")
    ends = lengths.exponential_(1 / MEAN_DOCUMENT_TOKENS, generator=generator).ceil().long().cumsum(0)
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), ends[ends < batch * seq], torch.tensor([batch * seq])])
    return natural_order_mask(REVERSE, documents=documents_from_lengths(bounds.to(device), batch, seq))


def num_scores(mask: AttentionMask, batch: int, seq: int, device: torch.device) -> int:
    """How many scores a mask allows, for one head."""
    rows = intervals(mask, batch, seq, device)
    return int((rows.last - rows.first + 1).clamp(min=0).sum(dtype=torch.int64))


def competitors(
    parts: Sequence[str], mask: AttentionMask, batch: int, seq: int, head_dim: int, device: torch.device
) -> dict[str, Attention]:
    """Name -> attention, for one mask."""
    scale = 1 / math.sqrt(head_dim)

    def ours(part: str) -> Attention:
        return lambda q, k, v: attention_with_lse(q, k, v, mask, scale, part)[0]

    def flipped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch_attention(q, k, v, mask, scale)

    def by(backend: SDPBackend) -> Attention:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return flipped(q, k, v)

        return run

    found = {part: ours(part) for part in parts}
    if mask.documents is None:
        torchs = {"flash": by(SDPBackend.FLASH_ATTENTION), "cudnn": by(SDPBackend.CUDNN_ATTENTION)}
        return found | {"torch": flipped} | torchs
    allowed = dense_mask(mask, batch, seq, device)[:, None]
    return found | {"torch": lambda q, k, v: attend(q, k, v, scale, allowed)}


def measure(
    shape: tuple[int, int, int, int, int], kind: str, parts: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Time forward, and forward with backward, of every competitor; what one cannot do is said in its place."""
    batch, heads, groups, seq, head_dim = shape
    mask = document_mask(batch, seq, device) if kind == "documents" else natural_order_mask(REVERSE)
    q, k, v, d_o = (
        torch.randn(batch, seq, h, head_dim, device=device).to(torch.bfloat16) for h in (heads, groups, groups, heads)
    )
    operations = 4.0 * num_scores(mask, 1 if mask.documents is None else batch, seq, device) * heads * head_dim
    operations *= batch if mask.documents is None else 1
    inputs = [x.requires_grad_() for x in (q, k, v)]
    result: dict[str, Any] = {"shape": list(shape), "mask": kind, "ms": {}, "tflops": {}, "unavailable": {}}
    for name, function in competitors(parts, mask, batch, seq, head_dim, device).items():

        def forward(function: Attention = function) -> None:
            with torch.no_grad():
                function(*inputs)

        def both(function: Attention = function) -> None:
            torch.autograd.grad(function(*inputs), inputs, d_o)

        try:
            times = [median_ms(forward), median_ms(both)]
        except RuntimeError as error:  # torch: no kernel for this head size, or no memory
            result["unavailable"][name] = (
                str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
            )
            torch.cuda.empty_cache()
            continue
        result["ms"][name] = [round(t, 4) for t in times]
        result["tflops"][name] = [
            round(factor * operations / (t * 1e-3) / 1e12, 1) for factor, t in zip((1.0, 3.5), times, strict=True)
        ]
    return result


def measure_rope(device: torch.device) -> dict[str, Any]:
    """Time rotary positions of a large batch, beside a copy of the same bytes."""
    x = torch.randn(4, 4096, 32, 128, device=device).to(torch.bfloat16)
    y = torch.empty_like(x)
    tables = rope_tables(1e4 ** -(torch.arange(64, dtype=torch.float64, device=device) / 64), 4096)
    num_bytes = 2 * x.numel() * x.element_size()
    found = {}
    for name, interleaved in (("halves", False), ("interleaved", True)):
        way = Rotation(*tables, None, from_end=True, interleaved=interleaved, inverse=False)
        found[name] = median_ms(functools.partial(launch_rope, x, y, way))
    found["copy"] = median_ms(lambda: y.copy_(x))
    return {name: {"ms": round(ms, 4), "gigabytes_per_s": round(num_bytes / ms / 1e6)} for name, ms in found.items()}


def cases(is_quick: bool) -> list[tuple[tuple[int, int, int, int, int], str]]:
    """Shapes and masks."""
    return list(itertools.product(QUICK_SHAPES if is_quick else SHAPES, ("reversed", "documents")))


def speed_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """The rates for people: forward / forward and backward, in TFLOP/s."""
    names = list(dict.fromkeys(name for result in results for name in (*result["tflops"], *result["unavailable"])))
    lines = [f"{'B, H, G, S, D':24} {'mask':10} " + " ".join(f"{name:>15}" for name in names)]
    for result in results:
        cells = []
        for name in names:
            rates = result["tflops"].get(name)
            missing = "no kernel" if name in result["unavailable"] else "-"
            cells.append(f"{rates[0]:.1f} / {rates[1]:.1f}" if rates else missing)
        shape = ", ".join(map(str, result["shape"]))
        lines.append(f"{shape:24} {result['mask']:10} " + " ".join(f"{cell:>15}" for cell in cells))
    return lines
