"""`pdctl status`: what runs, since when, and what happened to it."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from pathlib import Path

from pdctl import console
from pdctl.commands.common import FileOption, JsonOption, ServiceOption, Status, call, find_service

_COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "backoff": "yellow",
    "stopping": "yellow",
    "failed": "red",
    "answers": "green",
    "silent": "red",
}


def status(file: Path | None = FileOption, service: str | None = ServiceOption, as_json: bool = JsonOption) -> None:
    """Show the service's processes (state, restarts and their cause, device, pins) and how KV moves between them."""
    found = call(find_service(service, file), "GET", "/v1/status")
    if as_json:
        console.out(json.dumps(found, indent=2))
    else:
        show(found)


def show(found: Status) -> None:
    """The table for people."""
    console.out(f"service {found['service']}: {found['state']}, {found['served_model_name']} at {found['proxy_url']}\n")
    rows = [_row(process) for process in found["processes"]]
    header = ["PROCESS", "ROLE", "STATE", "SINCE", "RESTARTS", "PID", "DEVICE", "CPUS", "PORT", "MEMORY", "LAST EXIT"]
    console.out(console.table(header, rows, _COLOURS))
    if found["attached"]:
        header = ["ATTACHED", "ROLE", "KIND", "ADDRESS", "STATE"]
        console.out("\n" + console.table(header, [_attached(engine) for engine in found["attached"]], _COLOURS))
    if found["links"]:
        header = ["KV FROM", "TO", "TRANSPORT", "OVER", "TRANSFERS", "MOVED", "GB/S", "WHY"]
        console.out("\n" + console.table(header, [_link(link) for link in found["links"]], _COLOURS))
        _shout(found["links"])


def _attached(engine: Status) -> list[str]:
    state = "answers" if engine["answers"] else "silent"
    return [engine["name"], engine["role"], engine["kind"], f"{engine['host']}:{engine['port']}", state]


def _link(link: Status) -> list[str]:
    return [
        link["peer"],
        link["reader"],
        link["transport"] or "-",
        link["protocol"] or "-",
        str(link["pulls"]),
        f"{link['bytes'] / 2**20:.0f}M",
        f"{link['gbps']:.2f}" if link["gbps"] else "-",
        link["error"] or link["reason"],
    ]


def _shout(links: list[Status]) -> None:
    for link in links:
        pair = f"{link['peer']} to {link['reader']}"
        if link["fallback"]:
            mark = console.paint("FALLBACK", "red", sys.stdout)
            console.out(f"{mark} from {pair}: {link['fallback']}; {link['protocol']} carries the KV")
        elif link["error"]:
            console.out(f"{console.paint('NO LINK', 'red', sys.stdout)} from {pair}: {link['error']}")


def _row(process: Status) -> list[str]:
    last = process["last_exit"]
    gpus = process["gpus"]
    return [
        process["name"],
        process["role"],
        process["state"],
        _since(process["ready_since"]),
        str(process["restarts"]),
        str(process["pid"] or "-"),
        ",".join(gpus) if gpus else process["device"],
        ",".join(map(str, process["cpus"])),
        ",".join(map(str, process["ports"].values())),
        f"{process['rss_bytes'] / 2**20:.0f}M" if process["rss_bytes"] else "-",
        f"{last['reason']} {_since(last['at'])} ago" if last else process["reason"] or "-",
    ]


def _since(at: str | None) -> str:
    return console.duration(max(0.0, time.time() - datetime.fromisoformat(at).timestamp())) if at else "-"
