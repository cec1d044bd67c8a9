"""Listening sockets and the HTTP server of pdctl's processes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    import ssl

    from pdctl.net.identity.contexts import Identity

LOG_FORMAT = "%(asctime)s %(message)s"


class Server(uvicorn.Server):
    """uvicorn without its signal handling: each process has its own shutdown order."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.servers: list[asyncio.base_events.Server] = []

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield

    def stop_listening(self) -> None:
        """Take no more connections. For a server that was cancelled: an event loop that still watches a socket that
        somebody else closed would take the next one of that number for it."""
        for listening in self.servers:
            listening.close()


def wants_certificates(identity: Identity | None) -> Callable[..., ssl.SSLContext] | None:
    """What makes a uvicorn server speak TLS and want certificates from its clients: for its `ssl_context_factory`."""
    if identity is None:
        return None
    context = identity.server_context()
    return lambda *_: context


async def close_connections(server: Server) -> None:
    """Close what a server that was cancelled left open: first after what is being sent, then at once."""
    server.stop_listening()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    await asyncio.sleep(0)
    # What is open still is not read.
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    await asyncio.sleep(0)


def listen_tcp(host: str, port: int, backlog: int = 2048) -> socket.socket:
    """A bound and listening socket. Raises OSError with the reason in strerror.

    The protocol is given explicitly: asyncio disables Nagle's algorithm only for sockets with protocol TCP, which
    socket.create_server does not set. Nagle with delayed acknowledgements would cost 40 ms per answer.
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
