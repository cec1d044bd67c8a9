"""Listening TCP ports and their processes, from /proc/net/tcp and the socket links in /proc/PID/fd."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_LISTEN = "0A"  # include/net/tcp_states.h


@dataclass(frozen=True, slots=True)
class PortHolder:
    """The process behind a listening port; pid None for another user's process."""

    pid: int | None
    command: str

    def describe(self) -> str:
        """A description for messages: `pid 41 (python -m http.server)`."""
        return f"pid {self.pid} ({self.command})" if self.pid else "a process of another user"


class Listener(NamedTuple):
    """A listening TCP socket of a process. `address`: 0.0.0.0 or :: if it takes connections at every address."""

    address: str
    port: int
    pid: int


def listeners_of(pids: Collection[int], proc_root: Path = Path("/proc")) -> tuple[Listener, ...]:
    """The listening sockets of these processes, by port; those of several processes count for the first."""
    sockets = _listening_sockets(proc_root)
    found: dict[str, Listener] = {}
    for pid in sorted(pids):
        for inode in _sockets_of(proc_root / str(pid)) & set(sockets):
            address, port = sockets[inode]
            found.setdefault(inode, Listener(address, port, pid))
    return tuple(sorted(found.values(), key=lambda listener: (listener.port, listener.address)))


def listening_ports(proc_root: Path = Path("/proc")) -> dict[int, PortHolder]:
    """Port to holder, for every listening TCP socket (IPv4 and IPv6)."""
    sockets = _listening_sockets(proc_root)
    if not sockets:
        return {}
    owners = _socket_owners(proc_root, set(sockets))
    unknown = PortHolder(None, "?")
    return {port: owners.get(inode, unknown) for inode, (_, port) in sockets.items()}


def _listening_sockets(proc_root: Path) -> dict[str, tuple[str, int]]:
    """Socket inode to address and port."""
    found: dict[str, tuple[str, int]] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc_root / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _LISTEN:
                address, _, port = fields[1].rpartition(":")
                found[fields[9]] = _address(address), int(port, 16)
    return found


def _address(text: str) -> str:
    """An address as the kernel prints it: words of 32 bits in this machine's byte order."""
    words = [int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


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
