from __future__ import annotations

import socket

import pytest

from pdctl.net import reachable


@pytest.mark.parametrize(("host", "address"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("10.0.0.9", "10.0.0.9")])
def test_wildcards_are_reached_at_loopback(host: str, address: str) -> None:
    assert reachable(host) == address


def test_a_listener_on_the_wildcard_is_reached() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        socket.create_connection((reachable("0.0.0.0"), listener.getsockname()[1]), timeout=60).close()
