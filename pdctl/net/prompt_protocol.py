"""uvicorn's protocol for servers that machines reach: who does not send a request's head in time is disconnected.

Connections are limited in number. Without a deadline, whoever can connect could keep all of them, without any secret.
"""

from __future__ import annotations

import asyncio

from pdctl.net.http_protocol import HttpProtocol

# From the connection, or from a head's first bytes, to its end, seconds.
HEAD_S = 15.0


class PromptProtocol(HttpProtocol):
    """Aborts a connection whose request is not begun, or whose head is not complete, in time. A head that comes in one
    piece, as those of our own calls, costs nothing."""

    head_s = HEAD_S
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection: the time for its first request starts."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.head_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Receive bytes."""
        super().data_received(data)
        if not self.in_head:
            self._disarm()
        elif self._timer is None and not self.refused:
            self._timer = self.loop.call_later(self.head_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer has disconnected."""
        super().connection_lost(exc)
        self._disarm()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
