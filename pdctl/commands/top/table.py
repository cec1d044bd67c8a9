"""The tables: processes with their columns and order, links, events. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from pdctl import console
from pdctl.commands.inspect import cells
from pdctl.commands.top.lines import Level, Line, Span, bar, clean
from pdctl.control_api import AttachedStatus, Event, Link, MeasuredProcess, MeasuredStatus

_GAP = 2
_BAR = 4
_UNKNOWN = Span("-", "dim")
_LEVELS: dict[str, Level] = {"green": "good", "yellow": "busy", "red": "bad"}
# KV in use from which an engine is close to preempting requests.
_FULL = 0.9
_BAD_EVENTS = ("failed", "not_alive", "apply_failed", "node_lost", "no_log")
_GOOD_EVENTS = ("ready", "service_ready", "role_done", "node_answers")
_BUSY_EVENTS = ("blocked", "draining", "drain_over", "role_drain_over", "asked", "restarted_with", "node_silent")


class Heading(NamedTuple):
    """A column. On a narrow screen the columns with the highest rank are left out first, those with 0 never."""

    title: str
    rank: int
    is_number: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table of processes. `cells`: by title. `values`: what it is sorted by; absent if unknown.
    `is_process`: whether pdctl starts it, so that it has a log and can be restarted."""

    name: str
    cells: dict[str, Span]
    values: dict[str, float | str]
    is_process: bool = True


_Cell = Callable[[MeasuredProcess, float], Span]
_Value = Callable[[MeasuredProcess], float | str | None]


def _state(process: MeasuredProcess, _: float) -> Span:
    return Span(process.state, _LEVELS.get(cells.COLOURS.get(process.state, ""), "dim"))


def _since(process: MeasuredProcess, now: float) -> Span:
    if process.phase_s is not None:
        return Span(console.duration(process.phase_s), "busy")
    return _text(cells.since(process.ready_since, now))


def _kv(process: MeasuredProcess, _: float) -> Span:
    if process.kv_used is None:
        return _UNKNOWN
    level: Level = "busy" if process.kv_used >= _FULL else "plain"
    return Span(f"{bar(process.kv_used, _BAR)} {100 * process.kv_used:3.0f}%", level)


def _queue(process: MeasuredProcess, _: float) -> Span:
    return Span(str(process.waiting), "busy") if process.waiting else _text(cells.number(process.waiting))


def _restarts(process: MeasuredProcess, _: float) -> Span:
    return Span(str(process.restarts), "busy") if process.restarts else Span("0", "dim")


def _note(process: MeasuredProcess, now: float) -> Span:
    if process.state == "starting" and process.phase:
        return Span(clean(process.phase), "busy")
    if process.state == "ready" and process.leaving_role:
        return Span(cells.role_of(process), "busy")
    level: Level = "bad" if process.state in ("backoff", "failed", "clearing") else "dim"
    return Span(clean(cells.last_exit_of(process, now)), level)


def _text(text: str) -> Span:
    return _UNKNOWN if text == "-" else Span(clean(text))


def _plain(cell: Callable[[MeasuredProcess], str]) -> _Cell:
    return lambda process, _: _text(cell(process))


# The worst first.
_SEVERITY = ("failed", "backoff", "clearing", "stopped", "stopping", "starting", "pending", "drained", "draining")

_COLUMNS: tuple[tuple[Heading, _Cell, _Value | None], ...] = (
    (Heading("PROCESS", 0), _plain(lambda p: p.name), lambda p: p.name),
    (Heading("NODE", 2), _plain(lambda p: p.node or "-"), None),
    (Heading("ROLE", 3), _plain(lambda p: p.role + ("*" if p.planned_role or p.leaving_role else "")),
     lambda p: p.role),
    (Heading("STATE", 0), _state, lambda p: _SEVERITY.index(p.state) if p.state in _SEVERITY else len(_SEVERITY)),
    (Heading("SINCE", 4, True), _since, None),
    (Heading("RUN", 1, True), _plain(lambda p: cells.number(p.running)), lambda p: p.running),
    (Heading("QUEUE", 1, True), _queue, lambda p: p.waiting),
    (Heading("KV", 1, True), _kv, lambda p: p.kv_used),
    (Heading("TOK/S", 1, True), _plain(lambda p: cells.number(p.tokens_per_s, "%.0f")), lambda p: p.tokens_per_s),
    (Heading("CPU", 5, True), _plain(lambda p: cells.number(p.cpu_percent, "%.0f%%")), lambda p: p.cpu_percent),
    (Heading("MEMORY", 4, True), _plain(lambda p: cells.size(p.rss_bytes)), lambda p: p.rss_bytes),
    (Heading("GPU MEM", 4, True), _plain(lambda p: cells.size(p.gpu_memory_bytes)), lambda p: p.gpu_memory_bytes),
    (Heading("HITS", 6, True),
     _plain(lambda p: "-" if p.prefix_hit_rate is None else f"{100 * p.prefix_hit_rate:.0f}%"),
     lambda p: p.prefix_hit_rate),
    (Heading("LEASES", 6, True), _plain(lambda p: cells.number(p.leases)), lambda p: p.leases),
    (Heading("INLINE", 7, True), _plain(cells.inline_part), None),
    (Heading("DEVICE", 7), _plain(lambda p: ",".join(p.gpus) if p.gpus else f"{p.device} {cells.ranges(p.cpus)}"),
     None),
    (Heading("PID", 7, True), _plain(lambda p: str(p.pid or "-")), None),
    (Heading("RESTARTS", 4, True), _restarts, lambda p: p.restarts),
    (Heading("NOTE", 2), _note, None),
)  # fmt: skip
# Columns that are shown although they are empty for every process.
_KEPT = ("RESTARTS", "NOTE", "RUN", "QUEUE", "KV", "TOK/S")
# What the table can be sorted by; "" is the order of the plan.
SORTS = ("", *(heading.title for heading, _, value in _COLUMNS if value is not None))
_DESCENDING = frozenset(heading.title for heading, _, _ in _COLUMNS if heading.is_number)


def rows_of(status: MeasuredStatus, now: float) -> list[Row]:
    """A row for each process, in the order of the plan, then one for each attached engine. `now`: seconds since
    1970."""
    return [*(_row(process, now) for process in status.processes), *map(_attached, status.attached)]


def _row(process: MeasuredProcess, now: float) -> Row:
    values: dict[str, float | str] = {}
    for heading, _, value in _COLUMNS:
        if value is not None and (found := value(process)) is not None:
            values[heading.title] = found
    return Row(process.name, {heading.title: cell(process, now) for heading, cell, _ in _COLUMNS}, values)


def _attached(engine: AttachedStatus) -> Row:
    state = "leaving" if engine.leaving else "answers" if engine.answers else "silent"
    level = _LEVELS.get(cells.COLOURS.get(state, "yellow"), "busy")
    note = f"{engine.kind} at {engine.host}:{engine.port}, not started by pdctl"
    shown = {"PROCESS": Span(clean(engine.name)), "ROLE": Span(engine.role), "STATE": Span(state, level),
             "NOTE": Span(clean(note), "dim")}  # fmt: skip
    severity = 0 if state == "silent" else len(_SEVERITY)
    return Row(engine.name, shown, {"PROCESS": engine.name, "ROLE": engine.role, "STATE": severity}, False)


def in_order(rows: Sequence[Row], by: str, is_reversed: bool) -> list[Row]:
    """The rows sorted by a column: numbers from the highest, words from A. Rows without a value come last. `by`: one of
    SORTS."""
    known = [row for row in rows if by in row.values]
    descends = (by in _DESCENDING) != is_reversed
    # Two calls: `reverse` keeps the order of equal rows, but values of one column are all numbers or all words.
    known.sort(key=lambda row: row.values[by], reverse=descends)
    return [*known, *(row for row in rows if by not in row.values)] if by else list(rows)[:: -1 if is_reversed else 1]


def process_table(rows: Sequence[Row], width: int, by: str, is_reversed: bool) -> tuple[Line, list[Line]]:
    """Header and lines, in as many columns as fit."""
    headings = [
        heading for heading, _, _ in _COLUMNS
        if not heading.rank or heading.title in _KEPT
        or any(row.cells.get(heading.title, _UNKNOWN).text != "-" for row in rows)
    ]  # fmt: skip
    mark = "▼" if (by in _DESCENDING) != is_reversed else "▲"
    titles = [heading._replace(title=heading.title + (mark if heading.title == by else "")) for heading in headings]
    body = [[row.cells.get(heading.title, _UNKNOWN) for heading in headings] for row in rows]
    return fitted(titles, body, width)


def link_table(links: Sequence[Link], width: int) -> tuple[Line, list[Line]]:
    """Header and lines of how KV moves."""
    headings = [
        Heading("KV FROM", 0), Heading("TO", 0), Heading("TRANSPORT", 0), Heading("OVER", 2),
        Heading("TRANSFERS", 3, True), Heading("MOVED", 4, True), Heading("GB/S", 0, True), Heading("NOTE", 1),
    ]  # fmt: skip
    return fitted(headings, [_link(link) for link in links], width)


def _link(link: Link) -> list[Span]:
    level = link_level(link)
    note = f"FALLBACK: {link.fallback}" if link.fallback else link.error or link.reason
    return [
        Span(clean(link.peer)), Span(clean(link.reader)), Span(link.transport or "none", level),
        Span(link.protocol or "-", level), Span(str(link.pulls)), Span(cells.size(link.bytes)),
        Span(f"{link.gbps:.2f}" if link.gbps else "-"), Span(clean(note), "bad" if level == "bad" else "dim"),
    ]  # fmt: skip


def link_level(link: Link) -> Level:
    """Red for a fallback or a missing link."""
    return "bad" if link.fallback or link.error else "good" if link.transport else "dim"


def event_lines(events: Sequence[Event]) -> list[Line]:
    """Events, each with its time of day here."""
    width = max((len(clean(event.process)) for event in events), default=0)
    return [
        [Span(f"{time_of(event.at)}  ", "dim"), Span(f"{clean(event.process):<{width}}  "), _message(event)]
        for event in events
    ]


def _message(event: Event) -> Span:
    level: Level = "dim"
    if event.event == "exited":
        return Span(clean(f"exited: {event.message}"), "busy" if event.detail.get("expected") else "bad")
    for names, of_these in ((_BAD_EVENTS, "bad"), (_GOOD_EVENTS, "good"), (_BUSY_EVENTS, "busy")):
        if event.event in names:
            level = of_these  # type: ignore[assignment]  # one of the levels
    return Span(clean(event.message), level)


def time_of(at: str) -> str:
    """The time of day of an ISO 8601 time, on this machine."""
    try:
        return datetime.fromisoformat(at).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return "--:--:--"


def fitted(headings: Sequence[Heading], body: Sequence[Sequence[Span]], width: int) -> tuple[Line, list[Line]]:
    """Header and rows as lines, with as many columns as fit in `width` characters. The last column gets what is left
    over, and is cut there."""
    columns = [(heading, [row[n] for row in body]) for n, heading in enumerate(headings)]
    while sum(_least(column, column is columns[-1]) + _GAP for column in columns) - _GAP > width:
        worst = max(columns, key=lambda column: column[0].rank)
        if not worst[0].rank:
            break
        columns.remove(worst)
    widths = [_width(column) for column in columns]
    widths[-1] = max(1, width - sum(widths[:-1]) - _GAP * (len(widths) - 1))
    header = [Span(_cell(heading.title, wide, heading.is_number), "title")
              for (heading, _), wide in zip(columns, widths, strict=True)]  # fmt: skip
    lines = [
        [
            span._replace(text=_cell(span.text, wide, heading.is_number))
            for (heading, found), wide in zip(columns, widths, strict=True)
            for span in (found[n],)
        ]
        for n in range(len(body))
    ]
    return _spaced(header), [_spaced(line) for line in lines]


def _width(column: tuple[Heading, list[Span]]) -> int:
    heading, found = column
    return max([len(heading.title), *(len(span.text) for span in found)])


# Characters below which a last column that can be cut says nothing.
_LEAST = 16


def _least(column: tuple[Heading, list[Span]], is_last: bool) -> int:
    wide = _width(column)
    return min(wide, _LEAST) if is_last else wide


def _cell(text: str, width: int, is_number: bool) -> str:
    if len(text) > width:
        text = text[: max(0, width - 1)] + "…"
    return text.rjust(width) if is_number else text.ljust(width)


def _spaced(line: Line) -> Line:
    spaced: Line = []
    for span in line:
        spaced += [span, Span(" " * _GAP)]
    return spaced[:-1]
