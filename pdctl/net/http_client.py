"""A lean pooled HTTP/1.1 client for the hot path of every token, made of httptools (parsing) and asyncio (transport).

httpx costs milliseconds of CPU per call, which is fine for control calls but too much for a proxy or a lease.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import httptools

if TYPE_CHECKING:
    from pdctl.net.identity import ContextFactory

# Reading from the socket pauses at this many buffered bytes, if the reader is slower than the engine.
_PAUSE_AT = 256 * 1024
# A connection idle for longer than this is not reused: the server may be about to close it. Seconds.
_IDLE_S = 30.0
_MAX_IDLE = 4096
_MAX_HEADERS = 64 * 1024
# OpenSSL's codes for a certificate whose CA is not known (x509_vfy.h).
_STRANGE_CA = (18, 19, 20, 21)
# What a TLS server says of our certificate when it ends the connection.
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it wants a certificate of its CA, and this process showed none",
    "CERTIFICATE_EXPIRED": "it says that our certificate has expired, or is not valid yet",
    "BAD_CERTIFICATE": "it does not accept our certificate, or wants one and was shown none",
    "UNKNOWN_CA": "it does not know the CA of our certificate",
    "UNSUPPORTED_CERTIFICATE": "it says that our certificate is not one for clients",
}


class Unreachable(Exception):
    """No connection, or it ended before the answer did. `sent`: a part of the answer had arrived; `begun`: the request
    had been sent."""

    def __init__(self, message: str, sent: bool = False, begun: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.begun = begun or sent


@dataclass(slots=True)
class Response:
    """Status and body of a finished call."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class _Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.idle_since = 0.0
        self.used = False
        self.closed = False
        self.transport: asyncio.Transport | None = None
        self.parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._begin()

    def _begin(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.head_done = False
        self.complete = False
        self.keep_alive = False
        self.answered = False
        self.failure: str | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._header_bytes = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self.waiting_since = 0.0
        self.tap: Callable[[bytes], float] | None = None

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.answered = True
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as failure:
            self.fail(f"{self.peer} does not speak HTTP: {failure}")
        if self.tap is not None and self._waiter is not None and self._chunks and not (self.complete or self._paused):
            taken = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            if at := self.tap(taken):
                self._chunks.clear()
                self._buffered = 0
                self.waiting_since = at
                return
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if not self.complete:
            self.fail(f"{self.peer} closed the connection" + (f": {explained(exc)}" if exc else ""))

    # -- httptools callbacks --

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > _MAX_HEADERS:
            self.fail(f"{self.peer} sent more than {_MAX_HEADERS} bytes of headers")
            return
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.head_done = True

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._buffered += len(body)
        if self._buffered > _PAUSE_AT and not self._paused and self.transport:
            self._paused = True
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        self.complete = True
        # Read it now: the parser resets it when it waits for the next message.
        self.keep_alive = self.parser.should_keep_alive()

    # -- for the pool --

    def send(self, data: bytes) -> None:
        assert self.transport is not None
        if self.used:
            # A connection is only reused after a complete answer, so its parser is ready for the next one.
            self._begin()
        self.used = True
        self.transport.write(data)

    async def head(self) -> int:
        """Wait for the headers and return the status."""
        while not self.head_done:
            await self._wait()
        return int(self.parser.get_status_code())

    async def read(self) -> bytes | None:
        """Wait for data and return it, at least one byte; None at the end."""
        while not self._chunks:
            if self.complete:
                return None
            await self._wait()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        if self._paused and self.transport and not self.closed:
            self._paused = False
            self.transport.resume_reading()
        return data

    def fail(self, message: str) -> None:
        if self.failure is None:
            self.failure = message
        self.abort()
        self._wake()

    def abort(self) -> None:
        self.closed = True
        if self.transport and not self.transport.is_closing():
            self.transport.abort()

    @property
    def reusable(self) -> bool:
        return self.complete and self.keep_alive and not self.closed and not self._paused

    async def _wait(self) -> None:
        if self.failure is not None:
            raise Unreachable(self.failure, sent=self.answered, begun=True)
        self._waiter = self._loop.create_future()
        self.waiting_since = time.monotonic()
        try:
            await self._waiter
        finally:
            self._waiter = None
            self.waiting_since = 0.0

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


class Exchange:
    """One request and its answer. Always close it; closing early aborts the request at the peer.

    A watcher may use `waiting_since` (monotonic seconds, 0 if not waiting) and `cut` from the start.
    """

    __slots__ = ("_connection", "_cut", "_headers", "_message", "_opened_at", "_pool", "status")

    def __init__(self, pool: ConnectionPool, message: bytes) -> None:
        self.status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._pool = pool
        self._message = message
        self._connection: _Connection | None = None
        self._cut: str | None = None
        self._opened_at = time.monotonic()

    @property
    def waiting_since(self) -> float:
        """Since when the caller has been waiting for the peer; 0.0 if it is not."""
        return self._opened_at if self._connection is None else self._connection.waiting_since

    def header(self, wanted: bytes) -> str | None:
        """The answer's header of this (lower-case) name."""
        return next((value.decode("latin-1") for name, value in self._headers if name.lower() == wanted), None)

    async def head(self) -> int:
        """Send the request and wait for the head of the answer. Returns its status. Raises Unreachable."""
        begun = False
        while True:
            try:
                connection = await self._pool.acquire()
            except Unreachable as failure:
                failure.begun = begun
                raise
            kept = connection.used
            self._connection = connection
            try:
                if self._cut is not None:
                    raise Unreachable(self._cut)
                connection.send(self._message)
                self.status = await connection.head()
                self._headers = connection.headers
                return self.status
            except Unreachable as failure:
                connection.abort()
                begun = True
                # The server closed a reused connection while it was idle: retry on another one.
                if not kept or failure.sent or self._cut is not None:
                    raise
            except BaseException:
                connection.abort()
                raise

    async def read(self) -> bytes | None:
        """The next bytes; None at the end. Raises Unreachable if the connection breaks."""
        assert self._connection is not None
        return await self._connection.read()

    def tap(self, take: Callable[[bytes], float]) -> None:
        """While a `read` waits, offer arriving data to `take` first, in the protocol callback. Declined data is read.

        `take` returns the time (monotonic) at which it took the bytes, or 0.0 to decline. This avoids waking the reader
        for many small parts.
        """
        assert self._connection is not None
        self._connection.tap = take

    async def rest(self) -> bytes:
        """Read the rest of the answer."""
        parts = []
        while (data := await self.read()) is not None:
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def cut(self, reason: str) -> None:
        """End it now. A waiting caller gets Unreachable with `reason`."""
        self._cut = reason
        if self._connection is not None:
            self._connection.fail(reason)

    def close(self) -> None:
        """Return the connection to the pool, or close it if the answer was not read to its end."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.take_back(connection)


class ConnectionPool:
    """Connections to one address. `tls`: for a TLS server, gives the context of the next connection."""

    def __init__(self, host: str, port: int, connect_s: float = 2.0, tls: ContextFactory | None = None) -> None:
        self.host = host
        self.port = port
        self.connect_s = connect_s
        self._tls = tls
        self._idle: deque[_Connection] = deque()
        self._head = f" HTTP/1.1\r\nhost: {host}:{port}\r\n".encode()

    async def request(
        self, method: str, path: str, headers: bytes = b"", body: bytes = b"", timeout_s: float = 30.0
    ) -> Response:
        """Make one call and read the complete answer. `headers`: complete header lines. Raises Unreachable, also on a
        timeout."""
        exchange = self.exchange(method, path, headers, body)
        try:
            async with asyncio.timeout(timeout_s):
                await exchange.head()
                data = await exchange.rest()
        except TimeoutError:
            raise Unreachable(
                f"{self.host}:{self.port}{path} did not answer within {timeout_s:g} s", sent=True
            ) from None
        finally:
            exchange.close()
        found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in exchange._headers}
        return Response(exchange.status, data, found)

    async def stream(self, method: str, path: str, headers: bytes = b"", body: bytes = b"") -> Exchange:
        """Send a request and wait for the head of its answer. Raises Unreachable."""
        exchange = self.exchange(method, path, headers, body)
        await exchange.head()
        return exchange

    def exchange(self, method: str, path: str, headers: bytes = b"", body: bytes = b"") -> Exchange:
        """A request that is sent when `head` is called."""
        length = b"content-length: %d\r\n" % len(body) if body or method == "POST" else b""
        message = (method.encode(), b" ", path.encode(), self._head, headers, length, b"\r\n", body)
        return Exchange(self, b"".join(message))

    def take_back(self, connection: _Connection) -> None:
        """Keep a connection if its answer was read to the end, else close it."""
        now = time.monotonic()
        connection.tap = None
        while self._idle and (self._idle[0].closed or now - self._idle[0].idle_since > _IDLE_S):
            self._idle.popleft().abort()
        if connection.reusable and len(self._idle) < _MAX_IDLE:
            connection.idle_since = now
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self._idle.pop().abort()

    async def acquire(self) -> _Connection:
        """An idle connection, or a new one. Raises Unreachable."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and time.monotonic() - connection.idle_since < _IDLE_S:
                return connection
            connection.abort()
        loop = asyncio.get_running_loop()
        peer = f"{self.host}:{self.port}"
        try:
            async with asyncio.timeout(self.connect_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(peer), self.host, self.port, ssl=self._tls() if self._tls else None
                )
        except (OSError, TimeoutError, ValueError, OverflowError) as failure:
            # ValueError and OverflowError: an invalid host or port.
            raise Unreachable(f"{peer} cannot be reached: {explained(failure) or 'no answer'}") from None
        return connection


def explained(failure: Exception) -> str:
    """The words of a failed connection, also of one that failed by its certificates. Needs no import of ssl."""
    if verified := getattr(failure, "verify_message", ""):
        is_strange = getattr(failure, "verify_code", 0) in _STRANGE_CA
        return f"its certificate is not accepted: {'it is of another CA' if is_strange else verified}"
    reason = str(getattr(failure, "reason", ""))
    return next((words for alert, words in _ALERTS.items() if reason.endswith(alert)), str(failure))


def header_lines(headers: dict[str, str]) -> bytes:
    """Complete header lines. Raises ValueError for a value with a line break."""
    lines = []
    for name, value in headers.items():
        if "\r" in value or "\n" in value:
            raise ValueError(f"header {name} contains a line break")
        lines.append(f"{name}: {value}\r\n")
    return "".join(lines).encode("latin-1")
