"""`pdctl doctor`: find what is wrong with this machine before the first request does."""

from __future__ import annotations

import difflib
import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FILE_ENV, JsonOption, given_options, topology_file
from pdctl.commands.inspect import transfers
from pdctl.doctor import Area
from pdctl.errors import PdctlError, Verdict
from pdctl.transports import TRANSPORTS

if TYPE_CHECKING:
    from pdctl.doctor import Finding
    from pdctl.doctor.inspection import Inspection, Where
    from pdctl.doctor.transfer import Result


def _known_transport(name: str) -> str:
    if name and name not in TRANSPORTS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(TRANSPORTS)}")
    return name


class Protocol(StrEnum):
    """Network protocol of a transfer."""

    AUTO = "auto"
    TCP = "tcp"
    RDMA = "rdma"


_CLUSTER = "Several machines"
_MODES = "Print something else instead of findings"


_WordsArgument = typer.Argument(
    None,
    metavar="[AREA]...",
    help=f"Areas to check: {', '.join(Area)}. Default: all but transfer. "
    "With --ibstatus and --devinfo: DEVICE or DEVICE:PORT.",
)
_AgainstOption = typer.Option(
    None,
    "--against",
    envvar=FILE_ENV,
    help="Check only what this topology uses and needs. Default: ./pdctl.toml if it exists.",
)
_PortOption = typer.Option(
    [], "--port", help="With --ibstatus and --devinfo: DEVICE or DEVICE:PORT. Repeatable.", rich_help_panel=_MODES
)
_MatrixOption = typer.Option(
    False, "--matrix", help="Print the distance between GPUs and RDMA devices.", rich_help_panel=_MODES
)
_WatchOption = typer.Option(
    False, "--watch", help="Print RDMA traffic and errors at intervals.", rich_help_panel=_MODES
)
_IntervalOption = typer.Option(1.0, "--interval", min=0.05, max=3600, help="With --watch: seconds between samples.")
_BundleOption = typer.Option(
    None, "--bundle", help="Write findings, host facts and logs to a .tar.gz for a bug report. Secrets are removed."
)
_KmsgOption = typer.Option(
    Path("/dev/kmsg"), "--kmsg", help="Kernel log to read: a device, or a file with the output of dmesg."
)
_SysfsRootOption = typer.Option(
    Path("/sys"), "--sysfs-root", help="Read this sysfs tree instead, such as one from a bug report."
)
_OnlyOption = typer.Option(
    "",
    "--transport",
    callback=_known_transport,
    help=f"Area transfer: test only this transport: {', '.join(TRANSPORTS)}.",
)


_AllNodesOption = typer.Option(
    False, "--all-nodes", help="In a cluster: check every node, and compare them.", rich_help_panel=_CLUSTER
)
_BetweenOption = typer.Option(
    ("", ""),
    "--between",
    metavar="NODE NODE",
    show_default=False,
    help="Area transfer, in a cluster: move bytes from the first node to the second.",
    rich_help_panel=_CLUSTER,
)


def doctor(
    context: typer.Context,
    words: list[str] = _WordsArgument,
    against: Path | None = _AgainstOption,
    as_json: bool = JsonOption,
    ibstatus: bool = typer.Option(False, "--ibstatus", help="Print the output of ibstatus.", rich_help_panel=_MODES),
    devinfo: bool = typer.Option(False, "--devinfo", help="Print the output of ibv_devinfo.", rich_help_panel=_MODES),
    port: list[str] = _PortOption,
    matrix: bool = _MatrixOption,
    listed: bool = typer.Option(False, "--list", help="List all checks.", rich_help_panel=_MODES),
    watch: bool = _WatchOption,
    interval: float = _IntervalOption,
    count: int = typer.Option(0, "--count", min=0, help="With --watch: number of samples; 0 = until Ctrl-C."),
    bundle: Path | None = _BundleOption,
    kmsg: Path = _KmsgOption,
    sysfs_root: Path = _SysfsRootOption,
    only: str = _OnlyOption,
    protocol: Protocol = typer.Option(Protocol.AUTO, "--protocol", help="Area transfer: network protocol to use."),
    mib: int = typer.Option(64, "--mib", min=1, max=16384, help="Area transfer: size of the transfer in MiB."),
    all_nodes: bool = _AllNodesOption,
    between: tuple[str, str] = _BetweenOption,
) -> None:
    """Check this machine. Exit codes: 0 ok, 1 warning, 2 critical, 3 unknown. The area transfer moves bytes over each
    transport and times it; it runs only when named."""
    areas, devices = _areas_and_devices(words or [], takes_devices=ibstatus or devinfo)
    port = [*devices, *port]
    _refuse_what_would_be_ignored(given_options(context), areas)
    if ibstatus:
        _ibstatus(port, sysfs_root)
    if listed:
        return _list(as_json)
    if all_nodes or between[0]:
        from pdctl.commands.cluster import examine

        if all_nodes:
            return examine.all_nodes(against, as_json)
        return examine.between(against, between, only, protocol.value, mib, as_json)
    inspection = _inspect(against, sysfs_root, kmsg)
    if devinfo:
        return _devinfo(inspection, port)
    if matrix:
        return _matrix(inspection)
    if watch:
        return _watch(inspection, interval, count, as_json)
    chosen = tuple(areas or [area for area in Area if area is not Area.TRANSFER])
    moved = _transfer(inspection, only, protocol, mib) if Area.TRANSFER in chosen else None
    found = inspection.findings(chosen) if chosen != (Area.TRANSFER,) else None
    _tell(found, moved, as_json)
    if bundle is not None:
        _bundle(bundle, inspection, found or [])
    raise Verdict(_judged(inspection, found, moved))


def _areas_and_devices(words: list[str], takes_devices: bool) -> tuple[list[Area], list[str]]:
    """Split the arguments into areas and devices (as ibstatus takes them). Raises PdctlError."""
    areas, devices = [], []
    for word in words:
        if word in list(Area):
            areas.append(Area(word))
        elif takes_devices:
            devices.append(word)
        else:
            close = difflib.get_close_matches(word, list(Area), 1)
            hint = f"did you mean '{Area(close[0]).value}'?" if close else f"areas: {', '.join(Area)}"
            raise PdctlError(f"the doctor has no area {word!r}", hint)
    return areas, devices


# Options by mode. "" is the normal mode, which prints findings; "transfer" holds for the area transfer.
_HEEDED = {
    "ibstatus": {"port", "sysfs_root"},
    "devinfo": {"port", "sysfs_root"},
    "matrix": {"against", "sysfs_root"},
    "listed": {"as_json"},
    "watch": {"against", "sysfs_root", "interval", "count", "as_json"},
    "all_nodes": {"against", "as_json"},
    "between": {"against", "as_json", "only", "protocol", "mib"},
    "transfer": {"only", "protocol", "mib"},
    "": {"against", "as_json", "bundle", "kmsg", "sysfs_root"},
}
# The area that may be named beside a mode; RDMA for the others.
_AREA_OF = {"between": Area.TRANSFER, "all_nodes": None}
_CHOICES = ("ibstatus", "devinfo", "matrix", "listed", "watch", "all_nodes", "between")


def _refuse_what_would_be_ignored(given: dict[str, str], areas: list[Area]) -> None:
    """Raise PdctlError for an option that has no effect in the chosen mode."""
    modes = [name for name in _CHOICES if name in given]
    if len(modes) > 1:
        raise PdctlError(f"{given[modes[0]]} and {given[modes[1]]} cannot be combined", "use one of them")
    mode = modes[0] if modes else ""
    heeded = _HEEDED[mode] | (_HEEDED["transfer"] if Area.TRANSFER in areas and not mode else set())
    if areas == [Area.TRANSFER]:
        heeded -= {"bundle"}
    if areas and Area.RDMA not in areas:
        # Only the area rdma reads the kernel log.
        heeded -= {"kmsg"}
    ignored = [written for name, written in given.items() if name not in {*heeded, "words", mode}]
    if ignored:
        where = f"with {given[mode]}" if mode else "here"
        hints = [
            f"with {_written(name)}"
            for name, names in _HEEDED.items()
            if name and _key(given, ignored[0]) in names and name != mode
        ]
        raise PdctlError(
            f"{ignored[0]} does nothing {where}", f"use it {' or '.join(hints)}" if hints else "leave it out"
        )
    of_mode = _AREA_OF.get(mode, Area.RDMA)
    if mode and (others := [area for area in areas if area is not of_mode]):
        raise PdctlError(f"{given[mode]} does not check {others[0].value}", f"use: pdctl doctor {given[mode]}")


def _key(given: dict[str, str], option: str) -> str:
    return next(name for name, written in given.items() if written == option)


def _written(mode: str) -> str:
    return {"transfer": "the area transfer", "listed": "--list"}.get(mode, f"--{mode}")


def _inspect(against: Path | None, sysfs_root: Path, kmsg: Path) -> Inspection:
    from pdctl.doctor.inspection import Inspection, Where

    inspection = Inspection(Where(against or topology_file(None), sysfs_root=sysfs_root, kernel_log=kmsg))
    inspection.where = _with_what_runs(inspection)
    return inspection


def _with_what_runs(inspection: Inspection) -> Where:
    from dataclasses import replace

    from pdctl.host.processes.presence import supervisor_of
    from pdctl.supervisor.rundir.adoption import read_adoptable

    run_dir = Path(inspection.plan.run_dir) if inspection.plan else None
    # Processes that outlived their supervisor still hold their ports and memory.
    running = run_dir is not None and (supervisor_of(run_dir) is not None or read_adoptable(run_dir) is not None)
    return replace(inspection.where, is_running=running)


def _tell(found: list[Finding] | None, moved: list[Result] | None, as_json: bool) -> None:
    """Print one JSON document, or tables."""
    from pdctl.doctor.report import summary, text

    if as_json:
        document: dict[str, object] = {"schema": 1}
        document |= {} if found is None else {"findings": [finding.to_dict() for finding in found]}
        document |= {} if moved is None else {"transfer": moved}
        console.out(json.dumps(document, indent=2))
    if moved is not None:
        if not as_json:
            console.out(transfers.table(moved))
        transfers.advise(moved)
    if found is not None and not as_json:
        console.out(text(found))
        console.note(summary(found))


def _judged(inspection: Inspection, found: list[Finding] | None, moved: list[Result] | None) -> int:
    from pdctl.doctor import exit_code, transfer

    needed = inspection.topology.transfer.backend if inspection.topology else ""
    codes = [] if found is None else [exit_code(found)]
    return _worst(codes if moved is None else [*codes, transfer.exit_code(moved, needed)])


def _bundle(path: Path, inspection: Inspection, found: list[Finding]) -> None:
    from pdctl.doctor.bundle import write

    try:
        names = write(path, inspection, found)
    except OSError as failure:
        raise PdctlError(
            f"{path} cannot be written: {failure.strerror}", "choose a file in a folder that you can write to"
        ) from None
    console.note(f"{path} contains {', '.join(names)}. Secrets and prompts were removed; check it before you send it.")


def _worst(codes: list[int]) -> int:
    """The worst exit code: critical (2), then warning (1), then unknown (3)."""
    return next((code for code in (2, 1, 3) if code in codes), 0)


# -- other modes -------------------------------------------------------------------------------------------


def _ibstatus(ports: list[str], sysfs_root: Path) -> None:
    from pdctl.doctor.ibstatus import ibstatus

    output, code = ibstatus(ports, sysfs_root)
    console.out_bytes(output)
    raise Verdict(code)


def _devinfo(inspection: Inspection, ports: list[str]) -> None:
    from pdctl.doctor.devinfo import devinfo
    from pdctl.doctor.verbs import read_verbs

    # The verbs library always reads this machine, so it is used only for this machine's own sysfs tree.
    wanted = {device.name: [port.number for port in device.ports] for device in inspection.tree.devices}
    known = read_verbs(wanted) if wanted and inspection.where.sysfs_root == Path("/sys") else {}
    console.out(devinfo(inspection.tree, known, ports), end="")


def _matrix(inspection: Inspection) -> None:
    from pdctl.doctor.areas.affinity import matrix

    facts = inspection.affinity()
    if not facts.gpus or not facts.devices:
        missing = "no GPU" if not facts.gpus else "no RDMA device that is up"
        raise PdctlError(f"there is nothing to pair: {missing} on this machine")
    console.out(matrix(facts))


def _list(as_json: bool) -> None:
    from pdctl.doctor.catalogue import CHECKS

    if as_json:
        console.out(json.dumps([check._asdict() for check in CHECKS], indent=2))
    else:
        rows = [[check.id, check.area, check.severity, check.fires] for check in CHECKS]
        console.out(console.table(["CHECK", "AREA", "SEVERITY", "FIRES WHEN"], rows))


def _watch(inspection: Inspection, interval: float, count: int, as_json: bool) -> None:
    """Compare each sample with the one before, until Ctrl-C."""
    from pdctl.doctor import exit_code
    from pdctl.doctor.counters import compare, traffic

    if not inspection.tree.devices:
        raise PdctlError("there is no RDMA device to watch", "find out why with: pdctl doctor rdma")
    before, worst, number = inspection.sample(), 0, 0
    while not count or number < count:
        time.sleep(interval)
        number += 1
        now = inspection.sample()
        found, moved = compare(before, now), traffic(before, now)
        if as_json:
            ports = {name: {"received_gbs": r, "sent_gbs": s} for name, (r, s) in moved.items()}
            console.out(json.dumps({"ports": ports, "findings": [finding.to_dict() for finding in found]}))
        else:
            shown = "  ".join(f"{name} {r:.3f} in {s:.3f} out GB/s" for name, (r, s) in moved.items())
            console.out(f"{time.strftime('%H:%M:%S')}  {shown}")
            for finding in found:
                console.out(
                    f"          {finding.severity.value}: {finding.subject} {finding.observed}: {finding.cause}"
                )
        worst, before = _worst([worst, exit_code(found)]), now
    raise Verdict(worst)


# -- transfer ----------------------------------------------------------------------------------------------


def _transfer(inspection: Inspection, only: str, protocol: Protocol, mib: int) -> list[Result]:
    from pdctl.doctor import transfer

    found = []
    settings = inspection.topology.transfer if inspection.topology else None
    # The topology's protocol, unless --protocol was given.
    asked = settings.protocol if settings and protocol is Protocol.AUTO else protocol.value
    for probe in transfer.probes(inspection.plan, only or None, asked, mib):
        where = f", {probe.pair}" if probe.pair else ""
        console.note(f"{probe.transport}{where}: moving {mib} MiB between two processes ...")
        found.append(transfer.run(probe, inspection.tree))
    return found
