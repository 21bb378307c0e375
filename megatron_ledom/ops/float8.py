"""The arithmetic of 8-bit training, in plain torch: scales, rounding to FP8, and products of rounded matrices.

    x  --scale-->  x * s  --clamp, round-->  FP8  --/ s-->  what the tensor core sees

It knows no layer and keeps no state: which scale a tensor gets is decided here for scales of the tensor at hand
(`quantise_tensor`, `quantise_blocks`) and by the caller for scales of the past. Products are of the rounded values,
each divided by its scale first, and summed in fp32; `torch._scaled_mm` on the CPU gives the same bits (tested). A
tensor core sums in another order and, on Hopper, with fewer bits: that is not imitated.

The formats (OCP 8-bit floating point, as NVIDIA's tensor cores have them):

    float8_e4m3fn   4 bits of exponent, 3 of fraction, largest 448, smallest 2^-9   weights, activations
    float8_e5m2     5 bits of exponent, 2 of fraction, largest 57,344, smallest 2^-16   gradients

Legend: M rows, K summed axis, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128
"""Side of a block of the blockwise recipe: 1 x 128 of activations and gradients, 128 x 128 of weights."""


@dataclass(frozen=True)
class Rounded:
    """A matrix in FP8.

    Attributes:
        values: FP8 [M, K]; the matrix times its scale, rounded.
        inverse_scale: fp32, what a value is multiplied with; a scalar, or of a shape that broadcasts to [M, K].
    """

    values: torch.Tensor
    inverse_scale: torch.Tensor

    def restored(self) -> torch.Tensor:
        """The rounded matrix in fp32 [M, K]."""
        return self.values.float() * self.inverse_scale


def amax(x: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, fp32 scalar; 0 of an empty tensor."""
    return x.detach().abs().amax().float() if x.numel() else torch.zeros((), dtype=torch.float32)


def scale_from_amax(amaxes: torch.Tensor, dtype: torch.dtype, *, power_of_2: bool = False) -> torch.Tensor:
    """The scale that brings `amaxes` to the largest number of `dtype`.

    Args:
        amaxes: fp32, any shape, not negative.
        dtype: `E4M3` or `E5M2`.
        power_of_2: round the scale down to a power of two, so that scaling is exact.

    Returns:
        fp32 of the same shape; 1 where an amax is 0 or not finite (as Transformer Engine does for delayed scales).
    """
    scale = torch.finfo(dtype).max / amaxes
    if power_of_2:
        _, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    is_usable = torch.isfinite(amaxes) & (amaxes > 0)
    largest = torch.finfo(torch.float32).max
    return torch.where(is_usable, scale.clamp(max=largest), torch.ones_like(scale))


def round_to(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Rounded:
    """Round `x` times `scale` to FP8; what is too large becomes the largest number, as on the device.

    >>> round_to(torch.tensor([[1.0, 1e9]]), torch.tensor(2.0), E4M3).restored()
    tensor([[  1., 224.]])
    """
    largest = torch.finfo(dtype).max
    values = (x.float() * scale).clamp(-largest, largest).to(dtype)
    return Rounded(values, 1.0 / scale)


def quantise_tensor(x: torch.Tensor, dtype: torch.dtype) -> Rounded:
    """Round with one scale, made from the largest value of `x` itself (the tensorwise recipe)."""
    return round_to(x, scale_from_amax(amax(x), dtype), dtype)


def quantise_blocks(x_MK: torch.Tensor, dtype: torch.dtype, *, rows: int) -> Rounded:
    """Round with a power-of-two scale for every block of `rows` x `BLOCK` (the blockwise recipe).

    Args:
        x_MK: fp32 or bf16 [M, K]; blocks run along K, the last of a row or column may be smaller.
        dtype: of the result.
        rows: 1 for activations and gradients, `BLOCK` for weights.
    """
    num_rows, num_columns = x_MK.shape
    padded = torch.nn.functional.pad(x_MK.detach().abs().float(), (0, -num_columns % BLOCK, 0, -num_rows % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // BLOCK, BLOCK)
    scale = scale_from_amax(blocks.amax(dim=(1, 3)), dtype, power_of_2=True)
    spread = scale.repeat_interleave(rows, 0).repeat_interleave(BLOCK, 1)[:num_rows, :num_columns]
    return round_to(x_MK, spread, dtype)


def multiply(a_MK: Rounded, b_NK: Rounded, dtype: torch.dtype) -> torch.Tensor:
    """The product a b^T of two rounded matrices, summed in fp32 and rounded to `dtype`; [M, N]."""
    return (a_MK.restored() @ b_NK.restored().t()).to(dtype)
