"""Clients' connections: uvicorn's protocol with bounds on what a connection may cost before it is a request."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bytes of request line and headers together, and their number.
MAX_HEADER_BYTES = 64 * 1024
_MAX_HEADERS = 256
# A connection may take this long to bring its first request, or the rest of one it began, seconds.
_HEAD_S = 15.0
_BODY_S = 120.0
_LOOK_S = 1.0
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\ncontent-length: 105\r\n"
    b"connection: close\r\n\r\n"
    b'{"error":{"message":"the request\'s headers are too large","type":"invalid_request_error","code":"431"}}  '
)


class BoundedProtocol(HttpToolsProtocol):
    """Refuses endless headers, and is told apart by `Reaper` when its client dawdles."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection: its first request is due."""
        super().connection_made(transport)
        self.began_at = time.monotonic()
        self.in_head = True
        self.receiving = True
        self.header_bytes = 0
        self.header_count = 0

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.header_bytes = self.header_count = 0
        self.in_head = self.receiving = True
        self.began_at = time.monotonic()

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        super().on_header(name, value)
        self.header_count += 1
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self.in_head = False
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self.cycle is not None and not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self.receiving = False
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()

    def _count(self, size: int) -> None:
        self.header_bytes += size
        too_large = self.header_bytes > MAX_HEADER_BYTES or self.header_count > _MAX_HEADERS
        if too_large and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def late(self, now: float) -> bool:
        """Whether its client takes too long to say what it wants."""
        return self.receiving and now - self.began_at > (_HEAD_S if self.in_head else _BODY_S)


async def reap_forever(connections: set[Any]) -> None:
    """Close connections whose clients dawdle (slow loris); `connections` is uvicorn's own set."""
    while True:
        await asyncio.sleep(_LOOK_S)
        now = time.monotonic()
        for connection in tuple(connections):
            protocol = cast(BoundedProtocol, connection)
            if protocol.late(now):
                protocol.transport.abort()
