"""Listening TCP ports and their processes, from /proc/net/tcp and the socket links in /proc/PID/fd."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"  # include/net/tcp_states.h


@dataclass(frozen=True, slots=True)
class PortHolder:
    """The process behind a listening port; pid None for another user's process."""

    pid: int | None
    command: str

    def describe(self) -> str:
        """A description for messages: `pid 41 (python -m http.server)`."""
        return f"pid {self.pid} ({self.command})" if self.pid else "a process of another user"


def listening_ports(proc_root: Path = Path("/proc")) -> dict[int, PortHolder]:
    """Port to holder, for every listening TCP socket (IPv4 and IPv6)."""
    inodes = _listening_inodes(proc_root)
    if not inodes:
        return {}
    owners = _socket_owners(proc_root, set(inodes))
    unknown = PortHolder(None, "?")
    return {port: owners.get(inode, unknown) for inode, port in inodes.items()}


def _listening_inodes(proc_root: Path) -> dict[str, int]:
    """Socket inode to port."""
    found: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc_root / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _LISTEN:
                found[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    return found


def _socket_owners(proc_root: Path, inodes: set[str]) -> dict[str, PortHolder]:
    owners: dict[str, PortHolder] = {}
    for process in proc_root.iterdir():
        if not process.name.isdigit():
            continue
        for inode in _sockets_of(process) & inodes:
            owners[inode] = PortHolder(int(process.name), _command(process))
    return owners


def _sockets_of(process: Path) -> set[str]:
    sockets = set()
    try:
        for descriptor in os.listdir(process / "fd"):  # noqa: PTH208 - thousands of Path objects would cost more
            link = os.readlink(f"{process}/fd/{descriptor}")  # noqa: PTH115
            if link.startswith("socket:["):
                sockets.add(link[8:-1])
    except OSError:
        # The process has just exited, or belongs to another user.
        pass
    return sockets


def _command(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "?"
    return words if len(words) <= 60 else words[:57] + "..."
