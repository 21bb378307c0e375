"""How long a step takes: a sum of physical terms, four constants of which are fitted on published results.

    matrices     operations / (peak x MATRIX_EFFICIENCY), in FP8 divided by FP8_GAIN
    attention    causal operations / the published rate of the kernel at this length
    memory       bytes that norms, residuals, activations, logits and FP8 casts move x MEMORY_TRAFFIC / bandwidth
    tensor       collectives of sequence parallelism over NVLink x TENSOR_EXPOSED
    pipeline     (stages - 1) / (micro-batches x virtual stages) of the above stand idle
    data         gradients and parameters over the network, where backward does not hide them; the optimizer's step

The first four are seconds a token and GPU; `published` holds the results and which of them fit the constants.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_ledom.cluster.plan_model import GPUS, Gpu, Shape

if TYPE_CHECKING:
    from megatron_ledom.cluster.published import Published

ATTENTION_TFLOPS: dict[str, tuple[tuple[int, float], ...]] = {
    # Causal, head size 128, forward and backward together, H100. FlashAttention 2: as published. cuDNN: its published
    # forward times FlashAttention 2's ratio of both to forward at that length (its own backward is not published).
    "flash-attention 2": ((2048, 265.0), (4096, 294.0), (8192, 308.0), (16_384, 328.0)),
    "cudnn": ((2048, 430.0), (4096, 477.0), (8192, 489.0), (16_384, 528.0)),
}
H100_PEAK = 989e12
NVLINK_BYTES_S = 450e9
NETWORK_BYTES_S = 50e9
"""A GPU's share of the network between nodes: 400 Gb/s."""
NETWORK_EFFICIENCY = 0.8
HOP_S = 20e-6
"""What each doubling of the data-parallel ranks adds to a collective's latency; an assumption."""
BUCKETS = 40


@dataclass(frozen=True)
class Constants:
    """What is fitted.

    Attributes:
        matrix_efficiency: share of the BF16 peak that matrix products reach.
        memory_traffic: bytes moved, as a multiple of the least that fused kernels move.
        tensor_exposed: share of the tensor-parallel collectives that computing doesn't hide.
        fp8_gain: speed of FP8 matrix products over BF16 ones.
    """

    matrix_efficiency: float
    memory_traffic: float
    tensor_exposed: float
    fp8_gain: float


FITTED = Constants(matrix_efficiency=0.6275, memory_traffic=3.769, tensor_exposed=0.654, fp8_gain=2.0)
"""`fit(published_results())`, rounded; a test fits them again."""


@dataclass(frozen=True)
class Run:
    """A run, as far as its speed goes.

    Attributes:
        shape: the model.
        seq_length: tokens of a sample.
        tensor, pipeline, virtual, data: the layout; `virtual` stages a rank.
        micro_batches: of a step, on each data-parallel rank.
        micro_batch_size: samples of one.
        recomputed: share of the layers' forward pass that backward repeats (full: 1; the MLP: its share).
        fp8: the layers' matrix products in FP8.
        attention: the kernel, of `ATTENTION_TFLOPS`.
        gpus_per_node: ranks that NVLink joins.
        with_step: whether data parallelism and the optimizer's step are counted (published rates hide them well).
    """

    shape: Shape
    seq_length: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    micro_batches: int = 1
    micro_batch_size: int = 1
    recomputed: float = 0.0
    fp8: bool = False
    attention: str = "cudnn"
    gpus_per_node: int = 8
    with_step: bool = False


@dataclass(frozen=True)
class Speed:
    """What is predicted of a run.

    Attributes:
        tokens_per_s: a GPU.
        tflops: a GPU, by Megatron's count (no recomputation, attention's causal half).
        mfu: of the BF16 peak, whatever the precision.
        step_s: seconds a step.
        parts: term -> share of the step.
    """

    tokens_per_s: float
    tflops: float
    mfu: float
    step_s: float
    parts: dict[str, float]


def predict(run: Run, gpu: Gpu = GPUS["h100"], constants: Constants = FITTED) -> Speed:
    """Predict the speed of `run`."""
    ranks = run.tensor * run.pipeline
    parts = {name: s / ranks for name, s in _seconds_a_token(run, gpu, constants).items()}
    busy = sum(parts.values())
    bubble = busy * (run.pipeline - 1) / (run.micro_batches * run.virtual) if run.pipeline > 1 else 0.0
    tokens = run.micro_batches * run.micro_batch_size * run.seq_length * run.data
    gpus = ranks * run.data
    parts["pipeline"] = bubble
    step_s = (busy + bubble) * tokens / run.data
    if run.with_step:
        data_s = _data_seconds(run, gpu, backward_s=busy * run.micro_batch_size * run.seq_length * 2 / 3)
        parts["data and optimizer"] = data_s / (tokens / run.data)
        step_s += data_s
    per_gpu = tokens / step_s / gpus
    tflops = per_gpu * run.shape.model_flops(run.seq_length) / 1e12
    total = sum(parts.values())
    return Speed(per_gpu, tflops, tflops * 1e12 / gpu.peak_bf16, step_s, {k: v / total for k, v in parts.items()})


def _seconds_a_token(run: Run, gpu: Gpu, constants: Constants) -> dict[str, float]:
    """Seconds that a token takes, summed over the ranks of one copy of the model."""
    shape, again = run.shape, 1 + run.recomputed / 3
    layers = 6.0 * shape.num_layers * shape.layer_matrices * again
    rate = gpu.peak_bf16 * constants.matrix_efficiency
    matrices = layers / (rate * (constants.fp8_gain if run.fp8 else 1)) + 6.0 * shape.vocabulary * shape.hidden / rate
    attention_rate = attention_tflops(run.attention, run.seq_length) * 1e12 * gpu.peak_bf16 / H100_PEAK
    attention_rate *= min(1.0, shape.head_dim / 128) ** 0.5  # smaller heads fill the tensor cores less
    attention = shape.attention_flops(run.seq_length) * again / attention_rate
    memory = _bytes_a_token(run) * constants.memory_traffic / gpu.memory_bandwidth
    moved = 10 * shape.num_layers * shape.hidden * 2 * (run.tensor - 1) * (1 + 0.2 * run.recomputed)
    tensor = moved / NVLINK_BYTES_S * constants.tensor_exposed
    return {"matrices": matrices, "attention": attention, "memory": memory, "tensor": tensor}


def _bytes_a_token(run: Run) -> float:
    """Bytes that a token's elementwise work moves at least, forward and backward, all layers and the logits."""
    shape = run.shape
    qkv = shape.head_dim * (shape.heads + 2 * shape.groups)
    wide = (3 if shape.gated else 2) * shape.ffn
    elements = 2 * (2 + 3) * shape.hidden + 2 * qkv + wide  # two norms, two residual sums, rotary positions, activation
    layer = 3.0 * 2 * elements * (1 + run.recomputed / 3)
    if run.fp8:  # casts that no other kernel does on its way: attention's output, every gradient; 2 read, 1 + 1 written
        up = (2 if shape.gated else 1) * shape.ffn
        layer += (2 + 2) * (shape.heads * shape.head_dim + qkv + up + 2 * shape.hidden)
    logits = (2 + 4 + 4 + 4 + 2) * shape.vocabulary
    return shape.num_layers * layer + logits


def _data_seconds(run: Run, gpu: Gpu, backward_s: float) -> float:
    """What a step adds: the optimizer, and the collectives over data-parallel ranks that computing doesn't hide.

    Gradients go out in fp32 during the last micro-batch's backward pass, parameters come in in BF16 during the first
    one's forward pass (half as long).
    """
    held = run.shape.parameters / (run.tensor * run.pipeline)
    optimizer = (4 + 2 * 12 + 2) * held / run.data / gpu.memory_bandwidth
    if run.data == 1:
        return optimizer
    is_inside = run.tensor * run.pipeline * run.data <= run.gpus_per_node
    rate = NVLINK_BYTES_S if is_inside else NETWORK_BYTES_S * NETWORK_EFFICIENCY
    share, latency = (run.data - 1) / run.data, BUCKETS * HOP_S * math.log2(run.data)
    gradients = max(0.0, 4 * held * share / rate + latency - backward_s)
    parameters = max(0.0, 2 * held * share / rate + latency - backward_s / 2)
    tail = (4 + 2) * held / BUCKETS / rate  # the last bucket has nothing to hide behind
    return optimizer + gradients + parameters + tail


def attention_tflops(kernel: str, seq_length: int) -> float:
    """The published rate of a kernel at a length, between two lengths on a line over the logarithm."""
    table = ATTENTION_TFLOPS[kernel]
    lengths = [length for length, _ in table]
    at = bisect.bisect_left(lengths, seq_length)
    if at == 0:
        return table[0][1]
    if at == len(table):
        return table[-1][1]
    (x0, y0), (x1, y1) = table[at - 1], table[at]
    return y0 + (y1 - y0) * math.log(seq_length / x0) / math.log(x1 / x0)


def error(row: Published, constants: Constants = FITTED) -> float:
    """Predicted over published, less one: by tokens a second where the source has them, else by its TFLOP/s."""
    speed = predict(row.run, constants=constants)
    if row.tokens_per_s is not None:
        return speed.tokens_per_s / row.tokens_per_s - 1
    flops = row.run.shape.model_flops(row.run.seq_length, whole_square=row.whole_square)
    return speed.tokens_per_s * flops / 1e12 / row.tflops - 1


def fit(rows: Sequence[Published]) -> Constants:
    """Fit the four constants to the rows that are for it: least squares of the logarithms, by a shrinking search."""
    fitting = [row for row in rows if row.fits]
    bounds = {"matrix_efficiency": 0.95, "memory_traffic": 6.0, "tensor_exposed": 1.0, "fp8_gain": 2.0}
    lows = {"matrix_efficiency": 0.3, "memory_traffic": 1.0, "tensor_exposed": 0.0, "fp8_gain": 1.0}
    best = Constants(**{name: (lows[name] + bounds[name]) / 2 for name in bounds})
    widths = {name: (bounds[name] - lows[name]) / 2 for name in bounds}

    def loss(constants: Constants) -> float:
        return sum(math.log1p(error(row, constants)) ** 2 for row in fitting)

    lowest = loss(best)
    for _ in range(400):
        has_moved = False
        for name, width in widths.items():
            for step in (-width, width):
                value = min(bounds[name], max(lows[name], getattr(best, name) + step))
                trial = replace(best, **{name: value})
                found = loss(trial)
                if found < lowest:
                    best, lowest, has_moved = trial, found, True
        if not has_moved:
            widths = {name: width / 1.5 for name, width in widths.items()}
    return best
