"""uvicorn's HTTP protocol with fixes for edge cases, for every server that clients may reach.

- An unsupported upgrade is ignored (RFC 9110, 7.8): the request is answered as if no upgrade was offered.
- Malformed HTTP, too large headers and internal errors are answered in OpenAI's error format.
- A client that shuts down its sending side still gets its answer. A closed client looks the same at first: it is sent
  an interim response, to which its kernel replies with a reset.
- A request says in its scope whose certificate its connection has, if servers ask for certificates.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pdctl.net.identity import PEER, Who
from pdctl.net.openai.api import ApiError

# Limit of request line and headers together, in bytes.
MAX_HEADER_BYTES = 64 * 1024
_UPGRADE_HEADERS = frozenset({b"upgrade", b"connection", b"http2-settings"})
# Delays after a client's end of sending at which the connection is checked for a reset, seconds.
_LOOK_AFTER_S = (0.02, 0.1, 0.5, 1.0, 2.0, 5.0)
_TCP_CLOSE = 7  # linux/include/net/tcp_states.h
_STILL_HERE = b"HTTP/1.1 102 Processing\r\n\r\n"
_REASONS = {400: b"Bad Request", 405: b"Method Not Allowed", 431: b"Request Header Fields Too Large"}


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the fixes described in the module docstring."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection."""
        super().connection_made(transport)
        self.refused = False
        self.header_bytes = 0
        self.in_head = True
        self._declined = False
        self._has_begun = False
        certificate = transport.get_extra_info("peercert")
        self._peer = (_who(certificate),) if certificate else ()

    # -- requests ------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Receive bytes. After a refusal they are discarded until the client disconnects."""
        if self.refused:
            return
        self._has_begun = False
        self._feed(data)
        if self.in_head and not self.refused:
            # If this read also ended earlier requests, count only the bytes parsed of this request's head.
            self.header_bytes = max(1, self._head_size()) if self._has_begun else self.header_bytes + len(data)
            if self.header_bytes > MAX_HEADER_BYTES:
                self._refuse_head()

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        # A loop, not a recursion: a client may pipeline thousands of upgrade offers in one read.
        while data and not self.refused:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offered:
                # The parser stops here: it treats the rest as another protocol.
                data = self._head_without_upgrade() + data[offered.args[0] :]
                self._declined = False
                self.parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError:
                if not self.refused:
                    self.send_400_response("the request is not valid HTTP")
                return

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.header_bytes = 0
        self.in_head = self._has_begun = True

    def _head_size(self) -> int:
        """Bytes of the head parsed so far."""
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        if self.parser.get_method() == b"CONNECT":
            # The parser treats CONNECT as an upgrade that cannot be declined by removing a header.
            self._refuse(ApiError(405, "CONNECT is not supported: this server does not proxy to other hosts"))
            return
        if self.parser.should_upgrade():
            self._declined = True
            return
        if self._head_size() > MAX_HEADER_BYTES:
            self._refuse_head()
            return
        self.in_head = False
        if self._peer:
            cast(dict[str, object], self.scope)[PEER] = self._peer[0]
        super().on_headers_complete()
        cycle = self.cycle
        cycle.send_500_response = lambda: _send_500(cycle)  # type: ignore[method-assign]

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if not (self._declined or self.refused):
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        if not (self._declined or self.refused):
            super().on_message_complete()

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % (name, value) for name, value in self.headers if name not in _UPGRADE_HEADERS]
        words = [word.strip() for name, value in self.headers if name == b"connection" for word in value.split(b",")]
        kept = [word for word in words if word.lower() in (b"close", b"keep-alive")]
        lines += [b"connection: %b" % b", ".join(kept)] if kept else []
        return b"\r\n".join(lines) + b"\r\n\r\n"

    # -- refusals ------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """The received bytes are not valid HTTP."""
        self._refuse(ApiError(400, msg))

    def _refuse_head(self) -> None:
        self._refuse(ApiError(431, f"the request's headers are larger than {MAX_HEADER_BYTES} bytes"))

    def _refuse(self, failure: ApiError) -> None:
        """Answer and keep reading: closing a connection with unread bytes resets it, and the answer would be lost."""
        self.refused = True
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer is in progress. The client gets this answer, and the connection closes after it.
            self.cycle.keep_alive = False
            return
        body = failure.body()
        head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (failure.status, _REASONS[failure.status], len(body)) + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    # -- the end of sending --------------------------------------------------------------------------------

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client closed the connection, or only its sending side. Returning True keeps the connection open."""
        if self.refused or self.in_head or self.cycle is None or self.cycle.response_complete:
            return False
        last = self.pipeline[0][0] if self.pipeline else self.cycle
        if last.more_body or not self.transport.can_write_eof():
            return False  # TLS has no half-closed connections
        last.keep_alive = False
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(_STILL_HERE)
        self._look(0)
        return True

    def _look(self, number: int) -> None:
        """Close the connection if the client's kernel has reset it, else check again later."""
        if self.transport.is_closing():
            return
        if self._is_reset():
            self.transport.abort()
            return
        delay = _LOOK_AFTER_S[min(number, len(_LOOK_AFTER_S) - 1)]
        self.loop.call_later(delay, self._look, number + 1)

    def _is_reset(self) -> bool:
        try:
            descriptor = os.dup(self.transport.get_extra_info("socket").fileno())
            with socket.socket(fileno=descriptor) as found:
                return found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
        except OSError:
            return True


def _who(certificate: dict[str, object]) -> Who | None:
    from pdctl.net.identity.contexts import who_in  # only servers with certificates pay for it

    return who_in(certificate)


async def _send_500(cycle: RequestResponseCycle) -> None:
    body = ApiError(500, "internal server error", "server_error").body()
    about = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await cycle.send({"type": "http.response.start", "status": 500, "headers": [*about, (b"connection", b"close")]})
    await cycle.send({"type": "http.response.body", "body": body})
