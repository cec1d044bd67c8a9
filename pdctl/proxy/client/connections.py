"""Clients' connections: uvicorn's protocol with limits on the cost of a connection without a request."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
import time
from collections.abc import Callable
from typing import Any, cast

from pdctl.net.http_protocol import HttpProtocol
from pdctl.net.pauses import Sleeper

# Time limit for a connection's first request, or for the rest of a started one, seconds.
_HEAD_S = 15.0
_BODY_S = 120.0
# Time limit of an idle connection, seconds.
_IDLE_S = 75.0
# A client that has read no pending data for this long counts as gone, seconds.
_STUCK_S = 60.0
_LOOK_S = 1.0
# At shutdown: how long a connection without a request, new or idle, may still send one, seconds.
_LAST_CALL_S, _LAST_CALL_IDLE_S = 0.5, 0.1


class BoundedProtocol(HttpProtocol):
    """Refuses endless headers, lets `reap_forever` find slow clients, and calls `on_left` of a request's handler
    (`scope["pdctl.connection"]`) when the client disconnects."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection: the time limit for its first request starts."""
        super().connection_made(transport)
        self.on_left: Callable[[], None] | None = None
        self.began_at = time.monotonic()
        self.receiving = True
        self.leaving = False
        self.stuck_since = 0.0
        self.idle_since = self.began_at

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has disconnected."""
        super().connection_lost(exc)
        if self.on_left is not None:
            self.on_left()

    def on_response_complete(self) -> None:
        """Like uvicorn's, but without a timer per request: `reap_forever` closes idle connections."""
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
        self.scope["pdctl.connection"] = self  # type: ignore[typeddict-unknown-key]  # ASGI allows server-specific keys
        self.receiving = True
        self.began_at = time.monotonic()

    def on_headers_complete(self) -> None:
        """The head is complete."""
        super().on_headers_complete()
        if self.leaving and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """The request is complete."""
        self.receiving = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than the proxy writes."""
        super().pause_writing()
        self.stuck_since = time.monotonic()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self.stuck_since = 0.0

    def shutdown(self) -> None:
        """Shut down. A request may be on its way: closing the connection now would be a reset for the client."""
        self.leaving = True
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer that has not started gets `connection: close`. After a started one, the client may send another
            # request.
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
        """Whether unread bytes of the client are in the kernel."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        if descriptor < 0:
            return False
        (count,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))
        return bool(count)

    def late(self, now: float, awake_since: float = 0.0) -> bool:
        """Whether the client takes too long to send a request, or has been idle for too long. `awake_since`: before
        that, this process could have heard nothing."""
        waited = now - awake_since
        if self.stuck_since and min(waited, now - self.stuck_since) > _STUCK_S:
            return True
        if self.receiving:
            return min(waited, now - self.began_at) > (_HEAD_S if self.in_head else _BODY_S)
        is_idle = bool(self.cycle is None or self.cycle.response_complete)
        return is_idle and min(waited, now - self.idle_since) > _IDLE_S


async def reap_forever(connections: set[Any]) -> None:
    """Close connections of slow clients (slow loris); `connections` is uvicorn's set."""
    sleeper, awake_since = Sleeper(), 0.0
    while True:
        stood_still = await sleeper.overslept(_LOOK_S)
        now = time.monotonic()
        awake_since = now if stood_still else awake_since
        for connection in tuple(connections):
            protocol = cast(BoundedProtocol, connection)
            if protocol.late(now, awake_since):
                protocol.transport.abort()
