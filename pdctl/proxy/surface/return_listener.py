"""Hand the listening socket back to a new supervisor after the old one was killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_GIVE_S = 2.0


@contextlib.contextmanager
def giving_back(path: Path, listener: socket.socket, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """While inside, send the socket's descriptor to any process of this user that connects to `path`."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.bind(str(path))
        path.chmod(0o600)
        door.listen(4)
        door.setblocking(False)
        loop.add_reader(door.fileno(), _give, door, listener)
        try:
            yield
        finally:
            loop.remove_reader(door.fileno())
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _give(door: socket.socket, listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection, _ = door.accept()
        with connection:
            connection.settimeout(_GIVE_S)
            size = struct.calcsize("3i")
            _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            if uid in (os.getuid(), 0):
                socket.send_fds(connection, [b"l"], [listener.fileno()])
