"""`pdctl why`: how and why a process exited, for its last exits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FileOption, JsonOption, ServiceOption, as_json_text, control, node_here
from pdctl.commands.inspect.logs import service_meant
from pdctl.errors import NotAnswering, NotRunning, PdctlError
from pdctl.host.users import state_root

if TYPE_CHECKING:
    from pdctl.control_api import ExitReport

_SHOWN_LINES = 15
_KEPT = 20
_DECISIONS = 10


def why(
    name: str = typer.Argument("", help="Process, such as decode-0; or HOST:PORT of an engine that registered itself."),
    elastic: bool = typer.Option(
        False, "--elastic", help="Show the last decisions about roles instead: see [elastic]."
    ),
    count: int = typer.Option(3, "-n", "--count", min=1, max=_KEPT, help="Number of exits to show, latest last."),
    lines: int = typer.Option(_SHOWN_LINES, "--lines", min=0, max=50, help="Number of log lines to show per exit."),
    as_json: bool = JsonOption,
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Show how and why a process exited: signal or exit code, cause, memory use, last log lines, kernel messages."""
    from pdctl.supervisor.rundir.journal import EXITS, read_exits

    meant = service_meant(service, file)
    folder = state_root() / meant / "logs"
    node = node_here(meant)
    if elastic:
        _show_decisions(_events_of(meant, folder, node), as_json)
        return
    if not name:
        raise PdctlError("no process is named", "for example: pdctl why decode-0, or: pdctl why --elastic")
    if told := _told_of_node(folder, name.removeprefix("http://")):
        # JSON is a list of exits, and there are none.
        console.out(as_json_text([]) if as_json else "\n".join(told[-count:]))
        return
    reports = with_unwritten([in_cluster(report, node) for report in read_exits(folder)], meant)
    found = [report for report in reports if name in (report.process, f"{report.node}/{report.process}")][-_KEPT:]
    if not found:
        known, silent = _known(meant, folder, node)
        if name not in known:
            where = f"service {meant!r}" if node else folder
            missing = f"; no answer from {', '.join(silent)}" if silent else ""
            raise PdctlError(f"no process {name!r} in {where}", f"known: {', '.join(known) or 'none'}{missing}")
        console.note(f"no exit of {name} is recorded in {folder / EXITS}{' or by other nodes' if node else ''}")
    if as_json:
        console.out(as_json_text(found[-count:]))
        return
    for report in found[-count:]:
        _show(report, lines)


def in_cluster(report: ExitReport, node: str) -> ExitReport:
    """A report from this node's own file, as other nodes tell it."""
    import msgspec

    return msgspec.structs.replace(report, node=node) if node else report


def _known(service: str, folder: Path, node: str) -> tuple[list[str], list[str]]:
    """The processes that have logs; of a cluster, also as NODE/NAME, and the nodes that do not answer."""
    if not node:
        return sorted({path.name.removesuffix(".log") for path in folder.glob("*.log")} - {"supervisor"}), []
    logs = control(service).log_names()
    bare = sorted({name for there in logs.names.values() for name in there})
    return bare + [f"{node}/{name}" for node, there in logs.names.items() for name in there], [*logs.silent]


def _events_of(service: str, folder: Path, node: str) -> list[dict[str, object]]:
    """The events that are kept; of a cluster, those of all nodes."""
    from pdctl.supervisor.rundir.journal import EVENTS, read_entries

    if not node:
        return read_entries(folder, EVENTS)
    return [
        {"at": e.at, "process": e.process, "event": e.event, "message": e.message, **e.detail, "node": e.node}
        for e in control(service).events(follow=False)
    ]


def _show_decisions(events: Sequence[dict[str, object]], as_json: bool) -> None:
    """The last ten decisions of the controller, and refusals, with the pressures: 1.0 is a target."""
    found = [entry for entry in events if entry.get("event") == "elastic"][-_DECISIONS:]
    if as_json:
        console.out(json.dumps(found, indent=2))
        return
    if not found:
        console.note("no decision about roles is recorded in the events; see [elastic] in the topology")
    for entry in found:
        pressures = ""
        for moment in ("now", "then"):
            values = entry.get(moment)
            if isinstance(values, dict) and (moment == "now" or values != entry.get("now")):
                told = ", ".join(f"{side} {value:.2f}" for side, value in values.items())
                pressures += f"; {'pressure' if moment == 'now' else 'then'} {told}"
        console.out(f"{entry.get('at', '')}  {entry.get('process', '')}: {entry.get('message', '')}{pressures}")


def _told_of_node(folder: Path, name: str) -> list[str]:
    """What happened to an engine that registered itself: pdctl did not start it, so there are no exits of it."""
    from pdctl.supervisor.rundir.journal import EVENTS, read_entries

    entries = (entry for entry in read_entries(folder, EVENTS) if entry.get("process") == name)
    told = [f"{entry.get('at', '')}  {name}: {entry.get('message', '')}" for entry in entries]
    # A process of the topology has a name without a colon.
    return told if ":" in name else []


def with_unwritten(reports: Sequence[ExitReport], service: str) -> list[ExitReport]:
    """The entries of the file, plus those that only the running supervisor has because the disk was full."""
    try:
        known = control(service).exits().exits
    except (NotRunning, NotAnswering):
        return [*reports]
    written = {(report.node, report.process, report.epoch, report.at) for report in reports}
    found = [*reports, *(r for r in known if (r.node, r.process, r.epoch, r.at) not in written)]
    return sorted(found, key=lambda report: report.at) if any(report.node for report in known) else found


def _show(report: ExitReport, lines: int) -> None:
    how = report.signal or (f"code {report.code}" if report.code is not None else "unknown")
    name = f"{report.node}/{report.process}" if report.node else report.process
    console.out(f"{report.at}  {name} (pid {report.pid}): {report.reason}")
    console.out(f"  exit      {how}{', core dumped' if report.core_dumped else ''}")
    console.out(f"  by        {report.by}")
    console.out(f"  lived     {console.duration(report.lived_s)}")
    if use := report.rusage:
        memory = f"{use.max_rss_bytes / 2**20:.0f} MB at most"
        console.out(f"  used      {memory}, {use.user_s:.1f} s user, {use.system_s:.1f} s system")
    for line in report.kernel:
        console.out(f"  kernel    {line}")
    console.out(f"  log       {report.log}")
    for line in report.last_lines[-lines:] if lines else ():
        console.out(f"            {line}")
    console.out("")
