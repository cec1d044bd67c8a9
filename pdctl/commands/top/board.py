"""A snapshot and a view as lines of a screen. Pure: the terminal paints them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pdctl.commands.top.lines import Level, Line, Span, chart, clean, milliseconds, rate, trend, width_of
from pdctl.commands.top.rates import column
from pdctl.commands.top.snapshot import Snapshot
from pdctl.commands.top.table import Row, event_lines, link_table, process_table
from pdctl.commands.top.topology import overview, tree
from pdctl.commands.top.view import Page, View, place_of

# From this width on, the topology and the trends have a column of their own.
WIDE = 140
_SIDE = 64
# Lines above the tables, and below them.
_HEAD, _FOOT = 5, 1
_CHART = 3
# What a screen with little room keeps of each table: lines without its header.
_FEW_PROCESSES, _FEW_LINKS, _FEW_EVENTS = 5, 2, 3
_GUTTER = 2
_STATES: dict[str, Level] = {"ready": "good", "failed": "bad"}

_NOTHING = Span("")

# Lines that fit 80 characters.
_HELP = (
    ("up, down, j, k", "choose a process"),
    ("enter, l", "its log; page up, page down, home, end scroll"),
    ("r", "restart it: at once, or after its requests; asks first"),
    ("s, S", "sort by the next or previous column, or as planned"),
    ("o", "turn the order round"),
    ("ctrl-l, ctrl-z", "draw again; suspend (fg continues)"),
    ("q, ctrl-c", "quit; q also closes a log"),
    ("", ""),
    ("requests/s, tokens/s", "by the proxy, over the last 15 seconds"),
    ("failed/s", "requests answered with 5xx"),
    ("TTFT, ITL", "time to first token, between tokens: last 15 seconds"),
    ("RUN, QUEUE", "requests that the engine computes; that wait in it"),
    ("KV", "part of the KV cache in use"),
    ("HITS", "part of the prompts found in the prefix cache"),
    ("INLINE", "part of the prompts that a decode engine computed"),
    ("* after a role", "it was asked for, or is being changed"),
    ("● ○ ✗", "ready; on its way; down"),
)


@dataclass(frozen=True, slots=True)
class Shown:
    """Everything on the screen. `rows`: in their order; `now`: seconds since 1970; `message`: the answer to the last
    key, empty for none; `log`: lines of the chosen process, if its log is shown."""

    snapshot: Snapshot
    view: View
    rows: Sequence[Row]
    now: float
    host: str
    message: Span = _NOTHING
    log: Sequence[str] = ()


def frame(shown: Shown, width: int, height: int) -> list[Line]:
    """Exactly `height` lines; what is wider than `width` is cut by the terminal."""
    if shown.view.page is Page.LOGS:
        lines = _log_page(shown, width, height - _FOOT)
    elif shown.view.page is Page.HELP:
        lines = _help_page()
    else:
        lines = _board(shown, width, height - _FOOT)
    lines = lines[: max(0, height - _FOOT)]
    lines += [[] for _ in range(height - _FOOT - len(lines))]
    return [*lines, _footer(shown, width)][-height:] if height > 0 else []


# -- the board ---------------------------------------------------------------------------------------------


def _board(shown: Shown, width: int, height: int) -> list[Line]:
    head = [_title(shown, width), _second(shown, width), *_rates(shown, width), []]
    room = height - _HEAD
    if width < WIDE:
        return [*head, *_tables(shown, width, room)]
    left = _tables(shown, width - _SIDE - 3, room)
    return [*head, *_beside(left, _side(shown, room), width - _SIDE - 3, room)]


def _title(shown: Shown, width: int) -> Line:
    status, snapshot = shown.snapshot.status, shown.snapshot
    state, level = str(status.state), _STATES.get(status.state, "busy")
    if snapshot.trouble:
        state, level = ("not answering" if snapshot.is_running else "not running"), "bad"
    left: Line = [Span(f"{clean(status.service)}: ", "title"), Span(state, level)]
    if status.apply is not None and status.apply.state == "running" and not snapshot.trouble:
        left.append(Span(f", applying: {clean(status.apply.step)}", "busy"))
    left.append(Span(f"  {clean(status.served_model_name)} at {clean(status.proxy_url)}"))
    return _ends(left, [Span(datetime.fromtimestamp(shown.now).astimezone().strftime("%H:%M:%S"), "dim")], width)


def _ends(left: Line, right: Line, width: int) -> Line:
    """One part at the left, one at the right end if there is room."""
    room = width - width_of(left) - width_of(right)
    return [*left, Span(" " * room), *right] if room > 0 else left


def _second(shown: Shown, width: int) -> Line:
    if shown.snapshot.trouble:
        return [Span(clean(shown.snapshot.trouble), "bad")]
    return overview(shown.snapshot.status, width)


def _rates(shown: Shown, width: int) -> list[Line]:
    """Two lines: throughput, latencies."""
    samples, rates = shown.snapshot.samples, shown.snapshot.rates
    running = samples[-1].running if samples else 0
    waiting = (samples[-1].waiting if samples else 0) + (rates.waiting if rates else 0)
    numbers: Line = [
        *_figure("requests/s", rate(rates.requests if rates else None)),
        *_figure("failed/s", rate(rates.failed if rates else None), bool(rates and rates.failed)),
        *_figure("running", str(running)),
        *_figure("waiting", str(waiting)),
        *_figure("tokens/s", rate(rates.tokens if rates else None)),
    ]
    history = [sample.rates for sample in samples]
    numbers.append(Span(trend(column(history, "tokens"), max(0, min(60, width - width_of(numbers)))), "good"))
    room = max(0, (width - 61) // 2)
    latencies: Line = []
    for title, median, high in (("TTFT", "ttft_p50", "ttft_p99"), ("ITL", "itl_p50", "itl_p99")):
        low, most = (getattr(rates, name) if rates else None for name in (median, high))
        latencies += [*_figure(f"{title} p50", f"{milliseconds(low):<6}"), *_figure("p99", f"{milliseconds(most):<6}")]
        latencies.append(Span(trend(column(history, median), min(30, room)) + "  ", "good"))
    return [numbers, latencies]


def _figure(title: str, value: str, is_bad: bool = False) -> Line:
    return [Span(f"{title} ", "dim"), Span(value, "bad" if is_bad else "title"), Span("  ")]


def shares(room: int, processes: int, links: int) -> tuple[int, int, int]:
    """Lines for the tables of processes, links and events, with their headers. An empty line before each but the first
    is not counted, and a table without lines has none."""
    if room <= 0:
        return 0, 0, 0
    few = 1 + min(processes, _FEW_PROCESSES)
    fewer = 1 + min(links, _FEW_LINKS) if links else 0
    last = 1 + _FEW_EVENTS
    if few + (fewer + 1 if fewer else 0) + last + 1 > room:
        last = 0
    if fewer and few + fewer + 1 > room:
        fewer = 0
    spare = room - (fewer + 1 if fewer else 0) - (last + 1 if last else 0)
    table = min(1 + processes, spare)
    spare -= table
    more = min(links + 1 - fewer, spare) if fewer else 0
    return table, fewer + more, last + spare - more if last else 0


def _tables(shown: Shown, width: int, room: int) -> list[Line]:
    status, view = shown.snapshot.status, shown.view
    for_processes, for_links, for_events = shares(room, len(shown.rows), len(status.links))
    header, body = process_table(shown.rows, width - _GUTTER, view.sort, view.is_reversed)
    place = place_of(view, shown.rows)
    marked = [[Span("▶ " if n == place else "  ", "chosen"), *line] for n, line in enumerate(body)]
    lines = [[Span("  "), *header], *_window(marked, for_processes - 1, place)] if for_processes else []
    if for_links:
        header, body = link_table(status.links, width - _GUTTER)
        lines += [[], [Span("  "), *header]]
        lines += [[Span("  "), *line] for line in _window(body, for_links - 1, 0)]
    if for_events:
        lines += [[], [Span("  EVENTS", "title"), Span("  newest first", "dim")]]
        lines += [[Span("  "), *line] for line in event_lines(shown.snapshot.events[: for_events - 1])]
    return lines


def _window(lines: list[Line], room: int, place: int) -> list[Line]:
    """As many lines as fit, with that at `place`; the last one says how many are left out."""
    if len(lines) <= room:
        return lines
    if room <= 1:
        return lines[place : place + max(0, room)]
    first = min(max(0, place - (room - 2) // 2), len(lines) - (room - 1))
    return [*lines[first : first + room - 1], [Span(f"  … {len(lines) - room + 1} more", "dim")]]


# -- the side of a wide screen -----------------------------------------------------------------------------


def _side(shown: Shown, room: int) -> list[Line]:
    """The topology as a tree, then the trends that fit."""
    lines = [[Span("TOPOLOGY", "title")], *tree(shown.snapshot.status, shown.host)]
    if len(lines) > room:
        return _window(lines, room, 0)
    history = [sample.rates for sample in shown.snapshot.samples]
    trends: list[tuple[str, list[float | None], str]] = [
        ("TOKENS/S", column(history, "tokens"), "rate"),
        ("TTFT P50", column(history, "ttft_p50"), "ms"),
        ("ITL P50", column(history, "itl_p50"), "ms"),
        ("RUNNING", [float(sample.running) for sample in shown.snapshot.samples], "rate"),
        ("KV, FULLEST ENGINE", [sample.kv_used for sample in shown.snapshot.samples], "part"),
    ]
    for title, values, unit in trends:
        if len(lines) + _CHART + 2 > room:
            break
        lines += _trend(title, values, unit)
    return lines


def _trend(title: str, values: list[float | None], unit: str) -> list[Line]:
    known = [value for value in values[-_SIDE:] if value is not None]
    now, most = values[-1] if values else None, max(known, default=None)
    head: Line = [Span(title, "title"), Span(f"  now {_told(now, unit)}, highest {_told(most, unit)}", "dim")]
    return [[], head, *([Span(line, "good")] for line in chart(values, _SIDE, _CHART))]


def _told(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.0f}%" if unit == "part" else milliseconds(value) if unit == "ms" else rate(value)


def _beside(left: list[Line], right: list[Line], width: int, height: int) -> list[Line]:
    """Two columns; the left one is cut and filled to `width`."""
    both = []
    for n in range(height):
        line = _cut(left[n], width) if n < len(left) else []
        both.append([*line, Span(" " * (width - width_of(line)) + " │ ", "dim"), *(right[n] if n < len(right) else [])])
    return both


def _cut(line: Line, width: int) -> Line:
    found: Line = []
    for span in line:
        room = width - width_of(found)
        if len(span.text) > room:
            return [*found, span._replace(text=span.text[: max(0, room - 1)] + "…" if room > 0 else "")]
        found.append(span)
    return found


# -- the other pages ---------------------------------------------------------------------------------------


def wrapped(lines: Sequence[str], width: int) -> list[str]:
    """Lines of a log, those that are too long in several."""
    width = max(1, width)
    return [line[at : at + width] for line in lines for at in range(0, max(1, len(line)), width)]


def _log_page(shown: Shown, width: int, height: int) -> list[Line]:
    process = shown.snapshot.status.process(shown.view.chosen)
    where = f"  {process.state}, {process.log}" if process else "  no longer part of the service"
    title: Line = [Span(f"log of {clean(shown.view.chosen)}", "title"), Span(clean(where), "dim")]
    lines, room = wrapped(shown.log, width), max(0, height - 1)
    end = max(0, len(lines) - shown.view.back)
    told = lines[max(0, end - room) : end] if lines else ["(empty)"]
    return [title, *([Span(line)] for line in told)]


def _help_page() -> list[Line]:
    lines: list[Line] = [[Span("pdctl top", "title")], []]
    return lines + [[Span(f"  {keys:<22}", "title"), Span(text)] for keys, text in _HELP]


def _footer(shown: Shown, width: int) -> Line:
    view = shown.view
    if view.asks:
        return [Span(_question(shown), "asked")]
    if shown.message.text:
        return [shown.message]
    if view.page is Page.HELP:
        return [Span("any key: back", "dim")]
    if view.page is Page.LOGS:
        scrolled = f"{view.back} lines back; end: newest   " if view.back else "newest lines   "
        return [Span(scrolled), Span("q back   up down page-up page-down home end   r restart   ? help", "dim")]
    by = view.sort or "plan"
    keys: Line = [Span("q quit   ? help   up/down choose   l log   r restart   ", "dim")]
    return [*keys, Span("s sort: ", "dim"), Span(by), Span("   o reverse" if width > 76 else "", "dim")]


def _question(shown: Shown) -> str:
    """What a restart would do to the requests of the process."""
    process = shown.snapshot.status.process(shown.view.asks)
    running = process.running if process is not None else None
    if process is not None and process.kind == "proxy":
        return f"Restart {clean(process.name)}, cutting its streams? y: now, d: when they end, other keys: no"
    requests = f" ({running} running)" if running else ""
    return f"Restart {clean(shown.view.asks)}{requests}? y: at once, d: after its requests, other keys: no"
