"""A run as people look at it: a table, and a page of one file with its plots in it. No script, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import cycle

from pdctl import console
from pdctl.bench.metrics import Figures, Targets, percentile

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
_REPEATED = {
    "p50_ttft_ms": "TTFT p50 ms", "p99_ttft_ms": "TTFT p99 ms", "p50_tpot_ms": "TPOT p50 ms",
    "p99_tpot_ms": "TPOT p99 ms", "p99_itl_ms": "ITL p99 ms", "request_throughput": "requests/s",
    "request_goodput": "goodput/s", "output_throughput": "tokens/s",
}  # fmt: skip
_COLOURS = ("#0b6e99", "#c2571a", "#3d7a3d", "#7a3d7a", "#8a6d00", "#b0325f", "#4a5568", "#00806a")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 260, 68, 28
# More points than this are not seen in a plot.
_MOST_POINTS = 400
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:44rem;padding:0 1rem;color:#222;"
    "background:#fff}"
    "h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}"
    "th,td{text-align:right;padding:.25rem .5rem;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}"
    "svg{width:100%;height:auto}.t{font-size:14px}@media(max-width:600px){.t{font-size:20px}}"
    ".legend{margin:0;font-size:.85rem}.legend span{margin-right:1rem;white-space:nowrap}"
    ".warn{background:#fff3cd;padding:.5rem .75rem;border-left:4px solid #c2571a}"
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
    return "\n".join([*lines, "", table, *_over_runs(ours)])


def _over_runs(ours: dict[str, object]) -> list[str]:
    """Means of repeats with their intervals."""
    repeats = ours.get("repeats")
    if not isinstance(repeats, dict):
        return []
    shown = [
        [title, *(f"{repeats[what][name]:.4g}" for what in ("mean", "low", "high"))]
        for name, title in _REPEATED.items()
        if name in repeats["mean"]
    ]
    return ["", console.table([f"OVER {repeats['count']} RUNS", "MEAN", "95% FROM", "TO"], shown)]


def page(figures: Figures, title: str, quantiles: Sequence[int], note: str = "") -> str:
    """A whole HTML page of one result."""
    summary = (
        f"{figures['completed']} answered, {figures['failed']} failed; "
        f"{number(figures, 'request_throughput'):.2f} requests/s, {number(figures, 'output_throughput'):.1f} tokens/s"
    )
    head = ["ms", "mean", *(f"p{part}" for part in quantiles)]
    plots = cdfs({"": figures}) | {"Requests over time": timeline(figures)} | _engines(figures)
    return _page(title, note, summary, _table(head, rows(figures, quantiles)), plots)


def comparison(results: dict[str, Figures], ratios: list[list[str]], title: str) -> str:
    """A whole HTML page of two results; `ratios`: rows of the table that the command prints."""
    head = ["", *results, "ratio", "95%", "of the first"]
    return _page(title, "", "Times in milliseconds; rates a second.", _table(head, ratios), cdfs(results))


def _page(title: str, note: str, summary: str, table: str, plots: dict[str, str]) -> str:
    marked = f'<p class="warn">{html.escape(note)}</p>' if note else ""
    drawn = "".join(f"<h2>{html.escape(name)}</h2>{plot}" for name, plot in plots.items() if plot)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        # An icon of its own: browsers ask the server for one otherwise.
        '<link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1>{marked}<p>{html.escape(summary)}</p>{table}{drawn}</body></html>\n"
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    rest = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table></div>'


def series(figures: Figures) -> dict[str, list[float]]:
    """Milliseconds of what plots show."""
    ttfts, itls, latencies = (_good(figures, name) for name in ("ttfts", "itls", "latencies"))
    gaps = [float(gap) for gaps in itls if isinstance(gaps, list) for gap in gaps]
    lists: tuple[Sequence[object], ...] = (ttfts, gaps, latencies)
    named = zip(("Time to first token", "Between tokens", "Whole answer"), lists, strict=True)
    return {name: [value * 1000 for value in values if isinstance(value, float)] for name, values in named}


def _good(figures: Figures, name: str) -> list[object]:
    """Of answers that came: a refusal is quick, and no answer."""
    values, errors, ttfts = _listed(figures, name), _listed(figures, "errors"), _listed(figures, "ttfts")
    if len(errors) != len(values) or len(ttfts) != len(values):
        return values
    return [value for value, error, ttft in zip(values, errors, ttfts, strict=True) if not error and ttft]


def cdfs(results: dict[str, Figures]) -> dict[str, str]:
    """A plot for each of TTFT, ITL and E2E, with a line for each result."""
    found = {name: series(figures) for name, figures in results.items()}
    plots = {}
    for metric in ("Time to first token", "Between tokens", "Whole answer"):
        lines = {name: values[metric] for name, values in found.items() if values[metric]}
        if lines:
            plots[f"{metric}, cumulative"] = cdf(lines)
    return plots


_OVER_TIME = {
    "running": "Requests running, by engine",
    "waiting": "Requests waiting, by engine",
    "kv_used": "KV cache in use, by engine",
    "leases": "Leases on KV, by engine",
}


def sampled(figures: Figures) -> tuple[list[float], dict[str, dict[str, list[float | None]]]]:
    """What engines did meanwhile: seconds from the first request on, and by engine a list for each field. What was seen
    before, in warming up, is left out."""
    ours = figures.get("pdctl")
    found = ours.get("engines") if isinstance(ours, dict) else None
    if not isinstance(found, dict) or not found.get("at"):
        return [], {}
    sent = [at for at in _listed(figures, "start_times") if isinstance(at, float) and at]
    start = min(sent, default=found["at"][0])
    first = sum(at < start for at in found["at"])
    engines = {
        name: {what: values[first:] for what, values in lists.items()} for name, lists in found["engines"].items()
    }
    return [at - start for at in found["at"][first:]], engines


def _engines(figures: Figures) -> dict[str, str]:
    times, engines = sampled(figures)
    return {
        title: over_time(times, {name: lists[what] for name, lists in engines.items()}, what == "kv_used")
        for what, title in _OVER_TIME.items()
        if times and any(value for lists in engines.values() for value in lists[what])
    }


def over_time(times: list[float], lines: dict[str, list[float | None]], is_part: bool = False) -> str:
    """A line for each engine; broken where nothing was known."""
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


def _listed(figures: Figures, name: str) -> list[object]:
    value = figures.get(name)
    return value if isinstance(value, list) else []


def cdf(lines_of: dict[str, list[float]]) -> str:
    """Part of all that took at most so many milliseconds; up to the 99.5th percentile of the slowest series."""
    most = max((percentile(values, 99.5) for values in lines_of.values() if values), default=0.0) or 1.0
    lines = []
    for colour, values in zip(cycle(_COLOURS), lines_of.values(), strict=False):
        ordered = sorted(values)
        step = max(1, len(ordered) // _MOST_POINTS)
        points = [(ordered[n], (n + 1) / len(ordered)) for n in range(0, len(ordered), step) if ordered[n] <= most]
        path = " ".join(f"{_x(value / most):.1f},{_y(part):.1f}" for value, part in points)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
    return _framed("".join(lines), f"{most:.4g} ms", "100%", list(lines_of) if len(lines_of) > 1 else [])


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
    return _framed("".join(bars), f"{width:.4g} s", "", note="light: waiting for the first token; dark: decoding")


def _x(part: float) -> float:
    return _LEFT + part * (_WIDTH - _LEFT - 8)


def _y(part: float) -> float:
    return (1 - part) * (_HEIGHT - _BOTTOM)


def _framed(content: str, right: str, top: str, names: Sequence[str] = (), note: str = "") -> str:
    floor = _HEIGHT - _BOTTOM
    label = html.escape(", ".join(names) or note)
    below = _legend(names) or html.escape(note)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label or "plot"}">{_grid(floor)}'
        f'<line x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - 8}" y2="{floor}" stroke="#999"/>'
        f'<line x1="{_LEFT}" y1="0" x2="{_LEFT}" y2="{floor}" stroke="#999"/>{content}'
        f'<g class="t" fill="#555"><text x="{_LEFT}" y="{_HEIGHT - 6}">0</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">{html.escape(right)}</text>'
        f'<text x="{_LEFT - 6}" y="20" text-anchor="end">{html.escape(top)}</text></g></svg>'
        + (f'<p class="legend">{below}</p>' if below else "")
    )


def _grid(floor: int) -> str:
    """Quarters of both axes."""
    across = "".join(
        f'<line x1="{_LEFT}" y1="{floor * n / 4}" x2="{_WIDTH - 8}" y2="{floor * n / 4}"/>' for n in range(4)
    )
    down = "".join(f'<line x1="{_x(n / 4):.0f}" y1="0" x2="{_x(n / 4):.0f}" y2="{floor}"/>' for n in range(1, 5))
    return f'<g stroke="#e5e5e5">{across}{down}</g>'


def _legend(names: Sequence[str]) -> str:
    """Each name in its line's colour, with a mark before it."""
    return "".join(
        f'<span style="color:{colour}">\u25ac\u00a0{html.escape(name)}</span> '
        for name, colour in zip(names, cycle(_COLOURS), strict=False)
    )
