"""The topology: one line for a narrow screen, a tree for a wide one. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pdctl.commands.inspect import cells
from pdctl.commands.top.lines import Level, Line, Span, clean, width_of
from pdctl.commands.top.table import link_level
from pdctl.control_api import AttachedStatus, Link, MeasuredProcess, MeasuredStatus

_Member = MeasuredProcess | AttachedStatus
_LEVELS: dict[str, Level] = {"green": "good", "yellow": "busy", "red": "bad"}
_WORST: tuple[Level, ...] = ("bad", "busy", "dim", "good")


def overview(status: MeasuredStatus, width: int) -> Line:
    """One line: clients → proxy ● → prefill ●● ─ shm → decode ●●, with a mark for each process."""
    groups: dict[str, list[_Member]] = {}
    for process in status.processes:
        groups.setdefault(process.role, []).append(process)
    for engine in status.attached:
        groups.setdefault(engine.role, []).append(engine)
    line: Line = [Span("clients → ", "dim")]
    engines = [role for role in ("prefill", "hybrid", "decode") if role in groups]
    for role in ["proxy", *engines]:
        if role == "decode" and "prefill" in groups:
            line += _between(status.links)
        elif role in engines:
            line.append(Span(" → " if role == engines[0] else "   ", "dim"))
        line += _marked(role, groups.get(role, []))
    for role in groups:
        if role not in ("proxy", *engines):
            line += [Span("   "), *_marked(role, groups[role])]
    if width_of(line) > width:
        # Numbers instead of a mark for each.
        line = _short(line)
    return line


def _between(links: Sequence[Link]) -> Line:
    """The arrow from prefill to decode, with the transports that carry KV."""
    used = sorted({link.transport for link in links if link.transport})
    levels = {link_level(link) for link in links}
    level: Level = next((level for level in _WORST if level in levels), "dim")
    word = ", ".join(used) if used else "no link"
    return [Span(f" ─ {word}" if links else " ─", level), Span(" → ", level)]


def _marked(role: str, members: Sequence[_Member]) -> Line:
    return [Span(f"{role} "), *(mark(member) for member in members)]


def mark(member: _Member) -> Span:
    """● for a process that is ready, ○ for one on its way, ✗ for one that is down."""
    state = _state(member)
    level = _LEVELS.get(cells.COLOURS.get(state, ""), "dim")
    if state in ("backoff", "failed", "stopped", "silent"):
        return Span("✗", "dim" if state == "stopped" else "bad")
    return Span("●" if level == "good" else "○", level)


def _state(member: _Member) -> str:
    if isinstance(member, AttachedStatus):
        return "draining" if member.leaving else "answers" if member.answers else "silent"
    return member.state


def _short(line: Line) -> Line:
    """The same with numbers: ●8 for eight marks in a row."""
    short: Line = []
    counts: list[int] = []
    for span in line:
        if short and span.text in ("●", "○", "✗") and short[-1] == span:
            counts[-1] += 1
        else:
            short.append(span)
            counts.append(1)
    return [
        span if count == 1 else Span(f"{span.text}{count}", span.level)
        for span, count in zip(short, counts, strict=True)
    ]


def tree(status: MeasuredStatus, host: str) -> list[Line]:
    """The host, its proxy and stores, and each engine with its device; below a prefill engine its links, with the speed
    of each."""
    lines: list[Line] = [[Span(clean(host), "title")]]
    members: list[_Member] = [process for process in status.processes if process.role == "proxy"]
    members += [process for process in status.processes if process.role not in ("proxy", "decode")]
    members += [process for process in status.processes if process.role == "decode"]
    members += status.attached
    names = {process.name: process for process in status.processes} | {one.name: one for one in status.attached}
    for number, member in enumerate(members):
        is_last = number == len(members) - 1
        lines.append([Span("└─ " if is_last else "├─ ", "dim"), *_node(member)])
        links = [link for link in status.links if link.peer == member.name]
        for place, link in enumerate(links):
            before = ("   " if is_last else "│  ") + ("└─ " if place == len(links) - 1 else "├─ ")
            lines.append([Span(before, "dim"), *_edge(link, names.get(link.reader))])
    return lines


def _node(member: _Member) -> Line:
    where = _device(member)
    work = "" if isinstance(member, AttachedStatus) or not member.running else f", {member.running} running"
    return [mark(member), Span(f" {clean(member.name)} "), Span(f"{member.role}, {where}{work}", "dim")]


def _device(member: _Member) -> str:
    if isinstance(member, AttachedStatus):
        return clean(f"{member.kind} at {member.host}:{member.port}")
    if member.gpus:
        return "GPU " + ", ".join(uuid[:12] for uuid in member.gpus)
    return f"CPU {cells.ranges(member.cpus)}" if member.cpus else "CPU"


def _edge(link: Link, reader: _Member | None) -> Line:
    level = link_level(link)
    over = f" over {link.protocol}" if link.protocol not in ("", link.transport) else ""
    speed = f" {link.gbps:.2f} GB/s" if link.gbps else ""
    text = f"{link.transport}{over}{speed}" if link.transport else "no link"
    if link.fallback:
        text += " FALLBACK"
    return [Span(text, level), Span(" → ", level), *([mark(reader)] if reader else []), Span(f" {clean(link.reader)}")]
