"""Layouts of a job, and the small twin of one."""

from __future__ import annotations

import argparse

import pytest

from megatron_ledom.cluster.plan_layouts import (
    FP8,
    Job,
    Layout,
    best_by_closed_form,
    candidates,
    closed_form_bytes,
    pad,
    speed_of,
)
from megatron_ledom.cluster.plan_model import GPUS, Shape, get_gpu
from megatron_ledom.cluster.small_twin import build_twin, split_layout, strip_flags
from megatron_ledom.errors import UsageError

SEVEN_B = Shape(28, 3072, 24_576, 16, 16, 192, 64_256)


def job(gpus: int = 64, precision: str = "bf16") -> Job:
    return Job(SEVEN_B, 8192, 512, gpus, 8, GPUS["h100"], precision)


def test_candidates_divide_everything() -> None:
    found = list(candidates(job()))
    assert len(found) == len(set(found)) > 50
    for layout in found:
        assert layout.tensor * layout.pipeline * layout.data == 64
        assert 28 % layout.pipeline == 0 and layout.tensor <= 8
        assert 512 % (layout.data * layout.micro_batch_size) == 0
    assert {layout.pipeline for layout in found} == {1, 2, 4}
    assert {layout.recompute for layout in found} == {"none", "mlp", "full"}


def test_one_key_head_allows_every_tensor_size() -> None:
    one_head = Shape(18, 2048, 16_384, 16, 1, 128, 64_256)
    assert {x.tensor for x in candidates(Job(one_head, 8192, 512, 8, 8, GPUS["h100"]))} == {1, 2, 4, 8}


def test_the_closed_form_orders_memory() -> None:
    plain, recomputed = Layout(2, 1, 32, 1, "none"), Layout(2, 1, 32, 1, "full")
    assert closed_form_bytes(job(), recomputed) < closed_form_bytes(job(), plain)
    assert closed_form_bytes(job(), Layout(8, 1, 8, 1, "none")) < closed_form_bytes(job(), plain)
    assert closed_form_bytes(job(precision=FP8), plain) > closed_form_bytes(job(), plain)


def test_flags_ask_for_the_layout() -> None:
    flags = Layout(2, 4, 8, 2, "mlp").flags(job())
    assert flags[:2] == ["--tensor-model-parallel-size", "2"] and "--sequence-parallel" in flags
    assert flags[-4:] == ["--recompute-granularity", "selective", "--recompute-modules", "mlp"]
    assert "--sequence-parallel" not in Layout(1, 1, 64, 1, "none").flags(job())


def test_the_best_layout_recomputes_no_more_than_it_must() -> None:
    fits_all = best_by_closed_form(job(), 1e12)
    assert fits_all is not None and fits_all[0].recompute == "none"
    assert best_by_closed_form(job(), 1e9) is None
    speeds = [speed_of(job(), layout).tokens_per_s for layout in candidates(job())]
    assert fits_all[1].tokens_per_s == max(speeds)


def test_thousands_of_gpus() -> None:
    best = best_by_closed_form(job(4096), 70e9)
    assert best is not None and best[0].data * best[0].tensor * best[0].pipeline == 4096


def test_padding_of_the_vocabulary() -> None:
    assert pad(64_256, 1) == pad(64_256, 2) == 64_256
    assert pad(64_256, 4) == 64_512


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match="h100"):
        get_gpu("v100")


def arguments(**changes: object) -> argparse.Namespace:
    values: dict[str, object] = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "num_layers": 28,
        "preset": "7b",
        "num_layers_per_virtual_pipeline_stage": None,
        "sequence_parallel": True,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
    }
    return argparse.Namespace(**values | changes)


def test_a_twin_keeps_the_layout_and_reduces_the_width() -> None:
    argv = "--preset 7b --data-path a b --bf16 --tensor-model-parallel-size 2 --pipeline-model-parallel-size=2"
    twin = build_twin(argv.split(), arguments(), 64, 8)
    assert twin.num_ranks == 8 and twin.describes == "TP 2 x PP 2 x DP 2, sequence parallelism"
    assert twin.notes == ("data parallelism of 16 is shown by 2",)
    words = " ".join(twin.flags)
    assert "--num-layers 4 " in words and "--hidden-size 64 " in words and "--no-bf16" in words
    assert "--data-path" not in words and "parallel-size" not in words
    assert "--sequence-parallel" in twin.layout


def test_a_twin_says_what_it_cannot_show() -> None:
    twin = build_twin([], arguments(), 64, 4)
    assert twin.num_ranks == 4 and any("NOT checked" in note for note in twin.notes)
    with pytest.raises(UsageError, match="--max-ranks is 2"):
        build_twin([], arguments(), 64, 2)
    with pytest.raises(UsageError, match="no multiple"):
        build_twin([], arguments(), 6, 8)


def test_flags_are_taken_apart() -> None:
    assert strip_flags(["--lr", "1", "--qk-layernorm", "--data-path", "1", "a", "--swiglu"]) == [
        "--qk-layernorm",
        "--swiglu",
    ]
    layout, others = split_layout(["--tensor-model-parallel-size", "2", "--x", "2", "--sequence-parallel"])
    assert layout == ["--tensor-model-parallel-size", "2", "--sequence-parallel"] and others == ["--x", "2"]
