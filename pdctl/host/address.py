"""The address at which a node of a cluster listens: never a wildcard, and always one of its own."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

import psutil

from pdctl.errors import PdctlError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def address_of(interface: str) -> str:
    """This machine's address for `interface`: the name of an interface, an address, or a network such as 10.0.0.0/24.

    Raises PdctlError if it has none, or several.
    """
    return chosen(interface, addresses())


def addresses() -> dict[str, list[Address]]:
    """The addresses of this machine by interface, without those that are valid on one link only."""
    found: dict[str, list[Address]] = {}
    for name, entries in psutil.net_if_addrs().items():
        given = [ipaddress.ip_address(e.address) for e in entries if e.family == socket.AF_INET]
        given += [ipaddress.ip_address(e.address.partition("%")[0]) for e in entries if e.family == socket.AF_INET6]
        found[name] = [address for address in given if not address.is_link_local]
    return found


def interface_of(address: str) -> str:
    """The interface of this machine that has `address`; "" if none has."""
    known = addresses().items()
    return next((name for name, found in known if address in map(str, found)), "")


def chosen(interface: str, known: Mapping[str, list[Address]]) -> str:
    """As `address_of`, of these interfaces. Of an interface's several addresses the first IPv4 one is taken."""
    if interface in known:
        if not known[interface]:
            raise PdctlError(f"interface {interface} has no address", _hint(known))
        return str(known[interface][0])
    try:
        network = ipaddress.ip_network(interface)
    except ValueError:
        raise PdctlError(f"cluster.interface: this machine has no interface {interface!r}", _hint(known)) from None
    if network.num_addresses == 1 and network.network_address.is_loopback:
        # All of 127.0.0.0/8 is this machine's, whatever its interfaces say.
        return str(network.network_address)
    found = [address for listed in known.values() for address in listed if address in network]
    if len(found) == 1:
        return str(found[0])
    if not found:
        raise PdctlError(f"cluster.interface: this machine has no address in {interface}", _hint(known))
    listed = ", ".join(map(str, found))
    raise PdctlError(f"cluster.interface: this machine has several addresses in {interface}: {listed}", "name one")


def _hint(known: Mapping[str, list[Address]]) -> str:
    listed = [f"{name} ({', '.join(map(str, found))})" for name, found in known.items() if found]
    return f"this machine has: {', '.join(listed) or 'no address'}"
