"""The sockets that clients connect to, bound by the supervisor: no connection is refused while a proxy restarts.

Also the claims on the ports of all processes.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from pathlib import Path

from pdctl.errors import PdctlError, PortsTaken
from pdctl.host.processes.claims import PortClaims
from pdctl.host.processes.ports import listening_ports
from pdctl.net.serving import listen_tcp
from pdctl.plan import ProcessSpec
from pdctl.supervisor.process.succession import KeptSocket
from pdctl.supervisor.rundir.adoption import listener_from

Address = tuple[str, int]


class Listeners:
    """One listening socket per address, and one claim per port."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._sockets: dict[Address, socket.socket] = {}
        self._claims = PortClaims()

    def __contains__(self, address: Address) -> bool:
        return address in self._sockets

    def open(self, address: Address, survivors: list[str]) -> None:
        """Bind the address, or take its socket from a process left by an earlier supervisor. Raises PdctlError."""
        found = listener_from(self._run_dir, survivors) if survivors else None
        self._sockets[address] = found or _listen(address)

    def of(self, address: Address) -> socket.socket:
        """The socket of an address; a new address is bound first. Raises PdctlError."""
        if address not in self._sockets:
            self._sockets[address] = _listen(address)
        return self._sockets[address]

    def kept(self) -> list[KeptSocket]:
        """All sockets, for a succession."""
        return [KeptSocket(*address, listener.fileno()) for address, listener in self._sockets.items()]

    def restore(self, kept: Iterable[KeptSocket]) -> None:
        """Go on with the sockets of the supervisor that this process was before."""
        self._sockets |= {(one.host, one.port): socket.socket(fileno=one.descriptor) for one in kept}

    def claim(self, specs: Iterable[ProcessSpec]) -> None:
        """Claim the ports of processes. Raises PortsTaken if another service has claimed one of them."""
        if refused := self._claims.claim(port for spec in specs for port in spec.ports.values()):
            ports = " and ".join(map(str, refused))
            message = f"another service of pdctl on this machine has chosen port {ports} at the same time"
            raise PortsTaken(message, "repeat the command: it chooses other ports")

    def claim_only(self, specs: Iterable[ProcessSpec]) -> None:
        """Claim the ports of these processes, which exist already, and give all other claims up. What another service
        has claimed while this one had no supervisor is passed over."""
        self._claims.keep({port for spec in specs for port in spec.ports.values()})

    def close(self) -> None:
        """Stop listening."""
        self._claims.close()
        for listener in self._sockets.values():
            listener.close()


def _listen(address: Address) -> socket.socket:
    host, port = address
    try:
        return listen_tcp(host, port)
    except OSError as failure:
        holder = listening_ports().get(port)
        who = f" by {holder.describe()}" if holder else ""
        hint = "stop that process or choose another port under [proxy]"
        if failure.errno == errno.EADDRNOTAVAIL:
            hint = "proxy.host must be an address of this machine, or 0.0.0.0 for all of them"
        raise PdctlError(f"port {port} on {host} cannot be bound: {failure.strerror}{who}", hint) from failure
