"""`pdctl doctor`: what is wrong with this machine, before the first request finds out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import JsonOption, Status, topology_file
from pdctl.errors import ConfigError, PdctlError, Verdict

if TYPE_CHECKING:
    from pdctl.doctor import Finding
    from pdctl.topology import Topology

# Starting two processes, loading a transport's library and moving the bytes takes seconds; then something hangs.
_PROBE_S = 120.0


class Area(StrEnum):
    """What can be looked into."""

    RDMA = "rdma"
    HOST = "host"
    RUNTIME = "runtime"
    TOPOLOGY = "topology"
    TRANSFER = "transfer"


# What is looked into when nothing is named: everything that disturbs nobody.
_USUAL = (Area.RDMA, Area.HOST, Area.RUNTIME, Area.TOPOLOGY)


class Backend(StrEnum):
    """Transports by name."""

    SHM = "shm"
    MOONCAKE = "mooncake"
    NIXL = "nixl"


class Protocol(StrEnum):
    """What should carry the bytes."""

    AUTO = "auto"
    TCP = "tcp"
    RDMA = "rdma"


def doctor(
    areas: list[Area] = typer.Argument(None, help="Default: rdma, host, runtime, topology."),
    against: Path | None = typer.Option(
        None, "--against", help="Judge only what this topology uses, and what it needs."
    ),
    ibstatus: bool = typer.Option(False, "--ibstatus", help="Print what ibstatus prints: pdctl doctor rdma --ibstatus"),
    port: list[str] = typer.Option([], "--port", help="With --ibstatus: DEVICE or DEVICE:PORT; several times."),
    sysfs_root: Path = typer.Option(
        Path("/sys"), "--sysfs-root", help="Read another tree, such as one from a bug report."
    ),
    only: Backend | None = typer.Option(None, "--transport", help="transfer: only this one."),
    protocol: Protocol = typer.Option(Protocol.AUTO, "--protocol", help="transfer: what should carry the bytes."),
    mib: int = typer.Option(64, "--mib", min=1, max=16384, help="transfer: bytes to move, in MiB."),
    as_json: bool = JsonOption,
) -> None:
    """Check this machine. Exit codes: 0 good, 1 a warning, 2 critical, 3 could not tell. Areas: rdma, host, runtime,
    topology, and transfer, which moves bytes over each transport and times it."""
    if ibstatus:
        _ibstatus(port, sysfs_root)
    chosen = areas or list(_USUAL)
    if Area.TRANSFER in chosen:
        code = _transfer(only, protocol, mib, as_json)
        if chosen == [Area.TRANSFER]:
            raise Verdict(code)
    from pdctl.doctor import exit_code
    from pdctl.doctor.report import summary, text

    findings = look(chosen, against, sysfs_root)
    if as_json:
        console.out(json.dumps({"schema": 1, "findings": [finding.to_dict() for finding in findings]}, indent=2))
    else:
        console.out(text(findings))
        console.note(summary(findings))
    raise Verdict(exit_code(findings))


def look(areas: list[Area], against: Path | None, sysfs_root: Path = Path("/sys")) -> list[Finding]:
    """The findings of some areas. What a topology does not use is not judged."""
    from pdctl.doctor import topology as topology_checks
    from pdctl.host import read_host
    from pdctl.loader import load_file

    path = against or topology_file(None)
    findings: list[Finding] = []
    topology = None
    if path is not None:
        host = read_host()
        try:
            topology = load_file(path, host)
            if Area.TOPOLOGY in areas:
                findings += topology_checks.check(topology, host)
        except ConfigError as failure:
            findings += topology_checks.problems(failure.source, failure.problems)
    if Area.RDMA in areas:
        findings += _rdma(topology, sysfs_root)
    if Area.HOST in areas:
        findings += _host(topology)
    if Area.RUNTIME in areas:
        findings += _runtime(topology)
    return findings


def _asks_for_rdma(topology: Topology | None) -> bool:
    return topology is not None and topology.transfer.protocol == "rdma"


def _rdma(topology: Topology | None, sysfs_root: Path) -> list[Finding]:
    from pdctl.doctor.rdma import Scene, Wanted, check
    from pdctl.host.rdma import read_tree
    from pdctl.host.sysfs import Reader

    reader = Reader()
    devices = topology.transfer.devices if topology else ()
    wanted = Wanted(devices, _asks_for_rdma(topology) or bool(devices))
    return check(Scene(read_tree(sysfs_root, reader=reader), wanted, dict(os.environ), sysfs_root, reader))


def _host(topology: Topology | None) -> list[Finding]:
    from pdctl.doctor.host import HostScene, check

    started = [group for group in topology.engines if not group.is_attached] if topology else []
    pools = int(sum(group.kv_cache_gb * group.replicas for group in started) * 2**30)
    on_cpu = int(sum(g.kv_cache_gb * g.replicas for g in started if g.device.value == "cpu") * 2**30)
    return check(HostScene(pinned_bytes=pools if _asks_for_rdma(topology) else 0, shared_bytes=on_cpu))


def _runtime(topology: Topology | None) -> list[Finding]:
    from pdctl.doctor.runtime import RuntimeScene, check

    far = [group.url for group in topology.engines if group.is_attached] if topology else []
    hosts = ("127.0.0.1", *(url.removeprefix("http://").rpartition(":")[0] for url in far))
    return check(RuntimeScene(dict(os.environ), _asks_for_rdma(topology), hosts))


def _ibstatus(ports: list[str], sysfs_root: Path) -> None:
    from pdctl.doctor.ibstatus import ibstatus

    output, code = ibstatus(ports, sysfs_root)
    sys.stdout.buffer.write(output)
    sys.stdout.flush()
    raise Verdict(code)


def _transfer(only: Backend | None, protocol: Protocol, mib: int, as_json: bool) -> int:
    names = [only.value] if only else [backend.value for backend in Backend]
    found = []
    for name in names:
        console.note(f"{name}: moving {mib} MiB between two processes ...")
        found.append(_probe(name, protocol.value, mib))
    console.out(json.dumps(found, indent=2) if as_json else _table(found))
    _advise(found)
    return _exit_code(found)


def _probe(name: str, protocol: str, mib: int) -> Status:
    words = ["probe", "--transport", name, "--protocol", protocol, "--mib", str(mib)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pdctl.engine", *words],
            capture_output=True,
            text=True,
            timeout=_PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"transport": name, "error": f"no result within {_PROBE_S:g} s"}
    try:
        found = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        if "ModuleNotFoundError" in done.stderr:
            hint = "install the engine's packages: pip install 'pdctl[engine]'"
            raise PdctlError(f"the probe cannot run: {done.stderr.strip().splitlines()[-1]}", hint) from None
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"transport": name, "error": lines[-1]}
    assert isinstance(found, dict)
    return found


def _table(found: list[Status]) -> str:
    header = ["TRANSPORT", "OVER", "BYTES", "GB/S", "OF A COPY", "64K BLOCKS", "GB/S", "OF A COPY", "64 BYTES"]
    return console.table(header, [_row(entry) for entry in found], {"RIGHT": "green", "WRONG": "red"})


def _row(entry: Status) -> list[str]:
    if "error" in entry:
        return [entry["transport"], "-", "not available", *["-"] * 6]
    return [
        entry["transport"],
        entry["protocol"],
        "RIGHT" if entry["bytes_right"] else "WRONG",
        f"{entry['gbps']:.2f}",
        f"{entry['of_copy']:.0%}",
        str(entry["blocks"]),
        f"{entry['blocks_gbps']:.2f}",
        f"{entry['blocks_of_copy']:.0%}",
        f"{entry['latency_us']:.0f} us",
    ]


def _advise(found: list[Status]) -> None:
    for entry in found:
        if "error" in entry:
            console.note(f"{entry['transport']}: {entry['error']}")
        elif entry["fallback"]:
            mark = console.paint("FALLBACK", "red", sys.stderr)
            console.note(f"{entry['transport']}: {mark} to {entry['protocol']}: {entry['fallback']}")


def _exit_code(found: list[Status]) -> int:
    works = [entry for entry in found if "error" not in entry]
    if not works or not all(entry["bytes_right"] for entry in works):
        return 2
    return 1 if any(entry["fallback"] for entry in works) else 0
