"""`pdctl doctor`: what is wrong with this machine, before the first request finds out. One area so far: transfer."""

from __future__ import annotations

import json
import subprocess
import sys
from enum import StrEnum

import typer

from pdctl import console
from pdctl.commands.common import JsonOption, Status
from pdctl.errors import PdctlError

# Starting two processes, loading a transport's library and moving the bytes takes seconds; then something hangs.
_PROBE_S = 120.0


class Area(StrEnum):
    """What can be looked into."""

    TRANSFER = "transfer"


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
    area: Area = typer.Argument(..., help="transfer: move bytes over each transport and time it"),
    only: Backend | None = typer.Option(None, "--transport", help="Only this one."),
    protocol: Protocol = typer.Option(Protocol.AUTO, "--protocol", help="What should carry the bytes: auto, tcp, rdma"),
    mib: int = typer.Option(64, "--mib", min=1, max=16384, help="Bytes to move, in MiB."),
    as_json: bool = JsonOption,
) -> None:
    """Check this machine. Exit codes: 0 good, 1 a warning, 2 wrong bytes or nothing works."""
    assert area is Area.TRANSFER
    names = [only.value] if only else [backend.value for backend in Backend]
    found = []
    for name in names:
        console.note(f"{name}: moving {mib} MiB between two processes ...")
        found.append(_probe(name, protocol.value, mib))
    console.out(json.dumps(found, indent=2) if as_json else _table(found))
    _advise(found)
    raise typer.Exit(_exit_code(found))


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
