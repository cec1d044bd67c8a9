"""Whether the live page is on, and where. Its server and its samples exist only while it is."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from pdctl.control_api import DashboardOrder, DashboardReply
from pdctl.net.serving import listen_tcp
from pdctl.supervisor.dashboard.access import Gate

if TYPE_CHECKING:
    from pdctl.supervisor.dashboard.server import Watched

# Without an address, the first free one of these ports, else any.
_FIRST_PORT, _PORTS = 8099, 10
_HOST = "127.0.0.1"
_BACKLOG = 64


class Dashboard:
    """The page of one service. `secret`: the run's."""

    def __init__(self, service: Watched, secret: str) -> None:
        self._service = service
        self._secret = secret
        self._configured = ""
        self._listener: socket.socket | None = None
        self._served: socket.socket | None = None
        self._address = self._url = ""
        self._gate: Gate | None = None
        self._changed = asyncio.Event()

    def follow(self) -> None:
        """Listen where the plan says. Called at the start, and from time to time after."""
        wanted = self._service.plan.dashboard.listen
        if wanted == self._configured:
            return
        self._configured = wanted
        self._close()
        if wanted and (reason := self._listen_at(wanted)):
            self._service.journal.say("pdctl", f"no live page: {reason}", "dashboard")
        elif wanted:
            self._service.journal.say(
                "pdctl", f"the live page is at {self._url}; open it with: pdctl dash", "dashboard"
            )

    def order(self, order: DashboardOrder) -> DashboardReply:
        """Open or close the page, as `pdctl dash` wants."""
        if order.stop:
            self._close()
            return DashboardReply(ok=True)
        if order.listen and self._url and order.listen != self._address:
            reason = f"the page is at {self._url} already; close it first with: pdctl dash --stop"
            return DashboardReply(ok=False, reason=reason)
        if not self._url and (reason := self._open(order.listen)):
            return DashboardReply(ok=False, reason=reason)
        assert self._gate is not None
        return DashboardReply(ok=True, url=f"{self._url}#{self._gate.token(order.write)}")

    async def run_forever(self) -> None:
        """Serve the page while it is on, until cancelled."""
        try:
            while True:
                self._changed.clear()
                if self._listener is not None and self._gate is not None:
                    await self._serve(self._gate, self._listener)
                else:
                    await self._changed.wait()
        finally:
            self._close()

    async def _serve(self, gate: Gate, listener: socket.socket) -> None:
        """Serve one page until it is closed or moved."""
        # Imported here: most services never have a page.
        from pdctl.supervisor.dashboard.server import serve_page

        self._served = listener
        try:
            try:
                async with asyncio.TaskGroup() as tasks:
                    serving = tasks.create_task(serve_page(self._service, gate, listener))
                    await self._changed.wait()
                    serving.cancel()
            except* OSError as failures:
                # Such as no file descriptor left: the service goes on without its page.
                self._close()
                self._service.journal.say("pdctl", f"the live page is closed: {_first(failures)}", "dashboard")
        finally:
            # A server that was cancelled before it began has not closed it.
            listener.close()

    # -- parts ---------------------------------------------------------------------------------------------

    def _open(self, address: str) -> str:
        """Listen at an address, or at one that is free. Returns why this is not possible, or ""."""
        if address or self._configured:
            return self._listen_at(address or self._configured)
        ports = (*range(_FIRST_PORT, _FIRST_PORT + _PORTS), 0)
        return next((reason for port in ports if not (reason := self._listen_at(f"{_HOST}:{port}"))), "no port is free")

    def _listen_at(self, address: str) -> str:
        host, _, port = address.rpartition(":")
        try:
            listener = listen_tcp("127.0.0.1" if host == "localhost" else host.strip("[]"), int(port), _BACKLOG)
        except OSError as failure:
            return f"{address} cannot be used: {failure.strerror}"
        listener.setblocking(False)
        number = listener.getsockname()[1]
        self._listener, self._gate = listener, Gate(self._secret, host.strip("[]"))
        self._address, self._url = f"{host}:{number}", f"http://{host}:{number}/"
        self._changed.set()
        return ""

    def _close(self) -> None:
        """The page's server closes its own socket; one that it has not seen yet is closed here."""
        if self._listener is not None and self._listener is not self._served:
            self._listener.close()
        self._listener, self._gate, self._address, self._url = None, None, "", ""
        self._changed.set()


def _first(failures: BaseExceptionGroup[OSError]) -> BaseException:
    """The first failure, of groups within groups."""
    found: BaseException = failures
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
