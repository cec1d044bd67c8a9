"""Write an answer's bytes: directly to the connection if there is no middleware, else through ASGI."""

from __future__ import annotations

from typing import Protocol

import msgspec
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pdctl.net import asgi
from pdctl.net.openai.api import ApiError
from pdctl.proxy.takeover.cover import Reply
from pdctl.proxy.takeover.notes import Facts

AnswerHeaders = list[tuple[bytes, bytes]]


class Writer(Protocol):
    """Writes one answer. Waits while the client is slower than the proxy; a disconnected client discards everything.

    `has_journal`: notes of parts are used.
    """

    has_journal: bool

    async def whole(self, body: bytes, headers: AnswerHeaders) -> None:
        """Write a JSON body with status 200."""
        ...

    async def start(self, headers: AnswerHeaders, facts: Facts | None = None) -> None:
        """Set the head of an event stream; it is sent with the first part. `facts`: with these and the notes of its
        parts, another proxy can continue it."""
        ...

    async def part(self, data: bytes, notes: bytes = b"") -> None:
        """Write some events."""
        ...

    async def last(self, data: bytes) -> None:
        """Write the last events."""
        ...

    def part_now(self, data: bytes, ids: bytes = b"") -> bool:
        """Like `part`, without waiting; returns False if nothing was sent. `ids`: the token ids of the events, as
        text."""
        ...


def writer(send: asgi.Send) -> Writer:
    """The fastest correct writer: middleware, such as CORS, must see what is sent."""
    cycle = getattr(send, "__self__", None)
    return _Direct(cycle) if isinstance(cycle, RequestResponseCycle) else _Asgi(send)


async def end_stream(send: asgi.Send, failure: ApiError) -> None:
    """End a stream that another proxy began with an error event."""
    await writer(send).last(b"data: " + failure.body() + b"\n\n")


class _Asgi:
    has_journal = False

    def __init__(self, send: asgi.Send) -> None:
        self._send = send

    async def whole(self, body: bytes, headers: AnswerHeaders) -> None:
        await asgi.respond(self._send, 200, body, headers)

    async def start(self, headers: AnswerHeaders, facts: Facts | None = None) -> None:
        await asgi.start_stream(self._send, headers)

    async def part(self, data: bytes, notes: bytes = b"") -> None:
        await asgi.send_part(self._send, data)

    async def last(self, data: bytes) -> None:
        await asgi.send_part(self._send, data, last=True)

    def part_now(self, data: bytes, ids: bytes = b"") -> bool:
        return False


class _Direct:
    """Does what uvicorn's `send` does for these kinds of answers, without checking each header and part.

    Saves a packet (head and body are sent together) and about 10 microseconds per answer, 3 per part.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write
        # A covered connection's: what it writes is noted first.
        transport: object = cycle.transport
        self._reply = transport if isinstance(transport, Reply) else None
        self._note_and_write = self._reply.part if self._reply is not None else None
        self.has_journal = self._reply is not None
        self._unsent: tuple[bytes, AnswerHeaders] | None = None
        self._facts: Facts | None = None
        # HTTP/1.0 has no chunks: the stream ends with the connection.
        self._chunked = cycle.scope["http_version"] != "1.0"

    async def whole(self, body: bytes, headers: AnswerHeaders) -> None:
        if self._flow.write_paused:
            await self._flow.drain()
        if self._cycle.disconnected:
            return
        about = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        self._complete(self._start(about, headers) + body)

    async def start(self, headers: AnswerHeaders, facts: Facts | None = None) -> None:
        self._facts = facts
        about = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
        self._unsent = about + (b"transfer-encoding: chunked\r\n" if self._chunked else b""), headers

    async def part(self, data: bytes, notes: bytes = b"") -> None:
        if self._flow.write_paused:
            await self._flow.drain()
        if self._cycle.disconnected:
            return
        is_first, framed = self._unsent is not None, self._framed(data)
        if self._reply is None:
            self._write(framed)
        elif is_first and self._facts is not None:
            self._reply.begin(framed, notes, msgspec.structs.replace(self._facts, closes=self._closes))
        else:
            self._reply.part(framed, notes)

    async def last(self, data: bytes) -> None:
        if self._flow.write_paused:
            await self._flow.drain()
        if not self._cycle.disconnected:
            self._complete(self._framed(data) + (b"0\r\n\r\n" if self._chunked else b""))

    def part_now(self, data: bytes, ids: bytes = b"") -> bool:
        if self._flow.write_paused or self._unsent or self._cycle.disconnected:
            return False
        framed = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
        if self._note_and_write is None:
            self._write(framed)
        else:
            self._note_and_write(framed, ids + b"," if ids else b"")
        return True

    def _framed(self, data: bytes) -> bytes:
        head = b""
        if self._unsent is not None:
            # Only now: before its head is sent, an answer may still be replaced, or become the last on its connection.
            head, self._unsent = self._start(*self._unsent), None
        return b"%b%x\r\n%b\r\n" % (head, len(data), data) if self._chunked else head + data

    def _start(self, about: bytes, headers: AnswerHeaders) -> bytes:
        cycle = self._cycle
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        lines = [b"%b: %b\r\n" % pair for pair in (*cycle.default_headers, *headers)]
        close = b"connection: close\r\n" if self._closes else b""
        return b"".join((b"HTTP/1.1 200 OK\r\n", *lines, about, close, b"\r\n"))

    @property
    def _closes(self) -> bool:
        """Whether the connection ends with this answer."""
        return not (self._cycle.keep_alive and self._chunked)

    def _complete(self, data: bytes) -> None:
        """Write the last bytes."""
        cycle = self._cycle
        if self._reply is None:
            self._write(data)
        else:
            self._reply.last(data, self._closes)
        cycle.response_complete = True
        cycle.message_event.set()
        if self._closes:
            cycle.transport.close()
        cycle.on_response()
