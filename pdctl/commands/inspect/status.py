"""`pdctl status`: the processes of a service, their state and restarts."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FileOption, JsonOption, ServiceOption, as_json_text, control, find_service
from pdctl.commands.inspect import cells

if TYPE_CHECKING:
    from pdctl.control_api import (
        AttachedStatus,
        ClusterNode,
        KeysStatus,
        KeyStatus,
        Link,
        MeasuredProcess,
        MeasuredStatus,
    )

# Seconds between two refreshes of --watch.
_WATCH_S = 1.0


def status(
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    as_json: bool = JsonOption,
    keys: bool = typer.Option(False, "--keys", help="Only the API keys: their use, waiting requests and limits."),
    watch: bool = typer.Option(False, "-w", "--watch", help="Refresh every second until Ctrl-C."),
) -> None:
    """Show the service's processes (state, restarts and their causes, resource use, load) and the KV transfers."""
    name = find_service(service, file)
    # Not before: without a service this needs none of it.
    from pdctl.control_api import KeysStatus

    while True:
        found = control(name).keys() if keys else control(name).status()
        if watch and sys.stdout.isatty():
            # Move the cursor home and clear below it: no flicker.
            console.out("\x1b[H\x1b[J", end="")
        if as_json:
            console.out(as_json_text(found, indent=None if watch else 2))
        elif isinstance(found, KeysStatus):
            show_keys(found)
        else:
            show(found)
        if not watch:
            return
        time.sleep(_WATCH_S)


def show(found: MeasuredStatus) -> None:
    """Print the status as tables."""
    urls = ", ".join(found.proxy_urls) if found.nodes else found.proxy_url
    served = f", {found.served_model_name} at {urls}" if urls else ""
    console.out(f"service {found.service}: {found.state}{served}")
    if found.apply is not None and found.apply.state == "running":
        console.out(f"applying: {found.apply.step}")
    if found.nodes:
        _show_cluster(found)
    if found.processes or not found.nodes:
        console.out("")
        console.out(console.table(*_fitting(found.processes), cells.COLOURS))
    if found.attached:
        header = ["ATTACHED", "ROLE", "KIND", "ADDRESS", "STATE", "ADDED BY"]
        console.out("\n" + console.table(header, [_attached(engine) for engine in found.attached], cells.COLOURS))
    if found.links:
        header = ["KV FROM", "TO", "TRANSPORT", "OVER", "TRANSFERS", "MOVED", "GB/S", "WHY"]
        console.out("\n" + console.table(header, [_link(link) for link in found.links], cells.COLOURS))
        _shout(found.links)


def _show_cluster(found: MeasuredStatus) -> None:
    """Print the nodes, and what keeps the cluster from being what it should be."""
    warning = console.paint("warning:", "yellow", sys.stdout)
    if found.registry is not None and not found.registry.ok:
        reason = f"{cells.since(found.registry.since)}: {found.registry.reason}"
        console.out(f"{warning} etcd is not heard since {reason}; what runs goes on, and the plan is frozen")
    if found.state == "empty":
        console.out("no topology is published; publish one with: pdctl up -f FILE")
    if found.unplaced:
        console.out(f"{warning} no node runs {', '.join(found.unplaced)}; see: pdctl events")
    if found.refused:
        console.out(f"{warning} {found.refused}")
    header = ["NODE", "AGENT", "STATE", "VERSION", "COORDINATOR", "WHY"]
    console.out("\n" + console.table(header, [_node(node) for node in found.nodes], cells.COLOURS))


def _node(node: ClusterNode) -> list[str]:
    why = node.reason
    if node.state == "silent" and node.engines:
        why += f"; it ran {', '.join(node.engines)}"
    return [
        node.name,
        node.address,
        node.state,
        node.version or "-",
        "yes" if node.coordinator else "-",
        why or "-",
    ]


def show_keys(found: KeysStatus) -> None:
    """Print the API keys as a table."""
    header = ["KEY", "WEIGHT", "CLASS", "RUN", "WAIT", "REQUESTS", "REFUSED", "PROMPT", "CACHED", "OUTPUT", "QUEUED"]
    header += ["TTFT", "REQ/MIN LEFT", "TOK/MIN LEFT", "STREAMS"]
    if found.keys:
        console.out(console.table(header, [_key(key) for key in found.keys], {}))
    else:
        console.out("no API keys: the file of proxy.api_keys is not set, or empty")


def _key(key: KeyStatus) -> list[str]:
    counts = (key.running, key.waiting, key.requests, key.refused)
    tokens = (key.prompt_tokens, key.cached_tokens, key.output_tokens)
    return [
        key.name,
        f"{key.weight:g}",
        str(key.priority),
        *map(str, counts),
        *map(str, tokens),
        f"{1000 * key.queue_s:.0f}ms",
        "-" if key.ttft_s is None else f"{1000 * key.ttft_s:.0f}ms",
        "-" if key.requests_left is None else f"{key.requests_left} of {key.requests_per_minute}",
        "-" if key.tokens_left is None else f"{key.tokens_left} of {key.tokens_per_minute}",
        cells.number(key.streams),
    ]


# -- processes ---------------------------------------------------------------------------------------------


def _columns() -> list[tuple[str, int, Callable[[MeasuredProcess], str]]]:
    """Header, rank and cell function per column. On a narrow screen the columns with the highest rank go first."""
    return [
        ("PROCESS", 0, lambda p: p.name),
        ("NODE", 1, lambda p: p.node or "-"),
        ("ROLE", 5, cells.role_of),
        ("STATE", 0, lambda p: p.state),
        ("SINCE", 2, lambda p: f"{p.phase}, {p.phase_s:.0f}s" if p.phase_s is not None else cells.since(p.ready_since)),
        ("RESTARTS", 1, lambda p: str(p.restarts)),
        ("PID", 2, lambda p: str(p.pid or "-")),
        ("DEVICE", 7, lambda p: ",".join(p.gpus) if p.gpus else p.device),
        ("CPUS", 9, lambda p: cells.ranges(p.cpus)),
        ("PORT", 8, lambda p: ",".join(map(str, p.ports.values()))),
        ("CPU", 5, lambda p: cells.number(p.cpu_percent, "%.0f%%")),
        ("MEMORY", 4, lambda p: cells.size(p.rss_bytes)),
        ("GPU MEM", 6, lambda p: cells.size(p.gpu_memory_bytes)),
        ("RUN", 3, lambda p: cells.number(p.running)),
        ("QUEUE", 3, lambda p: cells.number(p.waiting)),
        ("KV", 3, lambda p: "-" if p.kv_used is None else f"{100 * p.kv_used:.0f}%"),
        ("HITS", 6, lambda p: "-" if p.prefix_hit_rate is None else f"{100 * p.prefix_hit_rate:.0f}%"),
        ("LEASES", 6, lambda p: cells.number(p.leases)),
        ("TOK/S", 4, lambda p: cells.number(p.tokens_per_s, "%.0f")),
        ("INLINE", 6, cells.inline_part),
        ("LAST EXIT", 1, cells.last_exit_of),
    ]


def _fitting(processes: Sequence[MeasuredProcess]) -> tuple[list[str], list[list[str]]]:
    """Header and rows with as many columns as fit the terminal; all columns if stdout is not a terminal."""
    columns = [(header, rank, [cell(process) for process in processes]) for header, rank, cell in _columns()]
    # Drop columns that are empty for every process.
    columns = [c for c in columns if c[1] == 0 or c[0] in ("RESTARTS", "LAST EXIT") or set(c[2]) - {"-"}]
    room = shutil.get_terminal_size((10_000, 24)).columns if sys.stdout.isatty() else 10_000
    while len(columns) > 2 and sum(max(map(len, [header, *cells])) + 2 for header, _, cells in columns) - 2 > room:
        columns.remove(max(columns, key=lambda column: column[1]))
    rows = [list(row) for row in zip(*(cells for _, _, cells in columns), strict=True)]
    return [header for header, _, _ in columns], rows


# -- the rest ----------------------------------------------------------------------------------------------


def _attached(engine: AttachedStatus) -> list[str]:
    state = "leaving" if engine.leaving else "answers" if engine.answers else "silent"
    added_by = "itself" if engine.registered else "the topology"
    return [engine.name, engine.role, engine.kind, f"{engine.host}:{engine.port}", state, added_by]


def _link(link: Link) -> list[str]:
    return [
        link.peer,
        link.reader,
        link.transport or "-",
        link.protocol or "-",
        str(link.pulls),
        f"{link.bytes / 2**20:.0f}M",
        f"{link.gbps:.2f}" if link.gbps else "-",
        link.error or link.reason,
    ]


def _shout(links: Sequence[Link]) -> None:
    for link in links:
        pair = f"{link.peer} to {link.reader}"
        if link.fallback:
            mark = console.paint("FALLBACK", "red", sys.stdout)
            console.out(f"{mark} from {pair}: {link.fallback}; {link.protocol} carries the KV")
        elif link.error:
            console.out(f"{console.paint('NO LINK', 'red', sys.stdout)} from {pair}: {link.error}")
