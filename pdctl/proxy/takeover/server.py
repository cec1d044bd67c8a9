"""The HTTP server of a proxy whose connections outlive it: it accepts them itself, so that each is covered at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn

from pdctl.net.serving import Server
from pdctl.proxy.takeover.adoption import Adoption
from pdctl.proxy.takeover.covers import Covers
from pdctl.proxy.takeover.protocol import CoveredConnection, CoveredProtocol

# Connections accepted before anything else is done.
_MOST_AT_ONCE = 32
# After an error, such as too many open files, seconds.
_PAUSE_S = 0.1
_LEAVING_LOOK_S = 0.02


class CoveringServer(Server):
    """Covers every connection, and goes on with those of its predecessor."""

    def __init__(self, config: uvicorn.Config, covers: Covers) -> None:
        super().__init__(config)
        self.covers = covers
        self._accepting: Accepting | None = None
        self._opening: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Adopt connections, and accept new ones."""
        assert sockets is not None
        await super().startup(sockets=[])
        # It sets the headers of all answers.
        await self.on_tick(0)
        await Adoption(self.covers, self.protocol).run()
        self._accepting = Accepting(sockets[0], self)
        self.servers.append(self._accepting)  # type: ignore[arg-type]  # it has what uvicorn calls at its end

    def protocol(self) -> CoveredProtocol:
        """A protocol for one connection."""
        return CoveredProtocol(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )

    def open(self, connection: socket.socket) -> None:
        """Serve a connection that has just been accepted."""
        found = self.covers.new(connection)
        cookie, slot = found if found is not None else (0, None)
        opened = CoveredConnection(self.covers, self.protocol(), connection, cookie, slot)
        task = asyncio.get_running_loop().create_task(_open(connection, opened))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def leave(self, within_s: float) -> None:
        """Accept no more connections, and return when the process may end: the next one goes on with all connections
        that it can continue exactly; answers of others are waited for."""
        if self._accepting is not None:
            self._accepting.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self._may_end():  # noqa: ASYNC110 - rare, and no event says it
                    await asyncio.sleep(_LEAVING_LOOK_S)

    def _may_end(self) -> bool:
        """Asks every connection, also after one that may not be left: being asked keeps new requests out."""
        asked = [connection.may_be_left() for connection in tuple(self.covers.open)]
        return all(asked)


async def _open(connection: socket.socket, opened: CoveredConnection) -> None:
    try:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: opened, connection)
    except OSError:
        # The client has left already.
        opened.never_made()
        connection.close()


class Accepting:
    """Accepts connections until it is closed."""

    def __init__(self, listener: socket.socket, server: CoveringServer) -> None:
        self._listener = listener
        self._server = server
        self._loop = asyncio.get_running_loop()
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Accept no more connections."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())

    async def wait_closed(self) -> None:
        """See asyncio.Server."""

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                # No descriptor is free: one that ends makes room.
                self.close()
                self._loop.call_later(_PAUSE_S, self._listen)
                return
            connection.setblocking(False)
            self._server.open(connection)
