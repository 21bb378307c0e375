"""FP8 arithmetic: the same bits as torch's own product, scales as the recipes say, what an outlier does to each."""

from __future__ import annotations

import pytest
import torch

from megatron_ledom.model.precision import BLOCKWISE, DELAYED, RECIPES, TENSORWISE, History, emulated_linear
from megatron_ledom.ops import float8
from megatron_ledom.ops.float8 import E4M3, E5M2

SHAPES = [(64, 128, 96), (16, 16, 16), (130, 272, 48)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("left", "right"), [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
def test_a_product_has_the_bits_of_torchs_scaled_mm(
    shape: tuple[int, int, int], out: torch.dtype, left: torch.dtype, right: torch.dtype
) -> None:
    rows, summed, columns = shape
    a = float8.quantise_tensor(3.7 * random(rows, summed), left)
    b = float8.quantise_tensor(0.02 * random(columns, summed, seed=1), right)
    scales = {"scale_a": a.inverse_scale, "scale_b": b.inverse_scale}
    with torch.backends.mkldnn.flags(enabled=False):  # on processors with AMX oneDNN would sum in another order
        theirs = torch._scaled_mm(a.values, b.values.t(), out_dtype=out, **scales)
        ours = float8.multiply(a, b, out)
    assert ours.dtype == out and torch.equal(ours, theirs)
    fast = torch._scaled_mm(a.values, b.values.t(), out_dtype=out, **scales)
    largest = a.restored().abs() @ b.restored().abs().t()
    assert ((fast.float() - ours.float()).abs() <= torch.finfo(out).eps * largest).all()
    other = float8.multiply(float8.quantise_tensor(3.8 * random(rows, summed), left), b, out)
    assert not torch.equal(other, theirs), "the comparison would not see another scale"


def test_rowwise_scales_have_the_bits_of_torchs_scaled_mm() -> None:
    a, b = random(32, 64), random(48, 64, seed=1)
    rows = [float8.scale_from_amax(x.abs().amax(1, keepdim=True), E4M3) for x in (a, b)]
    a8, b8 = (float8.round_to(x, scale, E4M3) for x, scale in zip((a, b), rows, strict=True))
    scales = {"scale_a": a8.inverse_scale, "scale_b": b8.inverse_scale.t().contiguous()}
    with torch.backends.mkldnn.flags(enabled=False):
        theirs = torch._scaled_mm(a8.values, b8.values.t(), out_dtype=torch.float32, **scales)
    assert torch.equal(float8.multiply(a8, b8, torch.float32), theirs)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_the_largest_value_becomes_the_largest_number(dtype: torch.dtype) -> None:
    x = random(8, 40)
    rounded = float8.quantise_tensor(x, dtype)
    assert rounded.values.float().abs().max() == torch.finfo(dtype).max
    assert rounded.restored().abs().max() == pytest.approx(float(x.abs().max()), rel=1e-6)
    half_a_step = 2.0 ** -(4 if dtype == E4M3 else 3)
    large = x.abs() > x.abs().max() / 64
    assert ((rounded.restored() - x).abs() <= half_a_step * x.abs() * 1.0001)[large].all()


def test_a_scale_of_nothing_is_one_and_too_large_values_saturate() -> None:
    amaxes = torch.tensor([0.0, float("inf"), float("nan"), 1e-45, 448.0])
    scales = float8.scale_from_amax(amaxes, E4M3)
    assert scales[:3].tolist() == [1, 1, 1] and torch.isfinite(scales).all() and scales[4] == 1
    values = float8.round_to(torch.tensor([1e9, -1e9, 449.0]), torch.tensor(1.0), E4M3).values.float()
    assert values.tolist() == [448, -448, 448], "torch's own cast gives NaN for the first two"


def test_blocks_have_scales_of_their_own_which_are_powers_of_two() -> None:
    x = random(130, 300)
    x[:, 128:256] *= 1000
    for rows in (1, float8.BLOCK):
        rounded = float8.quantise_blocks(x, E4M3, rows=rows)
        assert rounded.inverse_scale.shape == x.shape
        assert torch.equal(torch.frexp(rounded.inverse_scale)[0].unique(), torch.tensor([0.5]))
        for i, j in ((0, 0), (0, 128), (129, 256), (128, 299)):
            top, left = i // rows * rows, j // 128 * 128
            block = x[top : top + rows, left : left + 128].abs().max()
            scale = 1 / rounded.inverse_scale[i, j]
            assert 224 < block * scale <= 448


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_three_products_are_near_and_are_rounded(recipe: str, dtype: torch.dtype) -> None:
    x, w = random(4, 24, 256, dtype=dtype), (0.05 * random(192, 256, seed=1)).to(dtype)
    dy = (1e-3 * random(4, 24, 192, seed=2)).to(dtype)
    history = History(16)
    found = []
    for _ in range(2):  # delayed scales are 1 at first
        tensors = [t.clone().requires_grad_() for t in (x, w)]
        y = emulated_linear(tensors[0], tensors[1], recipe, history)
        y.backward(dy)
        assert y.dtype == dtype
        found = [y.detach(), *(t.grad for t in tensors)]
    exact = [t.float().clone().requires_grad_() for t in (x, w)]
    expected = torch.nn.functional.linear(*exact)
    expected.backward(dy.float())
    for ours, right in zip(found, [expected.detach(), *(t.grad for t in exact)], strict=True):
        assert ours is not None and right is not None
        error = (ours.float() - right).norm() / right.norm()
        assert 0.005 < error < 0.08, f"{recipe}: {error:.4f}"


def test_delayed_scales_come_from_the_tensors_before() -> None:
    history, w = History(4), 0.05 * random(32, 64, seed=1)
    seen = []
    for i in range(7):
        x = (2.0 if i == 1 else 1.0) * random(8, 64, seed=i)
        before = history.scale(0, E4M3)
        past = [float(v) for v in seen[-4:]]
        assert float(before) == pytest.approx(448 / max(past) if past else 1.0)
        seen.append(x.abs().max())
        emulated_linear(x, w, DELAYED, history)
    kept = history.amaxes.clone()
    emulated_linear(100 * x, w, DELAYED, history, is_learning=False)
    assert torch.equal(history.amaxes, kept), "an evaluation leaves no trace"
    longer, shorter = History(8), History(2)
    longer.restore(kept)
    shorter.restore(kept)
    assert torch.equal(longer.amaxes[:, :4], kept) and not longer.amaxes[:, 4:].any()
    assert torch.equal(shorter.amaxes, kept[:, :2])


def outlier_errors(channel_scale: float) -> dict[str, float]:
    """Relative error of the forward product by recipe, on activations with one channel that much larger."""
    x, w = random(64, 512), 0.05 * random(128, 512, seed=1)
    history = History(16)
    emulated_linear(x, w, DELAYED, history)  # it has seen ordinary activations
    x[:, 37] *= channel_scale
    w[:, 37] /= channel_scale  # so that the exact product hardly knows of it
    exact = x @ w.t()
    errors = {}
    for recipe in RECIPES:
        y = emulated_linear(x, w, recipe, history, is_learning=False)
        errors[recipe] = float((y - exact).norm() / exact.norm())
    emulated_linear(x, w, DELAYED, history)
    y = emulated_linear(x, w, DELAYED, history)
    errors["delayed, a step later"] = float((y - exact).norm() / exact.norm())
    return errors


def test_an_outlier_channel_tells_the_recipes_apart() -> None:
    """One scale a tensor loses everything else, a stale one cuts the outlier off, blocks lose one block in four."""
    usual, planted = outlier_errors(1.0), outlier_errors(1e6)
    print(f"\nrelative error of the forward product: {usual} without, {planted} with a channel a million times larger")
    assert max(usual.values()) < 0.05
    assert planted[TENSORWISE] > 0.9 and planted["delayed, a step later"] > 0.9
    assert planted[BLOCKWISE] < 0.6 * planted[TENSORWISE]
    assert usual[DELAYED] < planted[DELAYED] < planted[BLOCKWISE], "only the outlier's own share is wrong"
