"""A connection without a complete request is not kept: real sockets, a short deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from pdctl.net.prompt_protocol import PromptProtocol
from pdctl.net.serving import Server, listen_tcp

pytestmark = pytest.mark.anyio
_WHOLE = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class _Hasty(PromptProtocol):
    head_s, body_s = 0.2, 0.3


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    listener = listen_tcp("127.0.0.1", 0)
    listener.setblocking(False)
    server = Server(uvicorn.Config(_app, log_level="error", lifespan="off", loop="none", http=_Hasty, ws="none"))
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(server.serve(sockets=[listener]))
        yield listener.getsockname()[1]
        server.should_exit = True
        await task
    listener.close()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the server ends the connection: it would wait for ever without a deadline."""
    async with asyncio.timeout(30):
        try:
            return await reader.read() == b""
        except ConnectionResetError:
            return True


_BODY = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", b"GET / HT", _WHOLE[:-2], _BODY, _BODY + b"half"])
async def test_a_request_that_is_not_sent_ends_the_connection(sent: bytes) -> None:
    async with serving() as port, connected(port) as (reader, writer):
        writer.write(sent)
        assert await ended(reader)


@pytest.mark.parametrize("sent", [_WHOLE[:-2], _BODY + b"half"])
async def test_a_second_request_has_a_deadline_too(sent: bytes) -> None:
    async with serving() as port, connected(port) as (reader, writer):
        writer.write(_WHOLE)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.write(sent)
        assert await ended(reader)


async def test_a_body_in_parts_is_read() -> None:
    async with serving() as port, connected(port) as (reader, writer):
        for part in (_BODY, b"1234", b"56789"):
            writer.write(part)
            await writer.drain()
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")


async def test_an_idle_connection_is_kept_after_a_request() -> None:
    async with serving() as port, connected(port) as (reader, writer):
        writer.write(_WHOLE)
        await reader.readuntil(b"ok")
        async with connected(port) as (other, _):
            assert await ended(other), "longer than the deadline has passed"
        writer.write(_WHOLE)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
