"""Clients' connections: uvicorn's protocol with bounds on what a connection may cost before it is a request."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
import time
from collections.abc import Callable
from typing import Any, cast

from pdctl.net.http_protocol import HttpProtocol

# A connection may take this long to bring its first request, or the rest of one it began, seconds.
_HEAD_S = 15.0
_BODY_S = 120.0
# A connection kept without a request, seconds.
_IDLE_S = 75.0
# A client that has read nothing of what waits for it for this long has gone, seconds.
_STUCK_S = 60.0
_LOOK_S = 1.0
# When we end: how long a connection that has asked nothing yet, or nothing more, may still bring a request, seconds.
_LAST_CALL_S, _LAST_CALL_IDLE_S = 0.5, 0.1


class BoundedProtocol(HttpProtocol):
    """Refuses endless headers, tells `reap_forever` how long its client dawdles, and whoever serves a request
    (`scope["pdctl.connection"]`) when the client has left: `on_left` is called then."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection: its first request is due."""
        super().connection_made(transport)
        self.on_left: Callable[[], None] | None = None
        self.began_at = time.monotonic()
        self.receiving = True
        self.leaving = False
        self.stuck_since = 0.0
        self.idle_since = self.began_at

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left."""
        super().connection_lost(exc)
        if self.on_left is not None:
            self.on_left()

    def on_response_complete(self) -> None:
        """As uvicorn's, but without arming a timer for each request: `reap_forever` closes idle connections."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self.idle_since = time.monotonic()
        if self.leaving:
            self.loop.call_later(_LAST_CALL_IDLE_S, self._leave)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope["pdctl.connection"] = self  # type: ignore[typeddict-unknown-key]  # ASGI leaves room for servers' own
        self.receiving = True
        self.began_at = time.monotonic()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        super().on_headers_complete()
        if self.leaving and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """The request is whole."""
        self.receiving = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is written to."""
        super().pause_writing()
        self.stuck_since = time.monotonic()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        self.stuck_since = 0.0

    def shutdown(self) -> None:
        """We end. A request may be on its way: a connection closed under it is a reset that its client sees."""
        self.leaving = True
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer that has not begun says `connection: close`. After one that has, the client may ask again.
            if not self.cycle.response_started:
                self.cycle.keep_alive = False
            return
        self.loop.call_later(_LAST_CALL_S if self.cycle is None else _LAST_CALL_IDLE_S, self._leave)

    def _leave(self) -> None:
        if self.transport.is_closing():
            return
        asked = self.header_bytes > 0 or (self.receiving and not self.in_head)
        if asked or (self.cycle is not None and not self.cycle.response_complete):
            return
        if self._unread():
            # A request has arrived and is about to be read.
            self.loop.call_later(_LAST_CALL_IDLE_S, self._leave)
            return
        self.transport.close()

    def _unread(self) -> bool:
        """Whether bytes of the client wait in the kernel."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        if descriptor < 0:
            return False
        (count,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))
        return bool(count)

    def late(self, now: float) -> bool:
        """Whether its client takes too long to say what it wants, or has wanted nothing for long."""
        if self.stuck_since and now - self.stuck_since > _STUCK_S:
            return True
        if self.receiving:
            return now - self.began_at > (_HEAD_S if self.in_head else _BODY_S)
        return bool(self.cycle is None or self.cycle.response_complete) and now - self.idle_since > _IDLE_S


async def reap_forever(connections: set[Any]) -> None:
    """Close connections whose clients dawdle (slow loris); `connections` is uvicorn's own set."""
    while True:
        await asyncio.sleep(_LOOK_S)
        now = time.monotonic()
        for connection in tuple(connections):
            protocol = cast(BoundedProtocol, connection)
            if protocol.late(now):
                protocol.transport.abort()
