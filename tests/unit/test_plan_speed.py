"""The speed model: its constants follow from the published results, and it errs little on those held out."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from megatron_ledom.cluster.plan_model import GPUS, Shape
from megatron_ledom.cluster.plan_speed import FITTED, Run, attention_tflops, error, fit, predict
from megatron_ledom.cluster.published import SHAPES, published_results
from megatron_ledom.engine.presets import PRESETS, count_parameters

PUBLISHED = published_results()
SEVEN_B = Shape(28, 3072, 24_576, 16, 16, 192, 64_256)


def test_the_constants_are_what_the_fit_gives() -> None:
    fitted = fit(PUBLISHED)
    for name in ("matrix_efficiency", "memory_traffic", "tensor_exposed", "fp8_gain"):
        assert getattr(FITTED, name) == pytest.approx(getattr(fitted, name), rel=0.01), name


def test_the_fit_looks_at_no_row_that_is_held_out() -> None:
    spoiled = [row if row.fits else replace(row, tflops=1.0, tokens_per_s=1.0) for row in PUBLISHED]
    assert fit(spoiled) == fit(PUBLISHED)


def test_errors_on_results_held_out() -> None:
    held = [abs(error(row)) for row in PUBLISHED if not row.fits]
    assert len(held) >= 8 and len(held) > sum(row.fits for row in PUBLISHED)
    print(f"held out: median {statistics.median(held):.3f}, at most {max(held):.3f}")
    assert statistics.median(held) < 0.10
    assert max(held) < 0.20


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_sources_tokens_and_operations_agree(row) -> None:  # type: ignore[no-untyped-def]
    """A wrong shape or a wrong way of counting would show here, whatever the constants are."""
    if row.tokens_per_s is not None:
        flops = row.run.shape.model_flops(row.run.seq_length, whole_square=row.whole_square)
        assert row.tokens_per_s * flops / 1e12 == pytest.approx(row.tflops, rel=0.05)


def test_parameters_are_those_of_the_presets() -> None:
    assert SEVEN_B.parameters == count_parameters(PRESETS["7b"].settings, 64_256)
    assert Shape(*SHAPES["mpt_1b"]).parameters == pytest.approx(1.3e9, rel=0.05)
    assert Shape(*SHAPES["llama_8b"]).parameters == pytest.approx(8.03e9, rel=0.01)


def test_what_costs_time_costs_it() -> None:
    base = Run(SEVEN_B, 8192, tensor=2, data=4, micro_batches=16, with_step=True)
    fast = predict(base).tokens_per_s
    assert predict(replace(base, recomputed=1.0)).tokens_per_s < 0.85 * fast
    assert predict(replace(base, pipeline=4)).tokens_per_s < 0.9 * fast  # 3 / 16 stands idle
    assert predict(replace(base, pipeline=4, virtual=7)).tokens_per_s > predict(replace(base, pipeline=4)).tokens_per_s
    assert predict(replace(base, data=512, micro_batches=1)).tokens_per_s < predict(base).tokens_per_s
    assert predict(replace(base, fp8=True)).tokens_per_s > 1.1 * fast
    assert predict(base, GPUS["a100"]).tokens_per_s < 0.5 * fast


def test_a_step_is_its_tokens_over_its_speed() -> None:
    run = Run(SEVEN_B, 8192, tensor=2, pipeline=2, data=4, micro_batches=16, micro_batch_size=2, with_step=True)
    speed = predict(run)
    tokens = 8192 * 16 * 2 * 4
    assert speed.tokens_per_s * 16 * speed.step_s == pytest.approx(tokens)
    assert sum(speed.parts.values()) == pytest.approx(1)
    assert speed.mfu == pytest.approx(speed.tflops / 989)


def test_attention_rates_lie_between_the_published_ones() -> None:
    assert attention_tflops("flash-attention 2", 512) == 265
    assert 294 < attention_tflops("flash-attention 2", 6000) < 308
    assert attention_tflops("flash-attention 2", 10**6) == 328
