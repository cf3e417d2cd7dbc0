"""Small charts as SVG. Colours are the page's own (CSS classes), so that they follow light, dark and print.

Series differ in marks or dashes too, not in colour alone. A chart has a name for screen readers, and the page gives its
numbers beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

# About as wide as a phone, so that text is never scaled down.
WIDTH = 420
LEFT, RIGHT, BOTTOM = 52, 14, 36
SERIES = 6  # as many colours as the page has; more begin again
DASHES = ("none", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """A chart: picture, label, and its numbers as a table (empty if the page shows them anyway).

    Attributes:
        picture: SVG.
        label: Describes it.
        names: Its series, if there are several.
        header: The table's column headings.
        rows: The table's cells; the first of each row is its heading.
        dashed: Whether series differ in dashes, not in marks.
    """

    picture: Markup
    label: str
    names: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=list)
    dashed: bool = False

    @property
    def legend(self) -> list[tuple[str, str, Markup]]:
        """(CSS class, name, how the series is drawn) of each series."""
        return [(f"s{n % SERIES}", name, _key(n, dashed=self.dashed)) for n, name in enumerate(self.names)]


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
        step = next(power * m for m in (1, 2, 5, 10, 20) if power * m >= rough)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [step * i for i in range(first, last + 1)]


def _axis(values: Sequence[float], begin: float, end: float, *, margin: float = 0.05) -> _Axis:
    low, high = min(values), max(values)
    # A single value needs room around it with any margin.
    room = (high - low) * margin if high > low else abs(high) * 0.05 or 1.0
    return _Axis(low - room, high + room, begin, end)


def intervals(rows: Sequence[tuple[str, Sequence[Interval | None]]], names: Sequence[str], label: str) -> Chart:
    """For each row (a collection) a mark and an interval for each series (a model) that has one."""
    values = [v for _, series in rows for point in series if point for v in (point.low, point.high)]
    axis = _axis(values, 14, WIDTH - 24)
    gap, row_height = 15, 15 * len(names) + 30
    height = row_height * len(rows) + BOTTOM
    parts = [_grid(axis, height)]
    for row, (name, series) in enumerate(rows):
        top = row * row_height + 16
        # Above its marks: beside them a long name would leave no room on a phone.
        parts.append(_text(4, top, name, "start", "name"))
        for number, point in enumerate(series):
            if point is None:
                continue
            y = top + 14 + gap * number
            parts.append(
                f'<g class="s{number % SERIES}"><title>{escape(names[number])}, {escape(name)}: {point.value:.4f} '
                f"({point.low:.4f} to {point.high:.4f})</title>"
                f'<line x1="{axis.at(point.low):.1f}" x2="{axis.at(point.high):.1f}" y1="{y}" y2="{y}" '
                f'class="stroke"/>{_mark(number, axis.at(point.value), y)}</g>'
            )
    return Chart(_svg(parts, height, label), label, names)


def histogram(counts: Sequence[int], edges: Sequence[float], label: str) -> Chart:
    """Bars; those left of zero and those right of it have their own colours."""
    height = 180
    across = _axis([edges[0], edges[-1]], LEFT, WIDTH - RIGHT, margin=0.0)
    upward = _Axis(0, max(*counts, 1), height - BOTTOM, 12)
    parts = [_grid(across, height), _levels(upward), _across(height, "difference of a query")]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        kind = "zero" if left < 0 < right else "gain" if left + right > 0 else "loss"
        x, width = across.at(left) + 0.5, across.at(right) - across.at(left) - 1
        parts.append(
            f'<rect x="{x:.1f}" y="{upward.at(count):.1f}" width="{max(width, 0.5):.1f}" '
            f'height="{height - BOTTOM - upward.at(count):.1f}" class="{kind}">'
            f"<title>{left:+.2f} to {right:+.2f}: {count:,}</title></rect>"
        )
    rows = [
        [f"{left:+.3f} to {right:+.3f}", f"{count:,}"]
        for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True)
        if count
    ]
    return Chart(_svg(parts, height, label), label, header=["difference", "queries"], rows=rows)


def lines(series: Sequence[tuple[str, Sequence[tuple[float, float]]]], label: str, across: str) -> Chart:
    """A line for each series of (x, y)."""
    height = 190
    points = [point for _, found in series for point in found]
    x_axis = _axis([x for x, _ in points], LEFT, WIDTH - RIGHT, margin=0.02)
    y_axis = _axis([y for _, y in points], height - BOTTOM, 12)
    parts = [_grid(x_axis, height), _levels(y_axis), _across(height, across)]
    for number, (name, found) in enumerate(series):
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in found)
        parts.append(
            f'<g class="s{number % SERIES}"><title>{escape(name)}</title>'
            f'<polyline points="{path}" class="stroke line" stroke-dasharray="{DASHES[number % len(DASHES)]}"/>'
        )
        if len(found) <= 30:  # with a few points one wants to see where they are, and one alone makes no line
            parts += [
                f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="2.5" class="fill"/>' for x, y in found
            ]
        parts.append("</g>")
    values = [dict(found) for _, found in series]
    rows = [
        [f"{x:.6g}", *(f"{found[x]:.5g}" if x in found else "–" for found in values)]
        for x in sorted({x for found in values for x in found})
    ]
    names = [name for name, _ in series]
    return Chart(_svg(parts, height, label), label, names, [across, *names], rows, dashed=True)


def stairs(series: Sequence[tuple[str, Sequence[float], Sequence[float]]], label: str, across: str) -> Chart:
    """The outline of a histogram for each series of (name, shares, edges)."""
    height = 190
    x_axis = _axis([edge for _, _, edges in series for edge in (edges[0], edges[-1])], LEFT, WIDTH - RIGHT, margin=0.0)
    y_axis = _Axis(0, max(max(shares) for _, shares, _ in series) * 1.05 or 1, height - BOTTOM, 12)
    parts = [_grid(x_axis, height), _levels(y_axis), _across(height, across)]
    for number, (name, shares, edges) in enumerate(series):
        points = [(edges[0], 0.0)]
        for share, left, right in zip(shares, edges[:-1], edges[1:], strict=True):
            points += [(left, share), (right, share)]
        points.append((edges[-1], 0.0))
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
        parts.append(
            f'<g class="s{number % SERIES}"><title>{escape(name)}</title><polygon points="{path}" class="area" '
            f'stroke-dasharray="{DASHES[number % len(DASHES)]}"/></g>'
        )
    rows = [
        [name, f"{left:+.3f} to {right:+.3f}", f"{100 * share:.1f} %"]
        for name, shares, edges in series
        for share, left, right in zip(shares, edges[:-1], edges[1:], strict=True)
        if share
    ]
    names = [name for name, _, _ in series]
    return Chart(_svg(parts, height, label), label, names, ["of", across, "share"], rows, dashed=True)


def _mark(number: int, x: float, y: float) -> str:
    """A dot, a diamond, a square or a triangle."""
    shape = number % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y}" r="4.5" class="fill"/>'
    corners = {
        1: ((0, -6), (6, 0), (0, 6), (-6, 0)),
        2: ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        3: ((0, -5), (5.5, 4.5), (-5.5, 4.5)),
    }[shape]
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}" class="fill"/>'


def _key(number: int, *, dashed: bool) -> Markup:
    """How a series is drawn, for the legend."""
    line = f'<line x1="1" x2="23" y1="8" y2="8" class="stroke" stroke-dasharray="{DASHES[number % 4]}"/>'
    drawn = line if dashed else line.replace(f"{DASHES[number % 4]}", "none") + _mark(number, 12, 8)
    return Markup(f'<svg viewBox="0 0 24 16" width="24" height="16" aria-hidden="true">{drawn}</svg>')


def _grid(axis: _Axis, height: float) -> str:
    return "".join(
        f'<line x1="{axis.at(tick):.1f}" x2="{axis.at(tick):.1f}" y1="4" y2="{height - BOTTOM}" class="grid"/>'
        + _text(axis.at(tick), height - BOTTOM + 14, _number(tick), "middle")
        for tick in axis.ticks()
    )


def _levels(axis: _Axis) -> str:
    return "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis.at(tick):.1f}" y2="{axis.at(tick):.1f}" class="grid"/>'
        + _text(LEFT - 6, axis.at(tick) + 4, _number(tick), "end")
        for tick in axis.ticks(4)
    )


def _across(height: float, text: str) -> str:
    return _text(WIDTH - RIGHT, height - 6, text, "end")


def _number(value: float) -> str:
    return f"{value:.6g}" if abs(value) < 1e5 and (abs(value) >= 1e-3 or not value) else f"{value:.0e}"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, label: str) -> Markup:
    # What goes into the parts is escaped where it goes in.
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}" class="chart">'
        f"{''.join(parts)}</svg>"
    )
