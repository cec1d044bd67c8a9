from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from pdctl.net.http_client import ConnectionPool, Unreachable, _Connection, header_lines

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[ConnectionPool]:
    writers = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await handler(reader, writer)
        finally:
            writer.close()

    made = await asyncio.start_server(handle, "127.0.0.1", 0)
    pool = ConnectionPool("127.0.0.1", made.sockets[0].getsockname()[1], connect_s=1)
    try:
        yield pool
    finally:
        pool.close()
        made.close()
        for writer in writers:
            writer.close()
        await made.wait_closed()
        await asyncio.sleep(0)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")),
        0,
    )
    return head + (await reader.readexactly(length) if length else b"")


@pytest.mark.parametrize("known", [True, False])
def test_connections_are_kept_and_a_stale_one_is_replaced(known: bool) -> None:
    """`known`: the pool has heard of its end; else it finds out when it sends."""
    connections = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        for _ in range(2):
            await read_request(reader)
            writer.write(OK)
        # then closes: the pool keeps a connection that is dead

    async def main() -> None:
        async with server(handler) as pool:
            for number in range(4):
                answer = await pool.request("POST", "/x", body=b"{}")
                assert (answer.status, answer.body) == (200, b"ok")
                while known and number == 1 and not pool._idle[0].closed:
                    await asyncio.sleep(0)

    asyncio.run(main())
    assert len(connections) == 2


def test_chunks_come_as_they_are_sent() -> None:
    may_answer = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await may_answer.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")
        await writer.drain()

    async def main() -> None:
        async with server(handler) as pool:
            stream = await pool.stream("POST", "/x")
            assert await stream.read() == b"one"
            may_answer.set()
            assert await stream.rest() == b"two"
            assert await stream.read() is None
            stream.close()
            assert len(pool._idle) == 1

    asyncio.run(main())


def test_leaving_early_tells_the_server() -> None:
    left = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        left.set()

    async def main() -> None:
        async with server(handler) as pool:
            stream = await pool.stream("POST", "/x")
            await stream.read()
            stream.close()
            async with asyncio.timeout(60):
                await left.wait()

    asyncio.run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000,
    ],
    ids=["nothing", "half a body", "no HTTP", "endless header"],
)
def test_answers_that_are_none(answer: bytes) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        await writer.drain()

    async def main() -> None:
        async with server(handler) as pool:
            with pytest.raises(Unreachable):
                await pool.request("GET", "/x", timeout_s=60)
            assert not pool._idle

    asyncio.run(main())


def test_silence_has_a_deadline_and_nobody_home_is_known_at_once() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()

    async def main() -> None:
        async with server(handler) as pool:
            with pytest.raises(Unreachable, match="did not answer within") as found:
                await pool.request("GET", "/x", timeout_s=0.05)
            assert found.value.sent
        with pytest.raises(Unreachable, match="cannot be reached"):
            await pool.request("GET", "/x", timeout_s=60)

    asyncio.run(main())


async def paused(connection: _Connection) -> None:
    """Return when the connection has stopped its socket, by itself."""
    transport, stopped = connection.transport, asyncio.Event()
    assert transport is not None

    def pause_reading() -> None:
        type(transport).pause_reading(transport)
        stopped.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "pause_reading", pause_reading, raising=False)
        if not connection._paused:
            await stopped.wait()
    assert not transport.is_reading()


def test_a_slow_reader_stops_the_sender() -> None:
    total = 64 * 2**20

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        for _ in range(0, total, 2**16):
            writer.write(b"x" * 2**16)
            await writer.drain()

    async def main() -> None:
        async with server(handler) as pool:
            stream = await pool.stream("GET", "/x")
            connection = stream._connection
            assert connection is not None
            await paused(connection)
            assert connection._buffered < 2**20, "what the kernel holds is all that waits elsewhere"
            size = 0
            while (data := await stream.read()) is not None:
                size += len(data)
            assert size == total, "it goes on with its reader"
            stream.close()

    asyncio.run(main())


def test_a_paused_connection_is_not_used_again() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 600000\r\n\r\n" + b"x" * 600_000)
        await writer.drain()
        await reader.read()

    async def main() -> None:
        async with server(handler) as pool:
            stream = await pool.stream("GET", "/x")
            connection = stream._connection
            assert connection is not None
            await paused(connection)
            connection.on_message_complete()  # as when the end came in the read that paused it
            connection.keep_alive = True
            stream.close()
            assert not pool._idle

    asyncio.run(main())


def test_header_values_cannot_break_out() -> None:
    assert header_lines({"a": "b", "c": "d"}) == b"a: b\r\nc: d\r\n"
    with pytest.raises(ValueError, match="line break"):
        header_lines({"a": "b\r\nevil: 1"})
