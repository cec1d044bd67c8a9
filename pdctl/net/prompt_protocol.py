"""uvicorn's protocol for servers that machines reach: who does not send a request in time is disconnected.

Connections are limited in number. Without a deadline, whoever can connect could keep all of them, without any secret.
"""

from __future__ import annotations

import asyncio

from pdctl.net.http_protocol import HttpProtocol

# From the connection, or from a head's first bytes, to its end; then to the end of the body. Seconds.
HEAD_S, BODY_S = 15.0, 120.0


class PromptProtocol(HttpProtocol):
    """Aborts a connection whose request is not begun, or whose head or body is not complete, in time. A request that
    comes in one piece, as those of our own calls, costs nothing."""

    head_s, body_s = HEAD_S, BODY_S
    # What is waited for, in seconds from when it began; 0.0: nothing.
    _limit_s = 0.0
    _in_body = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection: the time for its first request starts."""
        super().connection_made(transport)
        self._wait(self.head_s)

    def data_received(self, data: bytes) -> None:
        """Receive bytes."""
        super().data_received(data)
        if not self.refused:
            self._wait(self.head_s if self.in_head else self.body_s if self._in_body else 0.0)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._in_body = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer has disconnected."""
        super().connection_lost(exc)
        self._wait(0.0)

    def _wait(self, limit_s: float) -> None:
        if limit_s == self._limit_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._limit_s = limit_s
        self._timer = self.loop.call_later(limit_s, self.transport.abort) if limit_s else None
