"""The report of an evaluation for people: Markdown and a picture. The numbers are `evaluation.py`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ledom.rerank.strategies import (
    BROKEN_TIES,
    COMBINED,
    FORWARD,
    GREEDY,
    MAJORITY,
    ORACLE,
    RANDOM,
    REVERSE,
)

COLOURS = {
    ORACLE: "#8c8c8c",
    BROKEN_TIES: "#7d4e9e",
    COMBINED: "#c0392b",
    REVERSE: "#e59866",
    MAJORITY: "#1e8449",
    FORWARD: "#2c5f8a",
    RANDOM: "#b0b0b0",
    GREEDY: "#222222",
}


def format_markdown(report: Mapping[str, Any]) -> str:
    """Return the whole report: accuracy against N, intervals, differences, what was chosen."""
    sizes, last = report["sizes"], str(report["sizes"][-1])
    blocks = [
        _format_head(report),
        _format_sizes(report["accuracy"], report["strategies"], sizes),
        f"At N = {last}, with {_percent(0.95)} intervals; differences in points, on the same problems:",
        _format_largest(report, last),
        "Chosen on the held-out problems:",
        _format_choices(report["runs"]),
    ]
    if len(report["runs"]) > 1:
        blocks += [f"Run by run, at N = {last}, accuracy in %:", _format_runs(report, last)]
    return "\n\n".join(blocks) + "\n"


def _format_head(report: Mapping[str, Any]) -> str:
    runs = report["runs"]
    text = (
        f"{report['num_problems']:,} problems, {len(runs)} run{'s' if len(runs) > 1 else ''} of "
        f"{report['sizes'][-1]} samples; accuracy in %. Lambda and normalisation were chosen, for each N, on "
        f"{', '.join(str(run['num_held_out']) for run in runs)} other problems. N < {report['sizes'][-1]}: mean over "
        f"{report['num_sets']} random sets of samples. Intervals: paired bootstrap over problems, "
        f"{report['num_resamples']:,} resamples."
    )
    missing = sum(run["num_missing"] for run in runs)
    if missing:
        text += f" Samples missing from the files, which count as wrong: {missing}."
    if GREEDY not in report["strategies"]:
        text += ' No greedy baseline: not every question has a candidate with "greedy": true.'
    return text


def _format_sizes(accuracy: Mapping[str, Any], strategies: Sequence[str], sizes: Sequence[int]) -> str:
    rows = [[name, *(f"{100 * accuracy[str(n)][name]['mean']:.1f}" for n in sizes)] for name in strategies]
    return _table(["chosen by", *(f"N = {n}" for n in sizes)], rows)


def _format_largest(report: Mapping[str, Any], last: str) -> str:
    differences = report["differences"][last]
    rows = []
    for name in report["strategies"]:
        row = [name, _with_interval(report["accuracy"][last][name])]
        row += ["" if name == base else _with_interval(differences[base][name], sign="+") for base in differences]
        rows.append(row)
    return _table(["chosen by", "accuracy", *(f"minus {base}" for base in differences)], rows)


def _format_choices(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for number, run in enumerate(runs, start=1):
        for size, choice in run["chosen"].items():
            if size == "1":  # nothing to choose
                continue
            accuracy = f"{100 * choice['held_out_accuracy']:.1f}"
            rows.append(
                [
                    str(number),
                    size,
                    f"{choice['lambda']:.2f}",
                    choice["normalize"],
                    accuracy,
                    choice["forward_normalize"],
                ]
            )
    heads = ["run", "N", "lambda", "normalisation", "accuracy there", "normalisation of forward likelihood"]
    return _table(heads, rows)


def _format_runs(report: Mapping[str, Any], last: str) -> str:
    numbers = range(len(report["runs"]))
    rows = [
        [name, *(f"{100 * report['accuracy_by_run'][n][name]['mean']:.1f}" for n in numbers)]
        for name in report["strategies"]
    ]
    for base in report["differences"][last]:
        cells = [_with_interval(report["differences_by_run"][n][base][COMBINED], sign="+") for n in numbers]
        rows.append([f"{COMBINED} minus {base}", *cells])
    return _table(["chosen by", *(f"run {n + 1}" for n in numbers)], rows)


def _with_interval(interval: Mapping[str, float], sign: str = "") -> str:
    mean, low, high = (f"{100 * interval[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned as plain text."""
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([line(heads), rule, *(line(row) for row in rows)])


def draw_report(report: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against N with intervals, and accuracy against lambda, as a PNG.

    Args:
        report: what `evaluate_files` returned.
        path: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), dpi=150, layout="constrained", width_ratios=(3, 2))
    _draw_sizes(report, left)
    _draw_lambdas(report, right)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    temporary.replace(path)


def _draw_sizes(report: Mapping[str, Any], axes: Any) -> None:
    sizes = report["sizes"]
    for name in [n for n in COLOURS if n in report["strategies"]]:
        found = [report["accuracy"][str(size)][name] for size in sizes]
        mean, low, high = ([100 * f[key] for f in found] for key in ("mean", "low", "high"))
        style = "--" if name in (GREEDY, RANDOM, ORACLE) else "-"
        marker = "" if name in (GREEDY, RANDOM) else "o"
        axes.plot(sizes, mean, style, marker=marker, markersize=4, color=COLOURS[name], linewidth=1.4, label=name)
        axes.fill_between(sizes, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="N, samples to choose from", ylabel="accuracy, %", title="Accuracy against N, 95 % intervals")
    axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize=8)


def _draw_lambdas(report: Mapping[str, Any], axes: Any) -> None:
    styles = {"none": "-", "token": "--", "char": ":"}
    curves = report["lambda_curve"]
    for normalize, style in styles.items():
        drawn = [curve[normalize] for curve in curves if normalize in curve]
        if len(drawn) == len(curves):
            mean = [100 * sum(values) / len(values) for values in zip(*drawn, strict=True)]
            axes.plot(
                report["lambdas"], mean, style, color=COLOURS[COMBINED], linewidth=1.4, label=f"divided by: {normalize}"
            )
    majority = 100 * report["accuracy"][str(report["sizes"][-1])][MAJORITY]["mean"]
    axes.axhline(majority, color=COLOURS[MAJORITY], linewidth=1.2, label=MAJORITY)
    title = f"Combined at N = {report['sizes'][-1]}, test problems"
    axes.set(xlabel="lambda (0: forward only, 1: reverse only)", ylabel="accuracy, %", title=title)
    axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize=8)
