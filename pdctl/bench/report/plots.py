"""Plots as SVG, for pages without scripts and external files."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import cycle

from pdctl.bench.measurements import percentile
from pdctl.bench.report.observations import Curves, Stretch, in_rows, joined

_COLOURS = ("#0b6e99", "#c2571a", "#3d7a3d", "#7a3d7a", "#8a6d00", "#b0325f", "#4a5568", "#00806a")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 260, 68, 28
# More points than this cannot be distinguished in a plot.
_MOST_POINTS = 400
# More labels than this would overlap on a phone.
_MOST_TICKS = 7


def over_time(times: list[float], lines: dict[str, list[float | None]], is_part: bool = False) -> str:
    """One line per engine, with gaps where values are unknown."""
    most = max((value for values in lines.values() for value in values if value is not None), default=0.0) or 1.0
    last = max(times[-1], 1e-9)
    drawn = []
    step = max(1, len(times) // _MOST_POINTS)
    for colour, values in zip(cycle(_COLOURS), lines.values(), strict=False):
        for piece in _pieces(times[::step], values[::step]):
            points = " ".join(f"{_x(at / last):.1f},{_y(value / most):.1f}" for at, value in piece)
            drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
    top = f"{most:.0%}" if is_part else f"{most:.4g}"
    return _framed("".join(drawn), f"{last:.4g} s", top, list(lines))


def _pieces(times: list[float], values: list[float | None]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for at, value in zip(times, values, strict=True):
        if value is not None:
            pieces[-1].append((at, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def cdf(lines_of: dict[str, list[float]]) -> str:
    """Cumulative distribution in milliseconds, up to the 99.5th percentile of the slowest series."""
    most = max((percentile(values, 99.5) for values in lines_of.values() if values), default=0.0) or 1.0
    lines = []
    for colour, values in zip(cycle(_COLOURS), lines_of.values(), strict=False):
        ordered = sorted(values)
        step = max(1, len(ordered) // _MOST_POINTS)
        points = [(ordered[n], (n + 1) / len(ordered)) for n in range(0, len(ordered), step) if ordered[n] <= most]
        path = " ".join(f"{_x(value / most):.1f},{_y(part):.1f}" for value, part in points)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
    return _framed("".join(lines), f"{most:.4g} ms", "100%", list(lines_of) if len(lines_of) > 1 else [])


def timeline(spans: Sequence[tuple[float, float, float]]) -> str:
    """One bar per request from sending to its end, darker from the first token on. `spans`: sent, first token, end."""
    if not spans:
        return ""
    spans = spans[:: max(1, len(spans) // _MOST_POINTS)]
    first, last = min(span[0] for span in spans), max(span[2] for span in spans)
    width = max(1e-9, last - first)
    height = (_HEIGHT - _BOTTOM) / len(spans)
    bars = [
        _bar((begin - first) / width, (stop - first) / width, place * height, height, colour)
        for place, (start, token, end) in enumerate(spans)
        for begin, stop, colour in ((start, token, "#b8d4e0"), (token, end, _COLOURS[0]))
    ]
    return _framed("".join(bars), f"{width:.4g} s", "", note="light: waiting for the first token; dark: decoding")


def lanes(engines: dict[str, list[Stretch]], first: float) -> str:
    """One band of rows per engine, with one bar per request for its time on the engine. `first`: when the first request
    was sent."""
    bands = [in_rows(stretches) for stretches in engines.values()]
    if not any(bands):
        return ""
    last = max(stretch[1] for band in bands for row in band for stretch in row)
    width, height = max(1e-9, last - first), (_HEIGHT - _BOTTOM) / sum(map(len, bands))
    bars, at = [], 0
    for colour, band in zip(cycle(_COLOURS), bands, strict=False):
        for row in band:
            bars += [
                _bar((begin - first) / width, (end - first) / width, at * height, height, colour)
                for begin, end in joined(row, width / _WIDTH)
            ]
            at += 1
        y = at * height
        bars.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - 8}" y2="{y:.1f}" stroke="#999"/>')
    note = "answered requests, on the engines that finished them"
    return _framed("".join(bars), f"{width:.4g} s", "", list(engines), note)


def _bar(begin: float, end: float, y: float, height: float, colour: str) -> str:
    x = _x(begin)
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.5, _x(end) - x):.1f}" height="{max(0.5, height * 0.8):.2f}" '
        f'fill="{colour}"/>'
    )


def curve(curves: Curves) -> str:
    """Lines through measured points. The x values are evenly spaced, in order."""
    values = curves.places
    most = max((up for line in curves.lines.values() for _, up in line), default=0.0) or 1.0
    drawn = []
    for colour, line in zip(cycle(_COLOURS), curves.lines.values(), strict=False):
        at = [(_x(_place(across, values)), _y(0.95 * up / most)) for across, up in line]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in at]
    step = max(1, -(-len(values) // _MOST_TICKS))
    ticks = [(_place(value, values), f"{value:.4g}") for value in values[::step]]
    return _framed("".join(drawn), "", f"{most / 0.95:.3g}", list(curves.lines), curves.across, ticks)


def _place(value: float, values: Sequence[float]) -> float:
    return (values.index(value) + 0.5) / len(values)


def _x(part: float) -> float:
    return _LEFT + part * (_WIDTH - _LEFT - 8)


def _y(part: float) -> float:
    return (1 - part) * (_HEIGHT - _BOTTOM)


def _framed(
    content: str, right: str, top: str, names: Sequence[str] = (), note: str = "",
    ticks: Sequence[tuple[float, str]] = (),
) -> str:  # fmt: skip
    floor = _HEIGHT - _BOTTOM
    label = html.escape(", ".join([*names, *([note] if note else [])]))
    below = " ".join(filter(None, [html.escape(note), _legend(names)]))
    marks = "".join(
        f'<text x="{_x(part):.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(text)}</text>'
        for part, text in ticks
    )
    ends = (
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">0</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">{html.escape(right)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label or "plot"}">{_grid(floor)}'
        f'<line x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - 8}" y2="{floor}" stroke="#999"/>'
        f'<line x1="{_LEFT}" y1="0" x2="{_LEFT}" y2="{floor}" stroke="#999"/>{content}'
        f'<g class="t" fill="#555">{marks or ends}'
        f'<text x="{_LEFT - 6}" y="20" text-anchor="end">{html.escape(top)}</text></g></svg>'
        + (f'<p class="legend">{below}</p>' if below else "")
    )


def _grid(floor: int) -> str:
    """Grid lines at the quarters of both axes."""
    across = "".join(
        f'<line x1="{_LEFT}" y1="{floor * n / 4}" x2="{_WIDTH - 8}" y2="{floor * n / 4}"/>' for n in range(4)
    )
    down = "".join(f'<line x1="{_x(n / 4):.0f}" y1="0" x2="{_x(n / 4):.0f}" y2="{floor}"/>' for n in range(1, 5))
    return f'<g stroke="#e5e5e5">{across}{down}</g>'


def _legend(names: Sequence[str]) -> str:
    """The names, each in the colour of its line and with a marker."""
    return "".join(
        f'<span style="color:{colour}">\u25ac\u00a0{html.escape(name)}</span> '
        for name, colour in zip(names, cycle(_COLOURS), strict=False)
    )
