"""`pdctl why`: how a process ended, the last times it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from pdctl import console
from pdctl.commands.common import FileOption, JsonOption, ServiceOption, call
from pdctl.commands.inspect.logs import service_meant
from pdctl.errors import NotAnswering, NotRunning, PdctlError
from pdctl.host.users import state_root

_SHOWN_LINES = 15
_KEPT = 20


def why(
    name: str = typer.Argument(..., help="A process, such as decode-0."),
    count: int = typer.Option(3, "-n", "--count", min=1, max=_KEPT, help="How many of its last exits."),
    lines: int = typer.Option(_SHOWN_LINES, "--lines", min=0, max=50, help="Log lines shown of each."),
    as_json: bool = JsonOption,
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Show how and why a process ended: signal or code, by whom, memory, its last words, what the kernel said."""
    from pdctl.supervisor.rundir.journal import EXITS, read_entries

    meant = service_meant(service, file)
    folder = state_root() / meant / "logs"
    entries = with_unwritten(read_entries(folder, EXITS), meant)
    found = [entry for entry in entries if entry.get("process") == name][-_KEPT:]
    if not found:
        known = sorted({path.name.removesuffix(".log") for path in folder.glob("*.log")} - {"supervisor"})
        if name not in known:
            raise PdctlError(f"no process {name!r} is known in {folder}", f"known: {', '.join(known) or 'none'}")
        console.note(f"no end of {name} is recorded in {folder / EXITS}")
    if as_json:
        console.out(json.dumps(found[-count:], indent=2))
        return
    for entry in found[-count:]:
        _show(entry, lines)


def with_unwritten(entries: list[dict[str, object]], service: str) -> list[dict[str, object]]:
    """The entries of the file, and those that only a running supervisor knows: a full disk took none."""
    try:
        known = call(service, "GET", "/v1/exits")["exits"]
    except (NotRunning, NotAnswering):
        return entries
    written = {(entry.get("process"), entry.get("epoch"), entry.get("at")) for entry in entries}
    return [*entries, *(e for e in known if (e["process"], e["epoch"], e["at"]) not in written)]


def _show(entry: dict[str, Any], lines: int) -> None:
    how = entry["signal"] or (f"code {entry['code']}" if entry["code"] is not None else "unknown")
    console.out(f"{entry['at']}  {entry['process']} (pid {entry['pid']}): {entry['reason']}")
    console.out(f"  exit      {how}{', core dumped' if entry['core_dumped'] else ''}")
    console.out(f"  by        {entry['by']}")
    console.out(f"  lived     {console.duration(entry['lived_s'])}")
    if use := entry["rusage"]:
        memory = f"{use['max_rss_bytes'] / 2**20:.0f} MB at most"
        console.out(f"  used      {memory}, {use['user_s']:.1f} s user, {use['system_s']:.1f} s system")
    for line in entry["kernel"]:
        console.out(f"  kernel    {line}")
    console.out(f"  log       {entry['log']}")
    for line in entry["last_lines"][-lines:] if lines else []:
        console.out(f"            {line}")
    console.out("")
