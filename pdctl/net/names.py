"""Host names, within a deadline: a name server that does not answer must not hold anybody up."""

from __future__ import annotations

import socket
import threading
from ipaddress import ip_address

RESOLVE_S = 2.0


def addresses(name: str, within_s: float = RESOLVE_S) -> tuple[str, ...]:
    """Addresses of a host name, an address itself as it is; none where there is no such name, or no answer in time."""
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

    # getaddrinfo cannot be told to give up: what still waits is left behind, and ends by itself or with the process.
    asking = threading.Thread(target=ask, name=f"resolve {name}", daemon=True)
    asking.start()
    asking.join(within_s)
    return tuple(found)


def is_local(address: str) -> bool:
    """Whether an address is one of this machine's: one of ours can be bound, another's cannot."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
