"""The messages between a proxy and the keeper of its clients' connections, one per packet of a unix socket.

A proxy sends KEEP with a connection as it comes, or UNCOVERED without it if it has no slot; DROP when it has ended; and
one REPORT after it has taken over. After its end, the process that shares its descriptors sends KEEP with those of
which nothing was read. A new proxy first gets packets of KEPT with connections, then END, which has CRASHED
in it if its predecessor ended of itself.
"""

from __future__ import annotations

import array
import os
import signal
import socket
from typing import NamedTuple

import msgspec

KEEP, DROP, UNCOVERED, REPORT, KEPT, END = b"K", b"D", b"U", b"R", b"A", b"E"
CRASHED = b"C"
# Descriptors of one packet; the kernel's limit is 253 (SCM_MAX_FD).
MOST_TOGETHER = 200
_PACKET = 4096
SO_COOKIE = 57  # asm-generic/socket.h
# A proxy that gets it ends at once and leaves its connections to the next one.
LEAVE_SIGNAL = signal.SIGUSR1
# In the environment of a proxy: channel, memory and number of slots.
TAKEOVER_ENV = "PDCTL_TAKEOVER"


class TakenOver(msgspec.Struct, frozen=True):
    """What a proxy did with its predecessor's connections: how many `connections` go on, `resumed` answers continued in
    the middle, `repeated` requests began again because their client had nothing yet, `cut` connections could not go on
    for `reasons`, `resent` bytes were sent for the predecessor."""

    connections: int = 0
    resumed: int = 0
    repeated: int = 0
    cut: int = 0
    resent: int = 0
    seconds: float = 0.0
    reasons: tuple[str, ...] = ()


class Packet(NamedTuple):
    """One message. The receiver owns the descriptors."""

    kind: bytes
    body: bytes
    descriptors: list[int]


def cookie_of(descriptor: int) -> int:
    """The kernel's own number of a socket, the same for each of its descriptors. Raises OSError."""
    borrowed = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=descriptor)
    try:
        return int.from_bytes(borrowed.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")
    finally:
        borrowed.detach()


def channel() -> tuple[socket.socket, socket.socket]:
    """The two ends: for the keeper and for a proxy. Neither blocks."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


def send(channel: socket.socket, kind: bytes, body: bytes = b"", descriptors: list[int] | None = None) -> None:
    """Raises OSError, BlockingIOError if the other side does not read."""
    if descriptors:
        rights = array.array("i", descriptors)
        channel.sendmsg([kind, body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_NOSIGNAL)
    else:
        channel.send(kind + body, socket.MSG_NOSIGNAL)


def receive(channel: socket.socket) -> Packet | None:
    """The next packet; None at the end. Raises OSError, BlockingIOError if there is none yet."""
    room = socket.CMSG_SPACE(MOST_TOGETHER * array.array("i").itemsize)
    data, control, _, _ = channel.recvmsg(_PACKET, room, socket.MSG_CMSG_CLOEXEC)
    found: list[int] = []
    for level, kind, content in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            size = array.array("i").itemsize
            found += array.array("i", content[: len(content) - len(content) % size])
    if not data:
        for descriptor in found:
            os.close(descriptor)
        return None
    return Packet(data[:1], data[1:], found)
