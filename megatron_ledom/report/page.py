"""A page of HTML about one run or several beside each other: self-contained, no script, nothing fetched.

It owns which figures and tables stand on the page and in which order; numbers come from `run_facts` and `goodput`,
drawing is `svg`'s, the look is `style.css`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_ledom.log import format_seconds
from megatron_ledom.report.goodput import CLASSES, STEPS
from megatron_ledom.report.run_facts import Curve, RunFacts, changed_arguments
from megatron_ledom.report.svg import Line, Mark, Plot, draw
from megatron_ledom.train import events
from megatron_ledom.train.metrics import TRAIN_LOSS, VALIDATION_LOSS

COLOURS = {"reverse": "#c0392b", "forward": "#2c5f8a"}
MORE_COLOURS = ("#1e8449", "#d68910", "#8e44ad", "#16a085", "#7f8c8d")
CLASS_COLOURS = ("#2e8b57", "#4a7fb5", "#8e6bbf", "#d9a441", "#c0392b", "#b8b8b8")
MARKED = {
    events.RESUME: "#2c3e50",
    events.SKIPPED: "#e08e0b",
    events.ROLLBACK: "#8e44ad",
    events.BREACH: "#c0392b",
    events.SWITCH: "#c0392b",
    events.FAILED: "#c0392b",
}
MAX_EVENTS = 400


def build_page(runs: Sequence[RunFacts]) -> str:
    """Return the HTML of a page about `runs`, the first of which gives the title."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    names = [name_of(run, runs) for run in runs]
    colours = colours_of(runs)
    title = f"{runs[0].folder.absolute().name}: {runs[0].direction} model"
    if len(runs) > 1:
        title += f" beside {', '.join(names[1:])}"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        *(_summary(run, name, colour) for run, name, colour in zip(runs, names, colours, strict=True)),
        _section("Curves", _figures(runs, names, colours)),
        _section("Where the time went", "".join(map(_goodput, runs, names))),
        *(_section(_of("Events", name, runs), _event_table(run)) for run, name in zip(runs, names, strict=True)),
        *(_section(_of("Data", name, runs), _data_table(run)) for run, name in zip(runs, names, strict=True)),
        *(
            _section(_of("Configuration", name, runs), _configuration(run))
            for run, name in zip(runs, names, strict=True)
        ),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head><body><main>'
        f"<h1>{escape(title)}</h1><p class='made'>Made {now} from {escape(', '.join(str(r.folder) for r in runs))}</p>"
        + "\n".join(sections)
        + "</main></body></html>\n"
    )


def name_of(run: RunFacts, runs: Sequence[RunFacts]) -> str:
    """What a run is called on the page: its direction, where that tells the runs apart, else its folder."""
    directions = [other.direction for other in runs]
    return run.direction if len(set(directions)) == len(runs) else run.folder.absolute().name


def colours_of(runs: Sequence[RunFacts]) -> list[str]:
    """A colour for each run: that of its direction for the first of it, others after."""
    spare, used = iter(MORE_COLOURS * (1 + len(runs))), set()
    colours = []
    for run in runs:
        own = COLOURS.get(run.direction, "#444")
        colours.append(next(spare) if own in used else own)
        used.add(own)
    return colours


def _of(title: str, name: str, runs: Sequence[RunFacts]) -> str:
    return title if len(runs) == 1 else f"{title}: {name}"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _summary(run: RunFacts, name: str, colour: str) -> str:
    """Tiles with the numbers that one looks for first."""
    total, step = int(run.arguments.get("train_iters") or 0), run.last_step
    losses, validation = run.curve(TRAIN_LOSS), run.curve(VALIDATION_LOSS)
    recent = [value for at, value in losses.items() if at > step - 20]
    rate, mfu = run.metric("tokens_per_s"), run.metric("mfu")
    kinds = [event.kind for event in run.events]
    skipped, resumed = kinds.count(events.SKIPPED), kinds.count(events.RESUME)
    tiles = [
        ("steps", f"{step:,} of {total:,}", "finished" if run.has_ended else _state(run)),
        ("training loss", f"{sum(recent) / len(recent):.3f}" if recent else "none", "mean of the last 20 steps"),
        ("validation loss", f"{list(validation.values())[-1]:.3f}" if validation else "none", _at(validation)),
        ("tokens seen", _count(run.metric("tokens")), f"{_last(run.metric('samples')):,.0f} samples"),
        ("tokens/s", f"{_median(rate):,.0f}" if rate else "unknown", "median"),
    ]
    if mfu:
        tiles.append(("MFU", f"{100 * _median(mfu):.1f} %", "median"))
    if run.goodput is not None:
        tiles.append(("goodput", f"{100 * run.goodput.share:.0f} %", f"of {format_seconds(run.goodput.total_s)}"))
    tiles.append(("skipped steps", str(skipped), "see the events" if skipped else "none"))
    tiles.append(("resumes", str(resumed), f"{len(run.launches)} launches"))
    cells = "".join(
        f"<div class='tile'><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for label, value, note in tiles
    )
    return f"<section class='tiles' style='border-color:{colour}'><h3>{escape(name)}</h3>{cells}</section>"


def _state(run: RunFacts) -> str:
    last = next((e for e in reversed_events(run) if e.kind in {events.END, events.FAILED}), None)
    ends = {events.END: "stopped on purpose", events.FAILED: "ended with an error"}
    is_last = last is not None and last is run.events[-1]
    return ends[last.kind] if last is not None and is_last else "running, or killed"


def _figures(runs: Sequence[RunFacts], names: Sequence[str], colours: Sequence[str]) -> str:
    """Every plot for which a run has values, two in a row."""
    marks = [_mark(run, event) for run in runs[:1] for event in run.events if event.kind in MARKED]

    def lines(curve: Callable[[RunFacts], Curve], **options: Any) -> list[Line]:
        found = zip(runs, names, colours, strict=True)
        return [Line(name, list(curve(run).items()), colour, **options) for run, name, colour in found if curve(run)]

    loss = lines(lambda r: r.curve(TRAIN_LOSS), faint=True)
    loss += lines(lambda r: smoothed(r.curve(TRAIN_LOSS)))
    loss += lines(lambda r: r.curve(VALIDATION_LOSS), dots=True)
    figures = [
        ("Loss", "pale: every step; line: running mean; dots: validation", Plot(loss, "nats a token", marks)),
        ("Gradient norm", "before clipping", Plot(lines(lambda r: r.curve("grad-norm")), "", marks, log=True)),
        ("Learning rate", "", Plot(lines(lambda r: r.curve("learning-rate")), "", from_zero=True)),
        ("Tokens per second", "all ranks, evaluations and saves not counted", _metric_plot(lines, "tokens_per_s")),
        ("MFU", "share of the devices' peak", _metric_plot(lines, "mfu")),
        ("Peak memory", "of the last rank, GiB", Plot(lines(_memory), "GiB", from_zero=True)),
        ("Skipped steps", "so far", Plot(lines(skipped_so_far), from_zero=True)),
        ("Epochs by source", "how often each source has been read", Plot(_epochs(runs, names), "", from_zero=True)),
        ("FP8 against BF16", "gap of the loss at each shadow check", Plot(lines(_gaps, dots=True), "nats", marks)),
    ]
    shown = [_figure(title, note, plot) for title, note, plot in figures if plot.lines]
    return f"<div class='figures'>{''.join(shown)}</div><p class='legend'>{_mark_legend(runs, names)}</p>"


def _metric_plot(lines: Callable[..., list[Line]], name: str) -> Plot:
    return Plot(lines(lambda r: r.metric(name)), from_zero=True)


def _figure(title: str, note: str, plot: Plot) -> str:
    labels = dict.fromkeys((line.label, line.colour) for line in plot.lines)
    legend = "".join(f"<i style='background:{colour}'></i>{escape(label)} " for label, colour in labels)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <small>{escape(note)}</small><span>{legend}</span></figcaption>"
        f"{draw(plot)}</figure>"
    )


def _mark(run: RunFacts, event: events.Event) -> Mark:
    return Mark(event.step, f"{event.kind} at step {event.step}: {event.text}", MARKED[event.kind])


def _mark_legend(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    kinds = dict.fromkeys(e.kind for e in runs[0].events if e.kind in MARKED)
    whose = f"in {escape(names[0])}: " if len(runs) > 1 and kinds else ""
    return whose + "".join(f"<i class='stroke' style='background:{MARKED[kind]}'></i>{escape(kind)} " for kind in kinds)


def _memory(run: RunFacts) -> Curve:
    return {step: value / 2**30 for step, value in run.metric("memory_peak_bytes").items()}


def skipped_so_far(run: RunFacts) -> Curve:
    """How many steps have been skipped up to each step, those of lost work not counted; {} where none was."""
    skipped = sorted({e.step for e in run.events if e.kind == events.SKIPPED})
    if not skipped:
        return {}
    curve = {min(1, run.last_step): 0.0}
    for number, step in enumerate(skipped):
        curve |= {step - 1: float(number), step: number + 1.0}
    return curve | {run.last_step: float(len(skipped))}


def _gaps(run: RunFacts) -> Curve:
    found = [e for e in run.events if e.kind in {events.SHADOW, events.BREACH} and e.fields.get("gap") is not None]
    return {e.step: float(e.fields["gap"]) for e in found}


def _epochs(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Line]:
    lines = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        prefixes = dict.fromkeys(p for line in run.lines for p in line.get("data_epochs", {}))
        for place, prefix in enumerate(prefixes):
            curve = {line["step"]: line["data_epochs"].get(prefix, 0.0) for line in run.lines if "data_epochs" in line}
            label = Path(prefix).name if len(runs) == 1 else f"{name}: {Path(prefix).name}"
            colour = MORE_COLOURS[place % len(MORE_COLOURS)]
            lines.append(Line(label, list(curve.items()), colour, dashed=number > 0))
    return lines


def smoothed(curve: Curve) -> Curve:
    """A running mean over a fiftieth of the steps, at least 5."""
    steps, values = list(curve), list(curve.values())
    half = max(5, len(values) // 50) // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = {}
    for i, step in enumerate(steps):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        means[step] = (sums[high] - sums[low]) / (high - low)
    return means


def _goodput(run: RunFacts, name: str) -> str:
    """A bar of the classes of time, and a table under it."""
    goodput = run.goodput
    if goodput is None or goodput.total_s <= 0:
        return f"<p class='empty'>{escape(name)}: no events were written down</p>"
    parts, seconds, total_s = list(zip(CLASSES, CLASS_COLOURS, strict=True)), goodput.seconds, goodput.total_s

    def share(name: str) -> float:
        return 100 * seconds[name] / total_s

    bar = "".join(
        f"<i style='background:{colour};width:{share(c):.2f}%' title='{escape(c)}'></i>" for c, colour in parts
    )
    cells = "".join(
        f"<li><i style='background:{colour}'></i>{escape(c)} <b>{format_seconds(goodput.seconds[c])}</b> "
        f"({share(c):.0f} %)</li>"
        for c, colour in parts
        if goodput.seconds[c] > 0 or c == STEPS
    )
    total = f"{escape(name)}: {100 * goodput.share:.1f} % of {format_seconds(goodput.total_s)} became steps that count"
    return f"<p>{total}</p><div class='bar'>{bar}</div><ul class='classes'>{cells}</ul>"


def _event_table(run: RunFacts) -> str:
    """The events, saves and shadow checks within a limit."""
    shown, killed = run.events[-MAX_EVENTS:], run.killed_before
    if not shown:
        return "<p class='empty'>none written down</p>"
    start, note = shown[0].time, "; the launch before left no word: killed"
    rows = "".join(
        f"<tr class='{escape(e.kind.replace(' ', '-'))}'>"
        f"<td class='t'>{_clock(e.time)}</td><td class='t'>+{format_seconds(e.time - start)}"
        f"</td><td class='n'>{e.step:,}</td><td><em>{escape(e.kind)}</em></td>"
        f"<td>{escape(e.text + note * (e in killed))}</td></tr>"
        for e in shown
    )
    left_out = len(run.events) - len(shown)
    above = f"<p class='empty'>{left_out} earlier events are in events.jsonl</p>" if left_out else ""
    head = "<tr><th>time (UTC)</th><th>after</th><th>step</th><th>what</th><th></th></tr>"
    return f"{above}<div class='scroll'><table>{head}{rows}</table></div>"


def _data_table(run: RunFacts) -> str:
    data = run.launches[-1].get("data", {})
    if not data:
        return "<p class='empty'>no files: --mock-data</p>"
    read = run.lines[-1].get("data_epochs", {}) if run.lines else {}
    rows = ""
    for prefix, facts in data.items():
        how = f"{facts['direction']}{', read backwards' if facts.get('is_read_backwards') else ''}"
        epochs = f"{read[prefix]:.2f}" if prefix in read else ""
        rows += (
            f"<tr><td>{escape(Path(prefix).name)}</td><td>{escape(how)}</td><td class='n'>{facts['documents']:,}</td>"
            f"<td class='n'>{facts['tokens']:,}</td><td class='n'>{epochs}</td><td><code>"
            f"{escape(str(facts.get('bin_sha256') or '')[:16])}</code></td></tr>"
        )
    titles = ("source", "ids on disk", "documents", "tokens", "epochs so far", "SHA-256")
    head = "".join(f"<th class='{'n' * (2 <= i <= 4)}'>{title}</th>" for i, title in enumerate(titles))
    return f"<div class='scroll'><table><tr>{head}</tr>{rows}</table></div>"


def _configuration(run: RunFacts) -> str:
    """The launches, what changed among them, and every argument of the last one folded away."""
    rows = ""
    for number, launch in enumerate(run.launches, start=1):
        layout = launch.get("layout", {})
        words = " x ".join(
            f"{short} {layout.get(f'{long}_parallel_size')}"
            for short, long in (("TP", "tensor_model"), ("PP", "pipeline_model"), ("DP", "data"))
        )
        versions = ", ".join(f"{k} {v}" for k, v in launch.get("versions", {}).items() if k != "tokenizers")
        rows += (
            f"<tr><td class='n'>{number}</td><td>{escape(str(launch.get('started_utc', ''))[:19])}</td>"
            f"<td class='n'>{launch.get('start', {}).get('steps', 0):,}</td><td>{escape(words)} on "
            f"{escape(str(launch.get('device')))}</td><td>{escape(str(launch.get('host', '')))}</td>"
            f"<td><small>{escape(versions)}</small></td></tr>"
            f"<tr><td></td><td colspan='5'><code>{escape(' '.join(launch.get('command_line', [])))}</code></td></tr>"
        )
    head = "<tr><th></th><th>launched (UTC)</th><th>from step</th><th>layout</th><th>host</th><th>versions</th></tr>"
    table = f"<div class='scroll'><table>{head}{rows}</table></div>"
    changes = changed_arguments(run.launches)
    if changes:
        body = "".join(
            f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(str(v))}</td>' for v in values)}</tr>"
            for name, values in changes
        )
        heads = "".join(f"<th>launch {n}</th>" for n in range(1, len(run.launches) + 1))
        table += (
            f"<details open><summary>{len(changes)} argument{'s' * (len(changes) > 1)} changed among launches</summary>"
            f"<div class='scroll'><table><tr><th>argument</th>{heads}</tr>{body}</table></div></details>"
        )
    every = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in run.arguments.items())
    return table + f"<details><summary>every argument of the last launch</summary><table>{every}</table></details>"


def reversed_events(run: RunFacts) -> list[events.Event]:
    """The events, the latest first."""
    return sorted(run.events, key=lambda e: e.time, reverse=True)


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _at(curve: Curve) -> str:
    return f"at step {max(curve):,}" if curve else ""


def _last(curve: Curve) -> float:
    return list(curve.values())[-1] if curve else 0.0


def _count(curve: Curve) -> str:
    value = _last(curve)
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            return f"{value / limit:.3g} {letter}"
    return f"{value:.0f}"


def _median(curve: Curve) -> float:
    values = sorted(curve.values())
    return values[len(values) // 2]
