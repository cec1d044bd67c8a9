"""Plots for pages without scripts and external files: SVG for what is stretched to the frame, HTML for text, which is
not."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdctl.bench.measurements import QUANTILES, percentile
from pdctl.bench.report.observations import Curves, Stretch, in_rows, joined
from pdctl.bench.report.scales import MOST_TICKS, Axis, ceiling, counted, latency, numbered, of_time, parts
from pdctl.bench.report.style import SERIES

# Width and height of a frame in the units of its SVG, which is stretched to the frame's own size.
UNITS = 1000
# More points than this cannot be distinguished in a plot.
_MOST_POINTS = 400
# Labels of an x axis that all fit on a phone.
_MANY = 4
# The part of a frame below which what is drawn cannot be seen.
_LEAST = 1 / 640
# An x axis of a cumulative distribution ends at this percentile, or this factor beyond p99: then follow outliers.
_LAST_PART, _BEYOND = 99.5, 1.25
# Where the text of a mark would leave the frame, and from where on it stands above its point.
_RIGHT_END, _HIGHEST = 0.8, 0.95
# More names than this cannot be told apart.
_MOST_NAMED = 24


@dataclass(frozen=True, slots=True)
class _Mark:
    """A text at a place of the frame, both 0 to 1 from its lower left corner."""

    x: float
    y: float
    text: str


def over_time(times: list[float], lines: dict[str, list[float | None]], unit: str) -> str:
    """One line per engine, with gaps where values are unknown. `times`: seconds; `unit`: of values, which are counts;
    empty for fractions."""
    most = max((value for values in lines.values() for value in values if value is not None), default=0.0)
    up, top = counted(unit, most) if unit else (parts("in use"), 1.0)
    last = max(times[-1], 1e-9)
    drawn = []
    apart = max(1, len(times) // _MOST_POINTS)
    for number, values in enumerate(lines.values()):
        for piece in _pieces(times[::apart], values[::apart]):
            drawn.append(_line([(at / last, value / top) for at, value in piece], number))
    return _framed("".join(drawn), numbered("seconds since the first request", last), up, _legend(list(lines)))


def _pieces(times: list[float], values: list[float | None]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for at, value in zip(times, values, strict=True):
        if value is not None:
            pieces[-1].append((at, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def cdf(lines_of: dict[str, list[float]]) -> str:
    """Cumulative distribution of latencies in milliseconds, up to a little beyond p99 of the slowest series. Each of
    QUANTILES is marked."""
    found = {name: sorted(values) for name, values in lines_of.items() if values}
    most = max(map(_last, found.values()), default=0.0) or 1.0
    factor, unit = of_time(most)
    lines, dots, marks = [], [], []
    for number, values in enumerate(found.values()):
        apart = max(1, len(values) // _MOST_POINTS)
        points = [(values[n], (n + 1) / len(values)) for n in range(0, len(values), apart) if values[n] <= most]
        lines.append(_line([(value / most, part) for value, part in points], number))
        for part in QUANTILES:
            at = percentile(values, part)
            dots.append(_dot(at / most, part / 100, number))
            marks.append(_Mark(at / most, part / 100, f"p{part} {latency(at)}"))
    across = numbered(unit, most * factor)
    up = Axis("part that was at least this fast", [(part / 100, f"{part}%") for part in (0, *QUANTILES)])
    if len(found) > 1:
        return _framed("".join(lines + dots), across, up, _quantiles(found), is_marked=True)
    return _framed("".join(lines + dots), across, up, marks=marks, is_marked=True)


def _last(values: Sequence[float]) -> float:
    return min(percentile(values, _LAST_PART), _BEYOND * percentile(values, QUANTILES[-1]))


def _quantiles(found: dict[str, list[float]]) -> str:
    """A legend with the marked values."""
    head = "".join(f"<th>p{part}</th>" for part in QUANTILES)
    body = "".join(
        f"<tr><td>{_key(number)}{html.escape(name)}</td>"
        + "".join(f"<td>{latency(percentile(values, part))}</td>" for part in QUANTILES)
        + "</tr>"
        for number, (name, values) in enumerate(found.items())
    )
    return f'<div class="scroll"><table class="legend"><tr><th></th>{head}</tr>{body}</table></div>'


def timeline(spans: Sequence[tuple[float, float, float]]) -> str:
    """One bar per request from sending to its end, darker from the first token on. `spans`: sent, first token, end."""
    if not spans:
        return ""
    spans = spans[:: max(1, len(spans) // _MOST_POINTS)]
    first, last = min(span[0] for span in spans), max(span[2] for span in spans)
    width = max(1e-9, last - first)
    height = 1 / len(spans)
    bars = [
        _bar((begin - first) / width, (stop - first) / width, place * height, height, kind)
        for place, (start, token, end) in enumerate(spans)
        for begin, stop, kind in ((start, token, "wait"), (token, end, "f0"))
    ]
    keys = _keys([("wait", "waiting for the first token"), ("f0", "decoding")])
    up = Axis("requests, in the order in which they were sent, from the top")
    return _framed("".join(bars), numbered("seconds since the first request", width), up, keys)


def lanes(engines: dict[str, list[Stretch]], first: float) -> str:
    """One band of rows per engine, with one bar per request for its time on the engine. `first`: when the first request
    was sent."""
    bands = [in_rows(stretches) for stretches in engines.values()]
    if not any(bands):
        return ""
    last = max(stretch[1] for band in bands for row in band for stretch in row)
    width, height = max(1e-9, last - first), 1 / sum(map(len, bands))
    bars, names, at = [], [], 0
    for number, (name, band) in enumerate(zip(engines, bands, strict=True)):
        names.append((1 - (at + len(band) / 2) * height, name))
        for row in band:
            bars += [
                _bar((begin - first) / width, (end - first) / width, at * height, height, f"f{number % SERIES}")
                for begin, end in joined(row, width * _LEAST)
            ]
            at += 1
        bars.append(_path("axis", f"M0,{_units(at * height)}H{UNITS}"))
    up = Axis("answered requests, on the engines that finished them", names[:_MOST_NAMED])
    return _framed("".join(bars), numbered("seconds since the first request", width), up, is_named=True)


def _bar(begin: float, end: float, y: float, height: float, kind: str) -> str:
    wide, high = max(_LEAST, end - begin), max(_LEAST, height * 0.8)
    return (
        f'<rect x="{_units(min(begin, 1 - _LEAST))}" y="{_units(y)}" width="{_units(min(wide, 1 - begin + _LEAST))}" '
        f'height="{_units(high)}" class="{kind}"/>'
    )


def curve(curves: Curves) -> str:
    """Lines through measured points. The x values are evenly spaced, in order."""
    values = curves.places
    most = max((up for line in curves.lines.values() for _, up in line), default=0.0) or 1.0
    top = ceiling(most)
    drawn = []
    for number, line in enumerate(curves.lines.values()):
        at = [(_place(across, values), up / top) for across, up in line]
        drawn.append(_line(at, number))
        drawn += [_dot(x, y, number) for x, y in at]
    apart = max(1, -(-len(values) // MOST_TICKS))
    across = Axis(curves.across, [(_place(value, values), f"{value:.4g}") for value in values[::apart]])
    return _framed("".join(drawn), across, numbered("", top), _legend(list(curves.lines)))


def _place(value: float, values: Sequence[float]) -> float:
    return (values.index(value) + 0.5) / len(values)


# -- shapes ------------------------------------------------------------------------------------------------


def _units(part: float) -> str:
    return f"{part * UNITS:.1f}"


def _point(x: float, y: float) -> str:
    """A place of the frame, from its lower left corner, as SVG writes it."""
    return f"{_units(x)},{_units(1 - y)}"


def _line(points: Sequence[tuple[float, float]], number: int) -> str:
    text = " ".join(_point(x, y) for x, y in points)
    return f'<polyline class="line s{number % SERIES}" points="{text}"/>'


def _dot(x: float, y: float, number: int) -> str:
    """A round dot, however the frame is stretched: a line without length and with round ends. A ring keeps it apart
    from lines below it."""
    at = f"M{_point(x, y)}h0"
    return _path("ring", at) + _path(f"dot s{number % SERIES}", at)


def _path(kind: str, drawn: str) -> str:
    return f'<path class="{kind}" d="{drawn}"/>'


def _framed(
    content: str, across: Axis, up: Axis, legend: str = "", marks: Sequence[_Mark] = (), is_named: bool = False,
    is_marked: bool = False,
) -> str:  # fmt: skip
    """The plot with axes, ticks and titles. `is_named`: names stand at the y axis; `is_marked`: its ticks are marks to
    compare with."""
    lines = "".join(_path("grid", f"M{_units(x)},0V{UNITS}") for x, _ in across.ticks)
    if not is_named:
        kind = "mark" if is_marked else "grid"
        lines += "".join(_path(kind, f"M0,{_units(1 - y)}H{UNITS}") for y, _ in up.ticks)
    axes = _path("axis", f"M0,0V{UNITS}H{UNITS}")
    many = " many" if len(across.ticks) > _MANY else ""
    texts = "".join(
        f'<span class="x{many}" style="left:{100 * x:.1f}%">{html.escape(text)}</span>' for x, text in across.ticks
    )
    texts += "".join(
        f'<div class="y" style="bottom:{100 * y:.1f}%" title="{html.escape(text)}">{html.escape(text)}</div>'
        for y, text in up.ticks
    )
    texts += "".join(map(_marked, marks))
    title = f'<p class="yt">{html.escape(up.title)}</p>' if up.title else ""
    about = "; ".join(filter(None, [up.title, across.title, *(mark.text for mark in marks)]))
    return (
        f'<figure class="plot{" named" if is_named else ""}">{title}'
        f'<div class="frame" role="img" aria-label="{html.escape(about)}">'
        f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" aria-hidden="true">{lines}{content}{axes}</svg>'
        f'{texts}<div class="xt">{html.escape(across.title)}</div></div>{legend}</figure>'
    )


def _marked(mark: _Mark) -> str:
    """The text of a mark, where a cumulative distribution leaves room: above the highest points; else to the right of
    the point and below it, or to its left if the frame ends."""
    is_left = mark.x > _RIGHT_END
    if mark.y > _HIGHEST:
        bottom, gap = f"calc({100 * mark.y:.1f}% + .4rem)", "-.2rem"
    else:
        bottom, gap = f"calc({100 * mark.y:.1f}% - 1.15rem)", ".6rem"
    side = f"right:calc({100 - 100 * mark.x:.1f}% + {gap})" if is_left else f"left:calc({100 * mark.x:.1f}% + {gap})"
    return f'<div class="m" style="{side};bottom:{bottom}">{html.escape(mark.text)}</div>'


def _key(number: int) -> str:
    """The line of a series, for a legend."""
    return (
        f'<svg class="key" viewBox="0 0 36 12" aria-hidden="true"><path class="line s{number % SERIES}" '
        'd="M0,6H36"/></svg>'
    )


def _legend(names: Sequence[str]) -> str:
    """The name of each line; nothing for a single one."""
    if len(names) < 2:
        return ""
    return _listed(_key(number) + html.escape(name) for number, name in enumerate(names))


def _keys(kinds: Sequence[tuple[str, str]]) -> str:
    """The meaning of each kind of bar."""
    return _listed(
        f'<svg class="key" viewBox="0 0 36 12" aria-hidden="true"><rect class="{kind}" width="36" height="12"/></svg>'
        + html.escape(text)
        for kind, text in kinds
    )


def _listed(items: Iterable[str]) -> str:
    return f'<ul class="legend">{"".join(f"<li>{item}</li>" for item in items)}</ul>'
