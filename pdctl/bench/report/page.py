"""A run as a text table, and as a self-contained HTML page with plots: no scripts, no external files."""

from __future__ import annotations

import html
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from pdctl import console
from pdctl.bench.measurements import Measurements, Targets, percentile
from pdctl.bench.report.observations import Curves, number, on_engines, sampled, series, spans
from pdctl.bench.report.plots import cdf, curve, lanes, over_time, timeline
from pdctl.bench.report.style import STYLE

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
_REPEATED = {
    "p50_ttft_ms": "TTFT p50 ms", "p99_ttft_ms": "TTFT p99 ms", "p50_tpot_ms": "TPOT p50 ms",
    "p99_tpot_ms": "TPOT p99 ms", "p99_itl_ms": "ITL p99 ms", "request_throughput": "requests/s",
    "request_goodput": "goodput/s", "output_throughput": "tokens/s",
}  # fmt: skip
# What a comparison of runs shows of each: title, samples or measurement, percentile, whether more is better.
_COMPARED: tuple[tuple[str, str, int, bool], ...] = (
    ("TTFT p50, ms", "Time to first token", 50, False), ("TTFT p90, ms", "Time to first token", 90, False),
    ("TTFT p99, ms", "Time to first token", 99, False), ("ITL p50, ms", "Inter-token latency", 50, False),
    ("ITL p90, ms", "Inter-token latency", 90, False), ("ITL p99, ms", "Inter-token latency", 99, False),
    ("E2E p50, ms", "End-to-end latency", 50, False), ("E2E p90, ms", "End-to-end latency", 90, False),
    ("E2E p99, ms", "End-to-end latency", 99, False), ("requests/s", "request_throughput", 0, True),
    ("goodput, requests/s", "request_goodput", 0, True), ("output tokens/s", "output_throughput", 0, True),
    ("answered", "completed", 0, True), ("failed", "failed", 0, False),
)  # fmt: skip
# The settings of a load that a result has, as the page names them.
_LOAD = {"model_id": "model", "num_prompts": "requests", "request_rate": "requests/s", "max_concurrency": "at once",
         "date": "measured"}  # fmt: skip


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
    table = _table(head, rows(measurements, quantiles))
    return _page(title, note, summary, table, plots, _load(measurements))


def _load(measurements: Measurements) -> str:
    """The load of a result, as far as the result says."""
    said = {name: measurements[key] for key, name in _LOAD.items() if measurements.get(key) not in (None, "", "inf")}
    return "; ".join(f"{name}: {value}" for name, value in said.items())


def comparison(results: dict[str, Measurements], ratios: dict[str, list[list[str]]], title: str) -> str:
    """A complete HTML page of two or more results. `ratios`: for each but the first, the rows of the table that the
    command prints, of the first over it."""
    first = next(iter(results))
    table = _table(["", *results], *_beside(results))
    against = {
        f"{first} against {name}": _table(["", first, name, "ratio", "95%", "of the first"], found, kind="dense")
        for name, found in ratios.items()
    }
    summary = "Times are in milliseconds, rates per second. The best value of each line is bold."
    return _page(title, "", summary, table, cdfs(results) | against)


def _beside(results: dict[str, Measurements]) -> tuple[list[list[str]], set[tuple[int, int]]]:
    """A row for each measurement with a column for each result, and the cells (row, column) with the best value."""
    found = [(measurements, series(measurements)) for measurements in results.values()]
    body: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for title, name, part, is_more_better in _COMPARED:
        values = [
            (percentile(samples[name], part) if samples[name] else None) if part
            else (number(measurements, name) if name in measurements else None)
            for measurements, samples in found
        ]  # fmt: skip
        known = [value for value in values if value is not None]
        if not known:
            continue
        top = max(known) if is_more_better else min(known)
        if len(set(known)) > 1:
            best |= {(len(body), column) for column, value in enumerate(values, 1) if value == top}
        body.append([title, *("-" if value is None else f"{value:,.4g}" for value in values)])
    return body, best


def curves(
    found: Sequence[Curves], title: str, summary: str, table: tuple[list[str], list[list[str]]], note: str = ""
) -> str:
    """A complete HTML page of measured curves, with the table that the command prints."""
    plots = {each.title: curve(each) for each in found if each.places}
    return _page(title, note, summary, _table(*table), plots)


def _page(title: str, note: str, summary: str, table: str, plots: dict[str, str], load: str = "") -> str:
    marked = f'<p class="warn">{html.escape(note)}</p>' if note else ""
    about = f'<p class="faint">{html.escape(load)}</p>' if load else ""
    drawn = "".join(f"<section><h2>{html.escape(name)}</h2>{plot}</section>" for name, plot in plots.items() if plot)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        # An empty icon: browsers otherwise request one from the server.
        '<link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"<h1>{html.escape(title)}</h1>{marked}<p>{html.escape(summary)}</p>{about}{table}"
        f'<div class="plots">{drawn}</div></main></body></html>\n'
    )


def _table(
    head: Sequence[str], body: Sequence[Sequence[str]], best: AbstractSet[tuple[int, int]] = frozenset(), kind: str = ""
) -> str:
    """A table; `best`: the cells (row, column) that stand out; `kind`: its class."""
    top = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    rest = "".join(
        "<tr>"
        + "".join(
            f'<td class="best">{html.escape(cell)}</td>' if (row, column) in best else f"<td>{html.escape(cell)}</td>"
            for column, cell in enumerate(cells)
        )
        + "</tr>"
        for row, cells in enumerate(body)
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table></div>'


def cdfs(results: dict[str, Measurements]) -> dict[str, str]:
    """One plot each for TTFT, ITL and E2E, with one line per result."""
    found = {name: series(measurements) for name, measurements in results.items()}
    plots = {}
    for metric in ("Time to first token", "Inter-token latency", "End-to-end latency"):
        lines = {name: values[metric] for name, values in found.items() if values[metric]}
        if lines:
            plots[metric] = cdf(lines)
    return plots


_OVER_TIME = {
    "running": ("Requests running, by engine", "requests"),
    "waiting": ("Requests waiting, by engine", "requests"),
    "kv_used": ("KV cache in use, by engine", ""),
    "leases": ("Leases on KV, by engine", "leases"),
}


def _engines(measurements: Measurements) -> dict[str, str]:
    times, engines = sampled(measurements)
    return {
        title: over_time(times, {name: lists[what] for name, lists in engines.items()}, unit)
        for what, (title, unit) in _OVER_TIME.items()
        if times and any(value for lists in engines.values() for value in lists[what])
    }
