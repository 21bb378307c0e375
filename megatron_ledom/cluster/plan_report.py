"""A plan as a table and as a picture, and the speed model beside what others have measured."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from megatron_ledom.cluster.plan import Memory, Plan, Row
from megatron_ledom.cluster.plan_model import GIB
from megatron_ledom.cluster.plan_speed import error, predict
from megatron_ledom.cluster.published import published_results

COLUMNS = ("TP", "PP", "DP", "mb", "recompute", "weights", "grads", "optim", "activ", "fp8", "total", "TFLOP/s", "MFU")
LAST_COLUMNS = ("tokens/s", "days")
PARTS = ("weights", "gradients", "optimizer", "activations", "fp8_copies")


def format_plan(plan: Plan) -> str:
    """The plan as text: memory in GiB of the fullest rank, speeds a GPU, tokens a second of all GPUs."""
    job = plan.job
    head = (
        f"{plan.name}: {_count(job.shape.parameters)} parameters, {job.seq_length} tokens x "
        f"{job.global_batch_size} samples a step, {job.precision}, {job.num_gpus} x {job.gpu.name} "
        f"({job.gpus_per_node} a node), "
        f"{plan.budget_bytes / GIB:.1f} GiB each for tensors"
    )
    lines = [head, "", _line((*COLUMNS, *LAST_COLUMNS))]
    lines += [_row(plan, row) for row in plan.rows]
    if plan.own is not None:
        fits = plan.own.memory.total <= plan.budget_bytes
        lines += ["", f"as the flags have it ({'fits' if fits else 'does NOT fit'}):", _row(plan, plan.own)]
    lines += ["", f"{plan.num_candidates} layouts are possible, {plan.num_screened} are far too large."]
    if plan.too_large:
        lines.append(f"Faster or as fast, but too large when laid out: {len(plan.too_large)}, as these:")
        lines += [_row(plan, row) for row in plan.too_large[:3]]
    lines += ["", "Fastest layout over numbers of nodes (memory by a closed form, not laid out):"]
    lines.append(f"{'nodes':>6} {'GPUs':>6} {'days':>8} {'GPU hours':>12} {'MFU':>6}  layout")
    for p in plan.curve:
        hours = p.days * 24 * p.gpus
        numbers = f"{p.nodes:>6} {p.gpus:>6} {_days(p.days):>8} {hours:>12,.0f} {100 * p.speed.mfu:>4.1f} %"
        lines.append(f"{numbers}  {p.layout}")
    return "\n".join([*lines, "", *caveats(plan)])


def caveats(plan: Plan) -> list[str]:
    """What a reader of the numbers must know."""
    lines = [f"Memory: the real model laid out in fake tensors; speed: fitted on published H100 runs, {_errors()}."]
    if not plan.job.gpu.calibrated:
        lines.append(f"{plan.job.gpu.name}: its peak and bandwidth in the H100's model; not calibrated on it.")
    if plan.job.precision != "bf16":
        lines.append("FP8: copies by the number of weights; activations counted as in BF16; compared with no run.")
    return lines


def _errors() -> str:
    held = [abs(error(row)) for row in published_results() if not row.fits]
    median, most = 100 * statistics.median(held), 100 * max(held)
    return f"error on {len(held)} others held out: median {median:.1f} %, at most {most:.0f} %"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _days(days: float) -> str:
    return f"{days:.1f}" if days >= 1 else f"{days:.2f}"


def _line(words: tuple[Any, ...]) -> str:
    widths = (3, 3, 5, 3, 9, 8, 7, 7, 7, 6, 7, 8, 7, 11, 7)
    return " ".join(f"{word:>{width}}" for word, width in zip(words, widths, strict=True))


def _row(plan: Plan, row: Row) -> str:
    layout, memory, speed = row.layout, row.memory, row.speed
    sizes = (layout.tensor, layout.pipeline, layout.data, layout.micro_batch_size, layout.recompute)
    parts = [f"{getattr(memory, name) / GIB:.1f}" for name in (*PARTS, "total")]
    rates = [f"{speed.tflops:.0f}", f"{100 * speed.mfu:.1f} %", f"{speed.tokens_per_s * plan.job.num_gpus:,.0f}"]
    return _line((*sizes, *parts, *rates, _days(plan.days(speed))))


def format_calibration() -> str:
    """The speed model beside every published result."""
    lines = [f"{'published result':<36} {'':>9} {'TFLOP/s':>8} {'predicted':>10} {'error':>7}  assumed"]
    for row in sorted(published_results(), key=lambda row: not row.fits):
        flops = row.run.shape.model_flops(row.run.seq_length, whole_square=row.whole_square)
        tflops = predict(row.run).tokens_per_s * flops / 1e12
        kind = "fitted" if row.fits else "held out"
        lines.append(
            f"{row.name:<36} {kind:>9} {row.tflops:>8.1f} {tflops:>10.1f} {100 * error(row):>+6.1f} %  {row.assumed}"
        )
    return "\n".join([*lines, "", "Over the " + _errors()])


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw memory of the layouts, their speed, and the cost over nodes, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 6))
    _draw_memory(left, plan)
    _draw_curve(right, plan)
    job = plan.job
    figure.suptitle(f"{plan.name}, {job.precision}, {job.num_gpus} x {job.gpu.name}, {plan.tokens / 1e9:.0f} B tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_memory(axes: Any, plan: Plan) -> None:
    rows = [*plan.rows, *plan.too_large[:3]]
    places = [len(rows) - index for index in range(len(rows))]
    start = [0.0] * len(rows)
    for part in PARTS:
        widths = [_gib(row.memory, part) for row in rows]
        if any(widths):
            axes.barh(places, widths, left=start, label=part.replace("_", " "))
            start = [a + b for a, b in zip(start, widths, strict=True)]
    for place, end, row in zip(places, start, rows, strict=True):
        axes.text(end + 0.5, place, f"{end:.0f} GiB, {100 * row.speed.mfu:.0f} % MFU", va="center", fontsize=8)
    axes.axvline(plan.budget_bytes / GIB, color="black", linestyle="--", label="budget")
    labels = [str(row.layout).replace(", micro-batch ", "\nmb ").replace(", recompute ", ", rec. ") for row in rows]
    axes.set_yticks(places, labels, fontsize=7)
    axes.set_xlim(0, 1.35 * max([*start, plan.budget_bytes / GIB]))
    axes.set_xlabel("GiB on the fullest rank")
    axes.legend(fontsize=8, loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.1))
    axes.set_title("memory of the fastest layouts")


def _gib(memory: Memory, part: str) -> float:
    return float(getattr(memory, part)) / GIB


def _draw_curve(axes: Any, plan: Plan) -> None:
    gpus = [point.gpus for point in plan.curve]
    axes.plot(gpus, [point.days for point in plan.curve], marker="o", label="days")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(gpus, [str(count) for count in gpus])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("days")
    axes.grid(visible=True, which="both", alpha=0.3)
    other = axes.twinx()
    hours = [point.days * 24 * point.gpus / 1e3 for point in plan.curve]
    other.plot(gpus, hours, marker="s", color="tab:red", label="thousand GPU hours")
    other.set_ylabel("thousand GPU hours")
    other.set_ylim(0, 1.2 * max(hours))
    handles = [*axes.get_lines(), *other.get_lines()]
    axes.legend(handles, [line.get_label() for line in handles], fontsize=8)
    axes.set_title("the whole training over numbers of GPUs, fastest layout each")
