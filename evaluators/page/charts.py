"""Small charts as SVG. Colours are the page's own (CSS classes), so that they follow light, dark and print.

Every number in a chart stands in a table beside it too: a chart is a picture of a table, and says so to screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 640
LEFT, RIGHT, BOTTOM = 150, 20, 34
SERIES = 6  # as many colours as the page has; more begin again


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self, number: int = 5) -> list[float]:
        """Round numbers, about so many."""
        rough = (self.high - self.low) / number
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [step * i for i in range(first, last + 1)]


def _axis(values: Sequence[float], begin: float, end: float, *, margin: float = 0.05) -> _Axis:
    low, high = min(values), max(values)
    room = (high - low) * margin or max(abs(high) * margin, 1e-6)
    return _Axis(low - room, high + room, begin, end)


def intervals(rows: Sequence[tuple[str, Sequence[Interval]]], names: Sequence[str], label: str) -> Markup:
    """For each row (a collection) a dot and an interval for each series (a model)."""
    values = [v for _, series in rows for point in series for v in (point.low, point.high)]
    axis = _axis(values, LEFT, WIDTH - RIGHT)
    gap, row_height = 14, 14 * len(names) + 16
    height = row_height * len(rows) + BOTTOM
    parts = [_grid(axis, height)]
    for row, (name, series) in enumerate(rows):
        top = row * row_height + 14
        parts.append(_text(LEFT - 10, top + gap * (len(names) - 1) / 2 + 4, name, "end"))
        for number, point in enumerate(series):
            y = top + gap * number
            parts.append(
                f'<g class="s{number % SERIES}"><title>{escape(names[number])}, {escape(name)}: {point.value:.4f} '
                f"({point.low:.4f} to {point.high:.4f})</title>"
                f'<line x1="{axis.at(point.low):.1f}" x2="{axis.at(point.high):.1f}" y1="{y}" y2="{y}" '
                f'class="stroke"/><circle cx="{axis.at(point.value):.1f}" cy="{y}" r="4.5" class="fill"/></g>'
            )
    return _svg(parts, height, label)


def histogram(counts: Sequence[int], edges: Sequence[float], label: str) -> Markup:
    """Bars; those left of zero and those right of it have their own colours."""
    height = 180
    across = _axis([edges[0], edges[-1]], 50, WIDTH - RIGHT, margin=0.0)
    upward = _Axis(0, max(*counts, 1), height - BOTTOM, 12)
    parts = [_grid(across, height), _levels(upward, 50)]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        middle = (left + right) / 2
        kind = "zero" if left < 0 < right else "gain" if middle > 0 else "loss"
        x, width = across.at(left) + 0.5, across.at(right) - across.at(left) - 1
        parts.append(
            f'<rect x="{x:.1f}" y="{upward.at(count):.1f}" width="{max(width, 0.5):.1f}" '
            f'height="{height - BOTTOM - upward.at(count):.1f}" class="{kind}">'
            f"<title>{left:+.2f} to {right:+.2f}: {count:,}</title></rect>"
        )
    return _svg(parts, height, label)


def lines(series: Sequence[tuple[str, Sequence[tuple[float, float]]]], label: str, across: str) -> Markup:
    """A line for each series of (x, y)."""
    height = 220
    points = [point for _, found in series for point in found]
    x_axis = _axis([x for x, _ in points], 60, WIDTH - RIGHT, margin=0.02)
    y_axis = _axis([y for _, y in points], height - BOTTOM, 12)
    parts = [_grid(x_axis, height), _levels(y_axis, 60), _text(WIDTH - RIGHT, height - 4, across, "end")]
    for number, (name, found) in enumerate(series):
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in found)
        parts.append(
            f'<g class="s{number % SERIES}"><title>{escape(name)}</title>'
            f'<polyline points="{path}" class="stroke line"/></g>'
        )
    return _svg(parts, height, label)


def stairs(series: Sequence[tuple[str, Sequence[float], Sequence[float]]], label: str, across: str) -> Markup:
    """The outline of a histogram for each series of (name, shares, edges)."""
    height = 200
    x_axis = _axis([edge for _, _, edges in series for edge in (edges[0], edges[-1])], 60, WIDTH - RIGHT, margin=0.0)
    y_axis = _Axis(0, max(max(shares) for _, shares, _ in series) * 1.05 or 1, height - BOTTOM, 12)
    parts = [_grid(x_axis, height), _levels(y_axis, 60), _text(WIDTH - RIGHT, height - 4, across, "end")]
    for number, (name, shares, edges) in enumerate(series):
        points = [(edges[0], 0.0)]
        for share, left, right in zip(shares, edges[:-1], edges[1:], strict=True):
            points += [(left, share), (right, share)]
        points.append((edges[-1], 0.0))
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
        parts.append(
            f'<g class="s{number % SERIES}"><title>{escape(name)}</title><polygon points="{path}" class="area"/></g>'
        )
    return _svg(parts, height, label)


def _grid(axis: _Axis, height: float) -> str:
    lines = [
        f'<line x1="{axis.at(tick):.1f}" x2="{axis.at(tick):.1f}" y1="4" y2="{height - BOTTOM}" class="grid"/>'
        + _text(axis.at(tick), height - BOTTOM + 16, f"{tick:.6g}", "middle")
        for tick in axis.ticks()
    ]
    return "".join(lines)


def _levels(axis: _Axis, left: float) -> str:
    return "".join(
        f'<line x1="{left}" x2="{WIDTH - RIGHT}" y1="{axis.at(tick):.1f}" y2="{axis.at(tick):.1f}" class="grid"/>'
        + _text(left - 8, axis.at(tick) + 4, f"{tick:.6g}", "end")
        for tick in axis.ticks(4)
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, label: str) -> Markup:
    # What goes into the parts is escaped where it goes in.
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}" class="chart">'
        f"{''.join(parts)}</svg>"
    )
