"""A run as people look at it: a table, and a page of one file with its plots in it. No script, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pdctl import console
from pdctl.bench.metrics import Figures, Targets, percentile

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
_COLOURS = ("#0b6e99", "#c2571a", "#3d7a3d", "#7a3d7a")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 260, 52, 34
# More points than this are not seen in a plot.
_MOST_POINTS = 400
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:44rem;padding:0 1rem;color:#222;"
    "background:#fff}"
    "h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}"
    "th,td{text-align:right;padding:.25rem .5rem;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}"
    "svg{width:100%;height:auto}.warn{background:#fff3cd;padding:.5rem .75rem;border-left:4px solid #c2571a}"
    ".scroll{overflow-x:auto}"
)


def number(figures: Figures, name: str) -> float:
    """A figure that is a number; 0 where it is missing."""
    value = figures.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def rows(figures: Figures, quantiles: Sequence[int]) -> list[list[str]]:
    """Milliseconds of each metric."""
    return [
        [
            title,
            f"{number(figures, f'mean_{name}_ms'):.1f}",
            *(f"{number(figures, f'p{part}_{name}_ms'):.1f}" for part in quantiles),
        ]
        for name, title in _NAMES.items()
    ]


def text(figures: Figures, targets: Targets, quantiles: Sequence[int]) -> str:
    """For a terminal."""
    ours = figures["pdctl"]
    assert isinstance(ours, dict)
    counted = (
        f"{figures['completed']} answered, {figures['failed']} failed, {ours['truncated']} truncated in "
        f"{number(figures, 'duration'):.1f} s"
    )
    rates = (
        f"{number(figures, 'request_throughput'):.2f} requests/s, {number(figures, 'output_throughput'):.1f} output "
        f"tokens/s, {number(figures, 'total_token_throughput'):.1f} tokens/s in all"
    )
    lines = [counted, rates]
    if targets.are_any:
        lines.append(
            f"goodput {number(figures, 'request_goodput'):.2f} requests/s; "
            f"{ours['attainment'] or 0:.1%} of what was asked met its targets"
        )
    table = console.table(["MS", "MEAN", *(f"P{part}" for part in quantiles)], rows(figures, quantiles))
    parts = ours["parts_ms"]
    if parts:
        split = [[name, *(f"{values[f'p{part}']:.1f}" for part in (50, 90, 99))] for name, values in parts.items()]
        table += "\n\n" + console.table(["WHERE THE TIME WENT, MS", "P50", "P90", "P99"], split)
    return "\n".join([*lines, "", table])


def page(figures: Figures, title: str, quantiles: Sequence[int], note: str = "") -> str:
    """A whole HTML page."""
    marked = f'<p class="warn">{html.escape(note)}</p>' if note else ""
    head = "".join(f"<th>{name}</th>" for name in ("ms", "mean", *(f"p{part}" for part in quantiles)))
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows(figures, quantiles))
    summary = (
        f"{figures['completed']} answered, {figures['failed']} failed; "
        f"{number(figures, 'request_throughput'):.2f} requests/s, {number(figures, 'output_throughput'):.1f} tokens/s"
    )
    plots = "".join(f"<h2>{html.escape(name)}</h2>{drawn}" for name, drawn in _plots(figures).items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1>{marked}<p>{html.escape(summary)}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{plots}'
        "</body></html>\n"
    )


def _plots(figures: Figures) -> dict[str, str]:
    ttfts, itls, latencies = (_listed(figures, name) for name in ("ttfts", "itls", "latencies"))
    gaps = [float(gap) for gaps in itls if isinstance(gaps, list) for gap in gaps]
    milliseconds = [[float(v) * 1000 for v in values if isinstance(v, float)] for values in (ttfts, gaps, latencies)]
    found = {
        f"{name}, cumulative": cdf({name: values})
        for name, values in zip(("Time to first token", "Between tokens", "Whole answer"), milliseconds, strict=True)
        if values
    }
    return found | {"Requests over time": timeline(figures)}


def _listed(figures: Figures, name: str) -> list[object]:
    value = figures.get(name)
    return value if isinstance(value, list) else []


def cdf(series: dict[str, list[float]]) -> str:
    """Part of all that took at most so many milliseconds; up to the 99.5th percentile of the slowest series."""
    most = max((percentile(values, 99.5) for values in series.values() if values), default=0.0) or 1.0
    lines = []
    for colour, values in zip(_COLOURS, series.values(), strict=False):
        ordered = sorted(values)
        step = max(1, len(ordered) // _MOST_POINTS)
        points = [(ordered[n], (n + 1) / len(ordered)) for n in range(0, len(ordered), step) if ordered[n] <= most]
        path = " ".join(f"{_x(value / most):.1f},{_y(part):.1f}" for value, part in points)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
    return _framed("".join(lines), f"{most:.4g} ms", "100%", _legend(list(series)))


def timeline(figures: Figures) -> str:
    """Each request a line from its sending to its end, darker from its first token on."""
    starts, ttfts, latencies = (_listed(figures, name) for name in ("start_times", "ttfts", "latencies"))
    spans = [
        (float(start), float(start) + float(ttft), float(start) + float(latency))
        for start, ttft, latency in zip(starts, ttfts, latencies, strict=True)
        if isinstance(start, float) and isinstance(ttft, float) and isinstance(latency, float)
    ]
    if not spans:
        return ""
    step = max(1, len(spans) // _MOST_POINTS)
    spans = spans[::step]
    first, last = min(span[0] for span in spans), max(span[2] for span in spans)
    width = max(1e-9, last - first)
    height = (_HEIGHT - _BOTTOM) / len(spans)
    bars = []
    for place, (start, token, end) in enumerate(spans):
        y = place * height
        for begin, stop, colour in ((start, token, "#b8d4e0"), (token, end, _COLOURS[0])):
            x = _x((begin - first) / width)
            wide = max(0.5, _x((stop - first) / width) - x)
            bars.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{max(0.5, height * 0.8):.2f}" '
                f'fill="{colour}"/>'
            )
    return _framed("".join(bars), f"{width:.4g} s", "", "light: waiting for the first token; dark: decoding")


def _x(part: float) -> float:
    return _LEFT + part * (_WIDTH - _LEFT - 8)


def _y(part: float) -> float:
    return (1 - part) * (_HEIGHT - _BOTTOM)


def _legend(names: list[str]) -> str:
    return (
        "" if len(names) < 2 else ", ".join(f"{name} ({colour})" for name, colour in zip(names, _COLOURS, strict=False))
    )


def _framed(content: str, right: str, top: str, legend: str) -> str:
    floor = _HEIGHT - _BOTTOM
    label = html.escape(legend)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label or "plot"}">'
        f'<line x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - 8}" y2="{floor}" stroke="#999"/>'
        f'<line x1="{_LEFT}" y1="0" x2="{_LEFT}" y2="{floor}" stroke="#999"/>{content}'
        f'<g font-size="13" fill="#555"><text x="{_LEFT}" y="{floor + 16}">0</text>'
        f'<text x="{_WIDTH - 8}" y="{floor + 16}" text-anchor="end">{html.escape(right)}</text>'
        f'<text x="{_LEFT - 6}" y="12" text-anchor="end">{html.escape(top)}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 2}">{label}</text></g></svg>'
    )
