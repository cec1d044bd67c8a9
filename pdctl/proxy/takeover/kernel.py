"""What the kernel says of a TCP connection: how many bytes it has taken from us, and given to us.

Output that was acknowledged plus output in its queue is what it has taken, exactly; input that came minus input in its
queue is what was read (linux/tcp.h: struct tcp_info).
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from dataclasses import dataclass

_INFO_BYTES = 136
_COUNTS = struct.Struct("QQ")
_COUNTS_AT = 120  # tcpi_bytes_acked, tcpi_bytes_received
# Looks at a connection until nothing moves between the first question and the last.
_MOST_LOOKS = 1000
# linux/include/net/tcp_states.h. In the second state the client has ended its sending, which counts as one more byte.
_ESTABLISHED, _CLOSE_WAIT = 1, 8


@dataclass(frozen=True, slots=True)
class Counts:
    """Bytes of one connection. `taken`: by the kernel, to be sent; `read`: by processes; `open`: both may send, or the
    client at least still listens."""

    taken: int
    read: int
    open: bool


def counts_of(connection: socket.socket) -> Counts:
    """Raises OSError for a socket that has no counts, or whose counts never stand still."""
    before = _info(connection)
    for _ in range(_MOST_LOOKS):
        queued = _ioctl(connection, termios.TIOCOUTQ)
        unread = _ioctl(connection, termios.FIONREAD)
        after = _info(connection)
        # An acknowledgement between two questions would count output twice, or not at all.
        if after == before:
            state, acknowledged, received = after
            ended = state == _CLOSE_WAIT
            return Counts(acknowledged + queued, received - unread - ended, state in (_ESTABLISHED, _CLOSE_WAIT))
        before = after
    raise OSError("the connection's counts do not stand still")


def _info(connection: socket.socket) -> tuple[int, int, int]:
    """State, bytes acknowledged, bytes received."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    if len(info) < _INFO_BYTES:
        raise OSError("the kernel does not count a connection's bytes")
    acknowledged, received = _COUNTS.unpack_from(info, _COUNTS_AT)
    return info[0], acknowledged, received


def _ioctl(connection: socket.socket, request: int) -> int:
    (found,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), request, b"\0" * 4))
    return int(found)
