"""What the kernel counts is exact, also while acknowledgements come."""

from __future__ import annotations

import contextlib
import socket
import termios
from collections.abc import Iterator

import pytest

from pdctl.proxy.takeover import kernel
from pdctl.proxy.takeover.kernel import counts_of
from tests.service import wait_until

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        served, _ = listener.accept()
        with client, served:
            client.settimeout(60)
            served.setblocking(False)
            yield client, served


def fill(connection: socket.socket) -> int:
    """Send until the client's side is full. Returns how many bytes."""
    sent = 0
    while True:
        try:
            sent += connection.send(bytes(1 << 16))
        except BlockingIOError:
            return sent


def drain(client: socket.socket, served: socket.socket) -> None:
    """Read everything, until its arrival is acknowledged."""
    client.setblocking(False)

    def is_empty() -> bool:
        with contextlib.suppress(BlockingIOError):
            client.recv(1 << 20)
        return not kernel._ioctl(served, termios.TIOCOUTQ)

    wait_until(is_empty, 10, "all to be acknowledged")


def test_bytes_of_both_sides_are_counted(ends: Ends) -> None:
    client, served = ends
    sent = fill(served)
    client.sendall(b"request")
    wait_until(lambda: kernel._ioctl(served, termios.FIONREAD) == len(b"request"), 10, "the request")
    assert (counts_of(served).taken, counts_of(served).read, counts_of(served).open) == (sent, 0, True)
    served.recv(3)
    assert counts_of(served).read == 3
    client.close()


@pytest.mark.parametrize("question", [termios.TIOCOUTQ, termios.FIONREAD])
def test_an_acknowledgement_between_two_questions_changes_nothing(
    ends: Ends, question: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, served = ends
    sent, ask, moved = fill(served), kernel._ioctl, list[int]()

    def late(connection: socket.socket, request: int) -> int:
        if request == question and not moved:
            moved.append(request)
            monkeypatch.setattr(kernel, "_ioctl", ask)
            drain(client, served)
        return ask(connection, request)

    monkeypatch.setattr(kernel, "_ioctl", late)
    assert counts_of(served).taken == sent
    assert moved


def test_counts_that_never_stand_still_are_no_counts(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(1 << 20))
    monkeypatch.setattr(kernel, "_info", lambda _: (1, next(count), 0))
    with pytest.raises(OSError, match="do not stand still"):
        counts_of(ends[1])
