"""Speeds of H100 training that others have published, for calibrating a plan and for judging it.

Values are the sources'. What a source leaves out of its table (hidden size, layers, batch) is filled in from the
model's published configuration or, where there is none, from its number of parameters; `assumed` says so. Some rows
fit the constants of `plan_speed`, the others are only compared with.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from megatron_ledom.cluster.plan_model import Shape
from megatron_ledom.cluster.plan_speed import Run

FLASH_2 = "flash-attention 2"
SHAPES: dict[str, tuple[Any, ...]] = {
    # layers, hidden, MLP, heads, key heads, head size, vocabulary, gated, tied
    "mpt_1b": (24, 2048, 8192, 16, 16, 128, 50_368, False, True),
    "mpt_3b": (32, 2560, 10_240, 32, 32, 80, 50_368, False, True),
    "mpt_7b": (32, 4096, 16_384, 32, 32, 128, 50_368, False, True),
    "llama_8b": (32, 4096, 14_336, 32, 8, 128, 128_256, True, False),
    "llama_70b": (80, 8192, 28_672, 64, 8, 128, 128_256, True, False),
    "gpt_2b": (24, 2048, 8192, 16, 16, 128, 131_072, False, False),
    "gpt_7b": (32, 4096, 16_384, 32, 32, 128, 131_072, False, False),
    "gpt_16b": (32, 6144, 24_576, 48, 48, 128, 131_072, False, False),
    "gpt_70b": (80, 8192, 32_768, 64, 64, 128, 131_072, False, False),
}


@dataclass(frozen=True)
class Published:
    """One published result.

    Attributes:
        name: source, model and setting.
        run: what was run, as the speed model sees it.
        tokens_per_s: a GPU, where the source says; else None.
        tflops: a GPU, by the source's count.
        whole_square: whether that count takes attention's whole square, not its causal half.
        fits: whether the row fits the constants; the others are held out.
        assumed: what of `run` the source does not say.
    """

    name: str
    run: Run
    tokens_per_s: float | None
    tflops: float
    whole_square: bool
    fits: bool
    assumed: str = ""


README = "shape (from the size), micro-batches"


@functools.cache
def published_results() -> tuple[Published, ...]:
    """All of them, those that fit the constants first."""
    return (
        Published("llm-foundry 1.3B, 4096", _run("mpt_1b", 4096, attention=FLASH_2), 38_535, 398, True, True),
        Published("llm-foundry 2.7B, 8192", _run("mpt_3b", 8192, attention=FLASH_2), 16_578, 399, True, True),
        Published("llm-foundry 6.7B, 2048", _run("mpt_7b", 2048, attention=FLASH_2), 10_643, 460, True, True),
        Published("Megatron-LM 7.1B, TP2, 4096", _run("gpt_7b", 4096, tensor=2), None, 465.9, True, True, README),
        Published("Megatron-LM 16B, TP4, 4096", _run("gpt_16b", 4096, tensor=4), None, 489.1, True, True, README),
        Published("Megatron-Bridge 8B FP8, 8192", _run("llama_8b", 8192, fp8=True), 14_451, 744, False, True),
        Published(
            "llm-foundry 2.7B FP8, 8192", _run("mpt_3b", 8192, attention=FLASH_2, fp8=True), 19_146, 461, True, True
        ),
        Published("llm-foundry 1.3B, 8192", _run("mpt_1b", 8192, attention=FLASH_2), 29_157, 373, True, False),
        Published("llm-foundry 2.7B, 4096", _run("mpt_3b", 4096, attention=FLASH_2), 20_964, 419, True, False),
        Published(
            "llm-foundry 6.7B recomputed, 4096",
            _run("mpt_7b", 4096, attention=FLASH_2, recomputed=1.0),
            8_611,
            400,
            True,
            False,
        ),
        Published(
            "llm-foundry 6.7B recomputed, 8192",
            _run("mpt_7b", 8192, attention=FLASH_2, recomputed=1.0),
            6_935,
            367,
            True,
            False,
        ),
        Published("Megatron-LM 1.7B, 4096", _run("gpt_2b", 4096), None, 408.8, True, False, README),
        Published(
            "Megatron-LM 70B, TP8 PP2, 4096",
            _run("gpt_70b", 4096, tensor=8, pipeline=2, micro_batches=24),
            None,
            419.7,
            True,
            False,
            README,
        ),
        Published(
            "llm-foundry 2.7B FP8, 2048", _run("mpt_3b", 2048, attention=FLASH_2, fp8=True), 30_586, 548, True, False
        ),
        Published(
            "Megatron-Bridge 70B FP8, 8192",
            _run("llama_70b", 8192, tensor=4, pipeline=8, virtual=5, micro_batches=64, fp8=True),
            1_664,
            731,
            False,
            False,
            "layout",
        ),
    )


def _run(model: str, seq_length: int, **rest: Any) -> Run:
    return Run(Shape(*SHAPES[model]), seq_length, **rest)
