"""The plan of a run: which layouts fit, how fast each would be, and what the whole training costs.

flags -> model, batch -> candidates by predicted speed -> the real model laid out -> those that fit, ranked;
beside them the cost over numbers of nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ledom.cluster.plan_layouts import (
    BF16,
    FP8,
    FP8_PARAMETERS,
    Job,
    Layout,
    best_by_closed_form,
    candidates,
    closed_form_bytes,
    linear_weights,
    pad,
    speed_of,
)
from megatron_ledom.cluster.plan_model import GIB, get_gpu, shape_of
from megatron_ledom.cluster.plan_speed import Speed
from megatron_ledom.errors import UsageError
from megatron_ledom.log import Progress

SCREEN = 0.75
"""A layout is not laid out where even this share of the closed form is more than the memory."""
LAID_OUT_DATA = 8
"""Data-parallel ranks that are laid out at most: beyond, only the optimizer's share shrinks, in proportion."""
MOST_LAID_OUT = 4
"""Times the layouts that are wanted: so many are laid out before the search ends with fewer."""
DAY_S = 86_400
CURVE_NODES = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Memory:
    """What the fullest rank of a layout holds, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    fp8_copies: int

    @property
    def total(self) -> int:
        """All five."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.fp8_copies


@dataclass(frozen=True)
class Row:
    """A layout with what is predicted of it."""

    layout: Layout
    memory: Memory
    speed: Speed


@dataclass(frozen=True)
class CurvePoint:
    """The fastest layout on a number of nodes."""

    nodes: int
    gpus: int
    layout: Layout
    speed: Speed
    days: float


@dataclass(frozen=True)
class Plan:
    """A finished plan.

    Attributes:
        job: what was planned.
        name: of the model.
        tokens: of the whole training.
        budget_bytes: memory that tensors may take.
        rows: the fastest layouts that fit, fastest first.
        too_large: layouts that were laid out and do not fit, with their bytes.
        num_candidates: layouts that the model allows.
        num_screened: of these, ruled out by the closed form.
        own: the layout that the flags themselves ask for, fitting or not; None where it is none.
        curve: the cost over numbers of nodes, by the closed form.
    """

    job: Job
    name: str
    tokens: float
    budget_bytes: float
    rows: list[Row]
    too_large: list[Row]
    num_candidates: int
    num_screened: int
    own: Row | None
    curve: list[CurvePoint]

    def days(self, speed: Speed) -> float:
        """Days that the training takes at a speed."""
        return self.tokens / (speed.tokens_per_s * self.job.num_gpus) / DAY_S


@dataclass(frozen=True)
class Wish:
    """What the user asks for.

    Attributes:
        argv: flags of `tools/pretrain.py`, preset included.
        nodes, gpus_per_node, gpu: the allocation.
        precision: of `plan_layouts.PRECISIONS`.
        vocabulary: rows of the tables before padding.
        tokens: of the whole training.
        reserve_gib: memory that tensors do not get: CUDA's context, NCCL, workspaces, fragmentation.
        show: layouts to find.
    """

    argv: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    gpu: str
    precision: str = BF16
    vocabulary: int = 64_256
    tokens: float = 435e9
    reserve_gib: float = 5.0
    show: int = 6


def make_plan(wish: Wish) -> Plan:
    """Plan a run.

    Raises:
        UsageError: flags that Megatron refuses, a model that the plan does not know, or no layout that fits.
    """
    from megatron_ledom.engine import cpu

    cpu.install()
    tokenizer = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(wish.vocabulary - 1)]
    argv = [*_schedule_flags(wish.argv), *wish.argv, *tokenizer]
    job, own, name = read_job(wish, argv)
    budget = job.gpu.memory_bytes - wish.reserve_gib * GIB
    allowed = list(candidates(job))
    if not allowed:
        raise UsageError(
            f"no layout: {job.num_gpus} GPUs do not divide a global batch of {job.global_batch_size} samples and "
            f"{job.shape.num_layers} layers; change --nodes or --global-batch-size"
        )
    worth = [layout for layout in allowed if SCREEN * closed_form_bytes(job, layout) <= budget]
    worth.sort(key=lambda layout: speed_of(job, layout).tokens_per_s, reverse=True)
    rows, too_large = _lay_out_until(job, argv, worth, budget, wish.show)
    if not rows:
        raise UsageError(
            f"nothing fits: {len(allowed)} layouts of {name} on {job.num_gpus} x {job.gpu.name}, "
            f"{budget / GIB:.0f} GiB each after the reserve; take more nodes or GPUs with more memory"
        )
    own_row = None
    if own is not None:
        found = [row for row in rows + too_large if row.layout == own]
        own_row = found[0] if found else lay_out(job, argv, own)
    curve = cost_curve(job, wish, budget)
    screened = len(allowed) - len(worth)
    return Plan(job, name, wish.tokens, budget, rows, too_large, len(allowed), screened, own_row, curve)


def _schedule_flags(argv: Sequence[str]) -> list[str]:
    """What Megatron wants of a training run, and neither memory nor speed depend on, where it is missing."""
    words = {word.split("=", 1)[0] for word in argv}
    length = [] if words & {"--preset", "--train-iters", "--train-samples"} else ["--train-iters", "1000"]
    return [*length, *([] if words & {"--preset", "--lr"} else ["--lr", "1e-4"])]


def read_job(wish: Wish, argv: Sequence[str]) -> tuple[Job, Layout | None, str]:
    """What the flags describe: the job, the layout that they ask for themselves, and a name."""
    from megatron_ledom.engine.arguments import parse_arguments
    from megatron_ledom.engine.fake_ranks import rank_environment

    gpu = get_gpu(wish.gpu)
    num_gpus = wish.nodes * wish.gpus_per_node
    if wish.precision != BF16 and not gpu.has_fp8:
        raise UsageError(f"--precision {wish.precision}: {gpu.name} has no FP8; use bf16 or another --gpu")
    with rank_environment(0, num_gpus):
        args = parse_arguments([*argv, "--run-dir", "plan", "--data-report-only"], "cpu")
    if args.global_batch_size is None:
        raise UsageError("--global-batch-size is missing: cost and memory depend on it")
    if args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank:
        raise UsageError(
            "virtual pipeline stages are not planned: drop their flag; they shrink the pipeline's idle share"
        )
    job = Job(
        shape=shape_of(args, pad(wish.vocabulary, 1, args.make_vocab_size_divisible_by)),
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        num_gpus=num_gpus,
        gpus_per_node=wish.gpus_per_node,
        gpu=gpu,
        precision=wish.precision,
        distributed_optimizer=bool(args.use_distributed_optimizer),
    )
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    own = None
    if num_gpus % ranks == 0 and not args.recompute_granularity:
        sizes = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, num_gpus // ranks
        own = Layout(*sizes, args.micro_batch_size or 1, "none")
        own = own if own in set(candidates(job)) else None
    return job, own, args.preset or "this model"


def _lay_out_until(
    job: Job, argv: Sequence[str], layouts: list[Layout], budget: float, show: int
) -> tuple[list[Row], list[Row]]:
    """Lay out layouts in their order until `show` fit; returns those and the ones that did not."""
    rows: list[Row] = []
    too_large: list[Row] = []
    refused: list[UsageError] = []
    progress = Progress("laid out", None, "layouts")
    for layout in layouts:
        if len(rows) == show or len(rows) + len(too_large) == MOST_LAID_OUT * show:
            break
        try:
            row = lay_out(job, argv, layout)
        except UsageError as error:  # Megatron's own validation, for one layout of many
            refused.append(error)
            continue
        (rows if row.memory.total <= budget else too_large).append(row)
        progress.update(1)
    progress.close()
    if refused and not rows + too_large:
        raise refused[0]
    return rows, too_large


def lay_out(job: Job, argv: Sequence[str], layout: Layout) -> Row:
    """Lay out the first and the last stage of a layout and keep the fuller one."""
    from megatron_ledom.train.laid_out import lay_out_rank

    data = min(layout.data, LAID_OUT_DATA)
    micro_batches = job.global_batch_size // (layout.data * layout.micro_batch_size)
    world = layout.tensor * layout.pipeline * data
    flags = [*argv, *layout.flags(replace(job, global_batch_size=data * layout.micro_batch_size * micro_batches))]
    found = []
    for rank in {0, world - 1} if layout.pipeline > 1 else {0}:
        laid = lay_out_rank(flags, rank, world, for_cuda=True, num_microbatches=min(micro_batches, layout.pipeline))
        share = data / layout.data if job.distributed_optimizer else 1.0
        linear = linear_weights(job, layout)
        saved = linear if job.precision == FP8_PARAMETERS else 0
        copies = {BF16: 0, FP8: 2 * linear, FP8_PARAMETERS: linear}[job.precision]
        found.append(
            Memory(laid.weights - saved, laid.gradients, round(laid.optimizer * share), laid.activations, copies)
        )
    return Row(layout, max(found, key=lambda memory: memory.total), speed_of(job, layout))


def cost_curve(job: Job, wish: Wish, budget: float) -> list[CurvePoint]:
    """The fastest layout on 1, 2, 4, ... nodes, as long as the batch can be divided."""
    points = []
    for nodes in CURVE_NODES:
        gpus = nodes * job.gpus_per_node
        best = best_by_closed_form(replace(job, num_gpus=gpus), budget)
        if best is not None:
            layout, speed = best
            days = wish.tokens / (speed.tokens_per_s * gpus) / DAY_S
            points.append(CurvePoint(nodes, gpus, layout, speed, days))
    return points
