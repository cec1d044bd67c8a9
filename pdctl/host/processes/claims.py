"""Ports that a service claims for its processes, also while these do not listen: two services that start at the same
time must not choose the same port.

A claim is an abstract Unix socket that is named like the port. Like ports, such names belong to one network namespace,
can be held once, are seen by all users (/proc/net/unix), and are free again when their holder dies. See unix(7).
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterable, Set
from pathlib import Path

_NAME = "pdctl-port-"
# The kernel shows the final zero byte of no name, and the first one as "@".
_SHOWN = re.compile(rf" @{_NAME}(\d+)$", re.MULTILINE)


def claimed_ports(proc_root: Path = Path("/proc")) -> frozenset[int]:
    """The ports that services of this network namespace claim."""
    try:
        return frozenset(map(int, _SHOWN.findall((proc_root / "net" / "unix").read_text(errors="replace"))))
    except OSError:
        return frozenset()


class PortTaken(Exception):
    """Another service claims it."""


class PortClaims:
    """The claims of this process."""

    def __init__(self) -> None:
        self._held: dict[int, socket.socket | None] = {}

    def claim(self, ports: Iterable[int]) -> list[int]:
        """Claim these ports, or none of them. Returns those that another service holds."""
        new: dict[int, socket.socket | None] = {}
        refused = []
        for port in sorted(set(ports) - self._held.keys()):
            try:
                new[port] = _claim(port)
            except PortTaken:
                refused.append(port)
        if not refused:
            self._held |= new
        for claim in filter(None, new.values() if refused else ()):
            claim.close()
        return refused

    def keep(self, ports: Set[int]) -> None:
        """Claim those of these ports that are free, and give all other claims up."""
        for port in self._held.keys() - ports:
            if (claim := self._held.pop(port)) is not None:
                claim.close()
        for port in ports:
            self.claim([port])

    def close(self) -> None:
        """Give all claims up."""
        self.keep(frozenset())


def _claim(port: int) -> socket.socket | None:
    """None if no claim can be made here, for instance as no descriptor is left: then the service goes without it.
    Raises PortTaken."""
    try:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except OSError:
        return None
    try:
        claim.bind(f"\0{_NAME}{port}")
    except OSError as failure:
        claim.close()
        if failure.errno == errno.EADDRINUSE:
            raise PortTaken from failure
        return None
    return claim
