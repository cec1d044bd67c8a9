"""The address that a node listens on: one of its own, never a wildcard."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from pdctl.errors import PdctlError
from pdctl.host.address import address_of, addresses, chosen, interface_of

KNOWN = {
    "lo": [ip_address("127.0.0.1"), ip_address("::1")],
    "eth0": [ip_address("10.0.0.7"), ip_address("fd00::7")],
    "eth1": [ip_address("10.0.1.7")],
    "ib0": [],
}


@pytest.mark.parametrize(
    ("interface", "address"),
    [
        ("eth0", "10.0.0.7"),
        ("10.0.1.7", "10.0.1.7"),
        ("10.0.1.0/24", "10.0.1.7"),
        ("fd00::/64", "fd00::7"),
        ("127.0.0.9", "127.0.0.9"),
    ],
)
def test_an_interface_an_address_or_a_network(interface: str, address: str) -> None:
    assert chosen(interface, KNOWN) == address


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ("eth9", "this machine has no interface 'eth9'"),
        ("ib0", "interface ib0 has no address"),
        ("192.168.0.0/16", "this machine has no address in 192.168.0.0/16"),
        ("192.168.0.1", "this machine has no address in 192.168.0.1"),
        ("10.0.0.0/15", "this machine has several addresses in 10.0.0.0/15: 10.0.0.7, 10.0.1.7"),
        ("0.0.0.0", "this machine has no address in 0.0.0.0"),
    ],
)
def test_what_is_no_address_of_this_machine_is_told(interface: str, message: str) -> None:
    with pytest.raises(PdctlError, match=message.replace(".", r"\.")):
        chosen(interface, KNOWN)


def test_this_machine_has_its_loopback_interface() -> None:
    assert ip_address("127.0.0.1") in addresses()["lo"]
    assert address_of("lo") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") == ""
