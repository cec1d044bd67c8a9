"""A run as a text table, and as a self-contained HTML page with plots: no scripts, no external files."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pdctl import console
from pdctl.bench.measurements import Measurements, Targets
from pdctl.bench.report.observations import Curves, number, on_engines, sampled, series, spans
from pdctl.bench.report.plots import cdf, curve, lanes, over_time, timeline

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
_REPEATED = {
    "p50_ttft_ms": "TTFT p50 ms", "p99_ttft_ms": "TTFT p99 ms", "p50_tpot_ms": "TPOT p50 ms",
    "p99_tpot_ms": "TPOT p99 ms", "p99_itl_ms": "ITL p99 ms", "request_throughput": "requests/s",
    "request_goodput": "goodput/s", "output_throughput": "tokens/s",
}  # fmt: skip
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


def rows(measurements: Measurements, quantiles: Sequence[int]) -> list[list[str]]:
    """Table rows with each metric in milliseconds."""
    return [
        [
            title,
            f"{number(measurements, f'mean_{name}_ms'):.1f}",
            *(f"{number(measurements, f'p{part}_{name}_ms'):.1f}" for part in quantiles),
        ]
        for name, title in _NAMES.items()
    ]


def text(measurements: Measurements, targets: Targets, quantiles: Sequence[int], is_predicted: bool = False) -> str:
    """The result as text for a terminal. `is_predicted`: no client has measured it."""
    ours = measurements["pdctl"]
    assert isinstance(ours, dict)
    counted = (
        f"{measurements['completed']} answered, {measurements['failed']} failed, {ours['truncated']} truncated in "
        f"{number(measurements, 'duration'):.1f} s"
    )
    rates = (
        f"{number(measurements, 'request_throughput'):.2f} requests/s, "
        f"{number(measurements, 'output_throughput'):.1f} output tokens/s, "
        f"{number(measurements, 'total_token_throughput'):.1f} tokens/s in total"
    )
    lines = [counted, rates]
    if targets.are_any:
        lines.append(
            f"goodput {number(measurements, 'request_goodput'):.2f} requests/s; "
            f"{ours['attainment'] or 0:.1%} of requests met their targets"
        )
    used, late = ours["client"]["cpu_of_a_core"], ours["client"]["delay_p99_ms"]
    if not is_predicted:
        lines.append(f"this client used {used:.1%} of a core and woke up {late:.1f} ms late at p99")
    table = console.table(["MS", "MEAN", *(f"P{part}" for part in quantiles)], rows(measurements, quantiles))
    parts = ours["parts_ms"]
    if parts:
        split = [[name, *(f"{values[f'p{part}']:.1f}" for part in (50, 90, 99))] for name, values in parts.items()]
        table += "\n\n" + console.table(["TIME BY PHASE, MS", "P50", "P90", "P99"], split)
    return "\n".join([*lines, "", table, *_over_runs(ours)])


def _over_runs(ours: dict[str, object]) -> list[str]:
    """Means over the repeats with their intervals."""
    repeats = ours.get("repeats")
    if not isinstance(repeats, dict):
        return []
    shown = [
        [title, *(f"{repeats[what][name]:.4g}" for what in ("mean", "low", "high"))]
        for name, title in _REPEATED.items()
        if name in repeats["mean"]
    ]
    return ["", console.table([f"OVER {repeats['count']} RUNS", "MEAN", "95% FROM", "TO"], shown)]


def page(measurements: Measurements, title: str, quantiles: Sequence[int], note: str = "") -> str:
    """A complete HTML page of one result."""
    summary = (
        f"{measurements['completed']} answered, {measurements['failed']} failed; "
        f"{number(measurements, 'request_throughput'):.2f} requests/s, "
        f"{number(measurements, 'output_throughput'):.1f} tokens/s"
    )
    head = ["ms", "mean", *(f"p{part}" for part in quantiles)]
    times = spans(measurements)
    began = min((sent for sent, *_ in times), default=0.0)
    over = {"Requests over time": timeline(times), "Requests on each engine": lanes(on_engines(measurements), began)}
    plots = cdfs({"": measurements}) | over | _engines(measurements)
    return _page(title, note, summary, _table(head, rows(measurements, quantiles)), plots)


def comparison(results: dict[str, Measurements], ratios: list[list[str]], title: str) -> str:
    """A complete HTML page of two results; `ratios`: rows of the table that the command prints."""
    head = ["", *results, "ratio", "95%", "of the first"]
    return _page(title, "", "Times are in milliseconds, rates per second.", _table(head, ratios), cdfs(results))


def curves(
    found: Sequence[Curves], title: str, summary: str, table: tuple[list[str], list[list[str]]], note: str = ""
) -> str:
    """A complete HTML page of measured curves, with the table that the command prints."""
    plots = {each.title: curve(each) for each in found if each.places}
    return _page(title, note, summary, _table(*table), plots)


def _page(title: str, note: str, summary: str, table: str, plots: dict[str, str]) -> str:
    marked = f'<p class="warn">{html.escape(note)}</p>' if note else ""
    drawn = "".join(f"<h2>{html.escape(name)}</h2>{plot}" for name, plot in plots.items() if plot)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        # An empty icon: browsers otherwise request one from the server.
        '<link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1>{marked}<p>{html.escape(summary)}</p>{table}{drawn}</body></html>\n"
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    rest = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table></div>'


def cdfs(results: dict[str, Measurements]) -> dict[str, str]:
    """One plot each for TTFT, ITL and E2E, with one line per result."""
    found = {name: series(measurements) for name, measurements in results.items()}
    plots = {}
    for metric in ("Time to first token", "Inter-token latency", "End-to-end latency"):
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


def _engines(measurements: Measurements) -> dict[str, str]:
    times, engines = sampled(measurements)
    return {
        title: over_time(times, {name: lists[what] for name, lists in engines.items()}, what == "kv_used")
        for what, title in _OVER_TIME.items()
        if times and any(value for lists in engines.values() for value in lists[what])
    }
