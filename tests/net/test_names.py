"""Host names: known, unknown, and with a name server that does not answer."""

from __future__ import annotations

import socket
import threading

import pytest

from pdctl.net.names import addresses, is_local


def test_addresses_are_what_they_are() -> None:
    assert addresses("10.1.2.3") == ("10.1.2.3",)
    assert addresses("::1") == ("::1",)
    assert "127.0.0.1" in addresses("localhost")


def test_a_name_that_is_none() -> None:
    assert addresses("nowhere.invalid", 5.0) == ()
    assert addresses("a" * 300) == ()


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        answered.wait(30)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert addresses("far.example", 0.05) == ()
    answered.set()


def test_which_addresses_are_ours() -> None:
    assert is_local("127.0.0.1")
    assert not is_local("192.0.2.1"), "TEST-NET-1 is nobody's"
