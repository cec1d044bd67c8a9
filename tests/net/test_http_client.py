from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from pdctl.net.http_client import ConnectionPool, Unreachable, header_lines

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


def test_connections_are_kept_and_a_stale_one_is_replaced() -> None:
    connections = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        for _ in range(2):
            await read_request(reader)
            writer.write(OK)
        # then closes: the pool keeps a connection that is dead

    async def main() -> None:
        async with server(handler) as pool:
            for _ in range(4):
                answer = await pool.request("POST", "/x", body=b"{}")
                assert (answer.status, answer.body) == (200, b"ok")
                await asyncio.sleep(0.01)

    asyncio.run(main())
    assert len(connections) == 2


def test_chunks_come_as_they_are_sent() -> None:
    gate = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await gate.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")
        await writer.drain()

    async def main() -> None:
        async with server(handler) as pool:
            stream = await pool.stream("POST", "/x")
            assert await stream.read() == b"one"
            gate.set()
            assert await stream.rest() == b"two"
            assert await stream.read() is None
            stream.close()
            assert len(pool._idle) == 1

    asyncio.run(main())


def test_leaving_early_tells_the_server() -> None:
    left = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        try:
            left.append(await reader.read() == b"")
        except ConnectionResetError:
            left.append(True)

    async def main() -> None:
        async with server(handler) as pool:
            stream = await pool.stream("POST", "/x")
            await stream.read()
            stream.close()
            async with asyncio.timeout(5):
                while not left:
                    await asyncio.sleep(0.01)

    asyncio.run(main())
    assert left == [True]


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
                await pool.request("GET", "/x", timeout_s=5)
            assert not pool._idle

    asyncio.run(main())


def test_silence_has_a_deadline_and_nobody_home_is_known_at_once() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()

    async def main() -> None:
        async with server(handler) as pool:
            with pytest.raises(Unreachable, match="no answer in") as found:
                await pool.request("GET", "/x", timeout_s=0.05)
            assert found.value.sent
        with pytest.raises(Unreachable, match="cannot be reached"):
            await pool.request("GET", "/x", timeout_s=5)

    asyncio.run(main())


def test_a_slow_reader_stops_the_sender() -> None:
    sent = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        total = 64 * 2**20
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        try:
            while sent < total:
                writer.write(b"x" * 2**16)
                await writer.drain()
                sent += 2**16
        except ConnectionResetError:
            return

    async def main() -> None:
        async with server(handler) as pool:
            stream = await pool.stream("GET", "/x")
            for _ in range(20):
                before = sent
                await asyncio.sleep(0.02)
                if sent == before:
                    break
            assert sent < 32 * 2**20, "the whole body was taken in without a reader"
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
            async with asyncio.timeout(5):
                while not stream._connection._paused:
                    await asyncio.sleep(0.01)
            stream._connection.on_message_complete()  # as when the end came in the read that paused it
            stream._connection.keep_alive = True
            stream.close()
            assert not pool._idle

    asyncio.run(main())


def test_header_values_cannot_break_out() -> None:
    assert header_lines({"a": "b", "c": "d"}) == b"a: b\r\nc: d\r\n"
    with pytest.raises(ValueError, match="line break"):
        header_lines({"a": "b\r\nevil: 1"})
