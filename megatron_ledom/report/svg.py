"""Line plots as SVG text, to stand in a page without any script or file beside it.

It knows axes, lines, dots and marks; what they mean is `page`'s business. Colours are classes or values given by the
caller, text takes the page's font.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 34
MAX_POINTS = 600


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        label: for the legend and the tooltip.
        points: (x, y), by x; y that is not finite leaves a gap.
        colour: of stroke and dots.
        dots: draw only dots, for few points.
        dashed: draw dashes.
        faint: draw thin and pale, for noisy detail behind a smooth line.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dots: bool = False
    dashed: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at x with a tooltip."""

    x: float
    text: str
    colour: str = "#999"


@dataclass(frozen=True)
class Plot:
    """What to draw.

    Attributes:
        lines: the curves.
        unit: of the y axis, for the tooltip and the corner.
        marks: vertical lines.
        log: logarithmic y axis; values that are not positive are left out.
        from_zero: the y axis begins at 0.
    """

    lines: Sequence[Line]
    unit: str = ""
    marks: Sequence[Mark] = field(default_factory=list)
    log: bool = False
    from_zero: bool = False


def draw(plot: Plot) -> str:
    """Return the plot as an `<svg>` element; a note in its place where there is nothing to draw."""
    lines = [_usable(line, plot.log) for line in plot.lines]
    points = [p for line in lines for p in line.points if math.isfinite(p[1])]
    if not points:
        return '<p class="empty">no values</p>'
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_ticks = ticks(min(xs), max(xs), 6)
    low, high = _y_range(ys, plot)
    y_ticks = log_ticks(low, high) if plot.log else ticks(low, high, 5)
    scale = _Scale(min(xs), max(xs), low, high, plot.log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for y in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{scale.y(y):.1f}" y2="{scale.y(y):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{scale.y(y) + 3.5:.1f}" text-anchor="end">{short(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{scale.x(x):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(x)}</text>')
    axis = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis}" y2="{axis}"/>')
    parts.append(f'<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    parts += [_mark(mark, scale) for mark in plot.marks if min(xs) <= mark.x <= max(xs)]
    parts += [_curve(line, scale, plot.unit) for line in lines]
    return "".join([*parts, "</svg>"])


class _Scale:
    """From values to pixels."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float, log: bool) -> None:
        self._x0, self._x_span, self._log = x0, (x1 - x0) or 1.0, log
        self._y0, self._y1 = (math.log10(y0), math.log10(y1)) if log else (y0, y1)

    def x(self, value: float) -> float:
        return LEFT + (value - self._x0) / self._x_span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        v = math.log10(value) if self._log else value
        return HEIGHT - BOTTOM - (v - self._y0) / ((self._y1 - self._y0) or 1.0) * (HEIGHT - TOP - BOTTOM)


def _usable(line: Line, log: bool) -> Line:
    points = [(x, y) for x, y in line.points if not log or not math.isfinite(y) or y > 0]
    return Line(line.label, thin_out(points), line.colour, line.dots, line.dashed, line.faint)


def thin_out(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: of each run of neighbours the lowest and the highest, so that spikes stay.

    >>> thin_out([(x, 9.0 if x == 3 else 1.0) for x in range(8)], most=4)
    [(0, 1.0), (3, 9.0), (4, 1.0)]
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        chunk = points[start : start + size]
        finite = [p for p in chunk if math.isfinite(p[1])] or list(chunk[:1])
        low, high = min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])
        kept += sorted({low, high}) if low != high else [low]
    return kept


def _y_range(ys: Sequence[float], plot: Plot) -> tuple[float, float]:
    low, high = min(ys), max(ys)
    if plot.log:
        return (low / 1.1, high * 1.1)
    if plot.from_zero:
        low = min(0.0, low)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if plot.from_zero and low == 0 else low - margin, high + margin)


def _curve(line: Line, scale: _Scale, unit: str) -> str:
    if line.dots:
        return "".join(
            f'<circle cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3" fill="{line.colour}">'
            f"<title>{escape(line.label)}, step {x:,.0f}: {y:.4g} {escape(unit)}</title></circle>"
            for x, y in line.points
            if math.isfinite(y)
        )
    pieces, pen_is_down = [], False
    for x, y in line.points:
        if math.isfinite(y):
            pieces.append(f"{'L' if pen_is_down else 'M'}{scale.x(x):.1f} {scale.y(y):.1f}")
        pen_is_down = math.isfinite(y)
    style = ' stroke-dasharray="5 3"' if line.dashed else ""
    style += ' class="faint"' if line.faint else ' class="curve"'
    title = f"<title>{escape(line.label)}</title>"
    return f'<path d="{"".join(pieces)}" stroke="{line.colour}"{style}>{title}</path>'


def _mark(mark: Mark, scale: _Scale) -> str:
    x = scale.x(mark.x)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{mark.colour}">'
        f"<title>{escape(mark.text)}</title></line>"
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within [low, high], at most `most` + 1 of them.

    >>> ticks(0, 97, 5)
    [0.0, 20.0, 40.0, 60.0, 80.0]
    """
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10, 20) if span / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; powers alone over more than three decades."""
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if top - bottom > 4 else (1, 2, 5)
    return [f * 10.0**e for e in range(bottom, top + 1) for f in factors if low <= f * 10.0**e <= high]


def short(value: float) -> str:
    """A number for an axis.

    >>> [short(v) for v in (0, 0.0025, 3.5, 400, 12_000, 2.5e6, 3e-7)]
    ['0', '0.0025', '3.5', '400', '12k', '2.5M', '3e-07']
    """
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):g}{letter}"
    return f"{value:.4g}"
