"""Resolve host names within a deadline: a name server that does not answer must not block callers."""

from __future__ import annotations

import socket
import threading
from ipaddress import ip_address

RESOLVE_S = 2.0


def addresses(name: str, within_s: float = RESOLVE_S) -> tuple[str, ...]:
    """Addresses of a host name; an address is returned as it is. Empty if the name is unknown or not resolved in
    time."""
    try:
        return (str(ip_address(name)),)
    except ValueError:
        pass
    found: list[str] = []

    def ask() -> None:
        try:
            entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        found.extend(dict.fromkeys(str(entry[4][0]) for entry in entries))

    # getaddrinfo has no timeout: a thread that still waits is abandoned, and ends by itself or with the process.
    asking = threading.Thread(target=ask, name=f"resolve {name}", daemon=True)
    asking.start()
    asking.join(within_s)
    return tuple(found)


def is_local(address: str) -> bool:
    """Whether an address belongs to this machine: only such an address can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
