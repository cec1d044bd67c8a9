"""The control API: HTTP on a unix socket of the run directory, for this user only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from pdctl.net.serving import Server, close_connections
from pdctl.supervisor.surface.api import application
from pdctl.supervisor.surface.controlled import Controlled
from pdctl.supervisor.surface.events import Streams

# Interval between checks that the socket's file exists, seconds.
_LOOK_S = 0.25
# Whoever follows the events has this long to read the last of them, seconds.
_END_S = 1.0


class _OwnUserSocket(socket.socket):
    """A listening unix socket that rejects other users."""

    def accept(self) -> tuple[socket.socket, object]:
        connection, address = super().accept()
        size = struct.calcsize("3i")
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if uid not in (os.getuid(), 0):
            connection.close()
            # asyncio treats this as a client that disconnected during accept, and continues.
            raise ConnectionAbortedError(f"uid {uid} may not use this socket")
        return connection, address


async def serve_control(path: Path, service: Controlled, streams: Streams | None = None) -> None:
    """Answer until cancelled: status, plan, events, KV, verbs for single processes, apply, stop; docs/status-json.md.

    A socket file that is removed meanwhile is created again.
    """
    streams = streams or service.streams()
    app = application(service, streams)
    while True:
        # If its folder is missing too, the supervisor creates that first.
        with contextlib.suppress(FileNotFoundError):
            await _serve_until_removed(path, app, streams)
        await asyncio.sleep(_LOOK_S)


async def _serve_until_removed(path: Path, app: Starlette, streams: Streams) -> None:
    """Serve until the socket file is removed. Raises FileNotFoundError if the folder does not exist."""
    _unlink(path)
    with _OwnUserSocket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        os.chmod(path, 0o600)  # noqa: PTH101 - in a coroutine; one system call
        listener.listen(64)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", loop="none", http="h11", ws="none",
            proxy_headers=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = Server(config)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_stop_when_removed(server, path, streams))
                await server.serve(sockets=[listener])
        finally:
            await _let_go(server, streams)


async def _stop_when_removed(server: Server, path: Path, streams: Streams) -> None:
    """Stop the server when the socket file is removed. Returns when the server has ended."""
    ours = _inode(path)
    while not server.should_exit:
        await asyncio.sleep(_LOOK_S)
        if _inode(path) != ours:
            await streams.end(_END_S)
            server.should_exit = True


async def _let_go(server: Server, streams: Streams) -> None:
    """Close what a server that was cancelled left open, when everybody who reads has been told the last events."""
    await streams.end(_END_S)
    await close_connections(server)
    await streams.end(_END_S)


def _inode(path: Path) -> int:
    """The inode of a file; 0 if it does not exist."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
