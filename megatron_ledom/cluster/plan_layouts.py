"""The layouts that a number of GPUs allows, their predicted speed, and a closed form of their memory.

The closed form only decides which layouts are worth laying out (`plan`), and stands in for that in curves over
hundreds of node counts. What a plan's table shows is laid out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ledom.cluster.plan_model import Gpu, Shape
from megatron_ledom.cluster.plan_speed import Run, Speed, predict

NO_RECOMPUTE, RECOMPUTE_MLP, RECOMPUTE_ALL = "none", "mlp", "full"
RECOMPUTE_FLAGS: dict[str, tuple[str, ...]] = {
    NO_RECOMPUTE: (),
    RECOMPUTE_MLP: ("--recompute-granularity", "selective", "--recompute-modules", "mlp"),
    RECOMPUTE_ALL: (
        *("--recompute-granularity", "full"),
        *("--recompute-method", "uniform", "--recompute-num-layers", "1"),
    ),
}
BF16, FP8, FP8_PARAMETERS = "bf16", "fp8", "fp8-parameters"
PRECISIONS = (BF16, FP8, FP8_PARAMETERS)


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what.

    Attributes:
        shape: the model, vocabulary padded for TP 1.
        seq_length, global_batch_size: tokens of a sample, samples of a step.
        num_gpus, gpus_per_node: the allocation.
        gpu: their kind.
        precision: of `PRECISIONS`.
        distributed_optimizer: whether the optimizer is divided among data-parallel ranks.
    """

    shape: Shape
    seq_length: int
    global_batch_size: int
    num_gpus: int
    gpus_per_node: int
    gpu: Gpu
    precision: str = BF16
    distributed_optimizer: bool = True


@dataclass(frozen=True)
class Layout:
    """A layout of a job: sizes, micro-batch, what is recomputed."""

    tensor: int
    pipeline: int
    data: int
    micro_batch_size: int
    recompute: str

    def flags(self, job: Job) -> list[str]:
        """The flags of `tools/pretrain.py` that ask for it."""
        sizes = {
            "--tensor-model-parallel-size": self.tensor,
            "--pipeline-model-parallel-size": self.pipeline,
            "--micro-batch-size": self.micro_batch_size,
            "--global-batch-size": job.global_batch_size,
        }
        sequence = ["--sequence-parallel"] if self.tensor > 1 else []
        return [*(str(word) for pair in sizes.items() for word in pair), *sequence, *RECOMPUTE_FLAGS[self.recompute]]

    def __str__(self) -> str:
        sizes = f"TP{self.tensor} PP{self.pipeline} DP{self.data}"
        return f"{sizes}, micro-batch {self.micro_batch_size}, recompute {self.recompute}"


def candidates(job: Job) -> Iterator[Layout]:
    """Every layout in powers of two that the model and the batch allow."""
    shape = job.shape
    for tensor in _powers(min(job.gpus_per_node, job.num_gpus)):
        fits_groups = shape.groups % tensor == 0 or tensor % shape.groups == 0
        if shape.heads % tensor or shape.ffn % tensor or job.seq_length % tensor or not fits_groups:
            continue
        for pipeline in _powers(min(shape.num_layers, job.num_gpus // tensor)):
            if shape.num_layers % pipeline or job.num_gpus % (tensor * pipeline):
                continue
            data = job.num_gpus // (tensor * pipeline)
            for micro in _powers(8):
                if job.global_batch_size % (data * micro):
                    continue
                for recompute in RECOMPUTE_FLAGS:
                    yield Layout(tensor, pipeline, data, micro, recompute)


def _powers(limit: int) -> Iterator[int]:
    power = 1
    while power <= limit:
        yield power
        power *= 2


def speed_of(job: Job, layout: Layout) -> Speed:
    """The predicted speed of a layout."""
    shape = job.shape
    mlp_share = shape.hidden * shape.ffn * (3 if shape.gated else 2) / shape.layer_matrices
    recomputed = {NO_RECOMPUTE: 0.0, RECOMPUTE_MLP: mlp_share, RECOMPUTE_ALL: 1.0}[layout.recompute]
    run = Run(
        shape=replace(shape, vocabulary=pad(shape.vocabulary, layout.tensor)),
        seq_length=job.seq_length,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=layout.data,
        micro_batches=job.global_batch_size // (layout.data * layout.micro_batch_size),
        micro_batch_size=layout.micro_batch_size,
        recomputed=recomputed,
        fp8=job.precision != BF16,
        gpus_per_node=job.gpus_per_node,
        with_step=True,
    )
    return predict(run, job.gpu)


def pad(vocabulary: int, tensor: int, multiple: int = 128) -> int:
    """Rows of the tables under tensor parallelism: Megatron's `--make-vocab-size-divisible-by` times its size."""
    return -(-vocabulary // (multiple * tensor)) * multiple * tensor


def linear_weights(job: Job, layout: Layout) -> int:
    """Weights of the layers' matrices on a rank: what FP8 keeps copies of."""
    return job.shape.num_layers // layout.pipeline * job.shape.layer_matrices // layout.tensor


def closed_form_bytes(job: Job, layout: Layout) -> float:
    """A rough count of the first stage's bytes, from the sizes alone."""
    shape, tokens = job.shape, job.seq_length * layout.micro_batch_size
    tables = shape.vocabulary * shape.hidden * (2 if layout.pipeline == 1 else 1)
    held = linear_weights(job, layout) + tables / layout.tensor
    static = held * (2 + 4 + 12 / (layout.data if job.distributed_optimizer else 1))
    static += 2 * linear_weights(job, layout) if job.precision == FP8 else 0
    qkv = shape.head_dim * (shape.heads + 2 * shape.groups)
    mlp = 2.0 * shape.ffn * (3 if shape.gated else 2)
    whole_layer = 2.0 * (5 * shape.hidden + 2 * qkv + shape.heads * shape.head_dim) + mlp
    kept = {NO_RECOMPUTE: whole_layer, RECOMPUTE_MLP: whole_layer - mlp, RECOMPUTE_ALL: 2.0 * shape.hidden}
    in_flight = min(layout.pipeline, job.global_batch_size // (layout.data * layout.micro_batch_size))
    layers = shape.num_layers // layout.pipeline * in_flight
    moment = 6.0 * shape.vocabulary if layout.pipeline == 1 else 0.0
    moment = max(moment, whole_layer) if layout.recompute != NO_RECOMPUTE else moment
    return static + tokens * (layers * kept[layout.recompute] + moment) / layout.tensor


def best_by_closed_form(job: Job, budget_bytes: float) -> tuple[Layout, Speed] | None:
    """The fastest layout that the closed form lets in, or None."""
    fitting = [layout for layout in candidates(job) if closed_form_bytes(job, layout) <= budget_bytes]
    if not fitting:
        return None
    return max(((layout, speed_of(job, layout)) for layout in fitting), key=lambda pair: pair[1].tokens_per_s)
