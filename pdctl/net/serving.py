"""How the servers here listen and serve."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

LOG_FORMAT = "%(asctime)s %(message)s"


class Server(uvicorn.Server):
    """uvicorn without its signal handling: each process here has its own order of stopping."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


def listen_tcp(host: str, port: int, backlog: int = 2048) -> socket.socket:
    """Bound and listening. Raises OSError whose strerror says why not.

    The protocol is named: asyncio turns Nagle's algorithm off only for sockets that say they are TCP, and
    socket.create_server makes sockets that do not. Nagle and delayed acknowledgements cost 40 ms an answer.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener
