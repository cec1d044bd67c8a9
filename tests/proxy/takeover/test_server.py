"""A server whose connections outlive it: what it notes of each answer, and how it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import cast

import pytest
import uvicorn

from pdctl.net import asgi
from pdctl.net.keeping import TakenOver
from pdctl.net.serving import listen_tcp
from pdctl.proxy.answers.writer import writer
from pdctl.proxy.client.connections import BoundedProtocol
from pdctl.proxy.takeover import adoption
from pdctl.proxy.takeover.covers import Covers
from pdctl.proxy.takeover.journal import PAGE, Journal, Slot
from pdctl.proxy.takeover.notes import Facts
from pdctl.proxy.takeover.protocol import CoveredConnection
from pdctl.proxy.takeover.server import CoveringServer
from pdctl.proxy_wire import SLOT_BYTES
from pdctl.supervisor.process.keeper import Keeper

App = Callable[[asgi.Message, asgi.Receive, asgi.Send], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
GET = b"GET /%b HTTP/1.1\r\nhost: x\r\n\r\n"
HEAD = b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n"


class Served:
    """A server in this process, and the keeper of its connections."""

    def __init__(self, app: App, slots: int = 8) -> None:
        self.told: list[TakenOver] = []
        self.keeper = Keeper("proxy", slots, self.told.append)
        self.listener = listen_tcp("127.0.0.1", 0)
        self.app = app
        self.streams: list[Streams] = []

    @contextlib.contextmanager
    def process(self, crashes: bool = False) -> Iterator[Covers]:
        """What a process of the proxy has; at its end it is gone without a word."""
        channel, memory = self.keeper.hand_over()
        try:
            yield Covers(Journal(memory, self.keeper.slots), channel)
        finally:
            channel.close()
            self.keeper.ended(crashes)

    def server(self, covers: Covers) -> CoveringServer:
        config = uvicorn.Config(self.app, lifespan="off", log_level="warning", http=BoundedProtocol)
        config.load()
        server = CoveringServer(config, covers)
        server.lifespan = config.lifespan_class(config)
        return server

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[CoveringServer]:
        """A process that serves."""
        with self.process() as covers:
            server = self.server(covers)
            await server.startup(sockets=[self.listener])
            try:
                yield server
            finally:
                server.stop_listening()
                for _, client in self.streams:
                    client.close()
                    with contextlib.suppress(ConnectionError):
                        await client.wait_closed()
                for connection in tuple(server.server_state.connections):
                    cast(BoundedProtocol, connection).transport.abort()
                await until(lambda: not covers.open)

    async def connect(self) -> Streams:
        self.streams.append(await asyncio.open_connection(*self.listener.getsockname()))
        return self.streams[-1]

    def close(self) -> None:
        self.keeper.close()
        self.listener.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def tried(app: App, work: Callable[[Served, CoveringServer], Awaitable[None]], slots: int = 8) -> None:
    async def main() -> None:
        with contextlib.closing(Served(app, slots)) as served:
            async with served.running() as server:
                await work(served, server)

    asyncio.run(main())


async def ask(streams: Streams, request: bytes, end: bytes) -> bytes:
    streams[1].write(request)
    async with asyncio.timeout(60):
        return await streams[0].readuntil(end)


async def plain(scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
    """Answers of all kinds that uvicorn itself writes."""
    path = scope["path"]
    status, headers = (204, []) if path == "/nothing" else (200, [(b"content-length", b"4")])
    if path == "/chunks":
        headers = []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if path == "/chunks":
        await send({"type": "http.response.body", "body": b"tex", "more_body": True})
        await send({"type": "http.response.body", "body": b"t"})
    else:
        await send({"type": "http.response.body", "body": b"" if path == "/nothing" else b"text"})


@pytest.mark.parametrize(
    ("request_", "end"),
    [(HEAD, b"\r\n\r\n"), (GET % b"nothing", b"\r\n\r\n"), (GET % b"chunks", b"0\r\n\r\n"), (GET % b"", b"text")],
    ids=["HEAD", "204", "chunks", "a body"],
)
@pytest.mark.parametrize("closes", [False, True])
def test_every_kind_of_answer_is_sent_and_noted_as_complete(request_: bytes, end: bytes, closes: bool) -> None:
    async def work(served: Served, server: CoveringServer) -> None:
        streams = await served.connect()
        if closes:
            request = request_.replace(b"host: x", b"host: x\r\nconnection: close")
            await ask(streams, request, end)
            assert await streams[0].read() == b""
            return
        for _ in range(2):
            await ask(streams, request_, end)
            await until(lambda: all(connection.may_be_left() for connection in server.covers.open))
            (slot,) = (slot for slot in server.covers.journal.slots if slot.cookie)
            assert slot.frame.answer_at == slot.end > 0, "nothing of it is in progress"
            # Asked, it let nothing new begin.
            (connection,) = server.server_state.connections
            cast(BoundedProtocol, connection).transport.resume_reading()

    tried(plain, work)


def test_what_a_handler_writes_after_the_client_left_is_not_noted_in_another_ones_slot() -> None:
    """As with pipelined requests, of which only the last learns that the client left."""
    left, going, written = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def late(scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        if scope["path"] == "/other":
            await plain(scope, receive, send)
            return
        connection = scope["pdctl.connection"]
        connection.on_left = left.set
        await going.wait()
        connection.cycle.transport.part(b"of the first client")
        written.set()

    async def work(served: Served, server: CoveringServer) -> None:
        first = await served.connect()
        first[1].write(GET % b"late")
        await until(lambda: server.covers.journal.used == 1)
        first[1].close()
        await until(left.is_set)
        second = await served.connect()
        await ask(second, GET % b"other", b"text")
        going.set()
        await until(written.is_set)
        (slot,) = (slot for slot in server.covers.journal.slots if slot.cookie)
        assert b"first client" not in slot.output(0, slot.end)

    tried(late, work, slots=1)


def streaming(is_exact: bool, more: asyncio.Event, asked: list[str] | None = None) -> App:
    async def app(scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        if asked is not None:
            asked.append(scope["path"])
        answer = writer(send)
        await answer.start([], Facts("r", 1, 2, is_exact=is_exact))
        await answer.part(b"begun")
        await more.wait()
        await answer.last(b"done")

    return app


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_server_that_leaves_waits_for_streams_that_another_one_cannot_continue(is_exact: bool) -> None:
    more, asked = asyncio.Event(), list[str]()

    async def work(served: Served, server: CoveringServer) -> None:
        streams, idle = await served.connect(), await served.connect()
        await ask(streams, GET % b"", b"begun")
        await until(lambda: server.covers.journal.used == 2)
        leaving = asyncio.ensure_future(server.leave(10.0))
        if is_exact:
            await leaving
        else:
            await asyncio.wait({leaving}, timeout=0.1)
            assert not leaving.done()
            # What comes meanwhile is left to the next one.
            idle[1].write(GET % b"later")
            await asyncio.wait({leaving}, timeout=0.1)
            more.set()
            async with asyncio.timeout(60):
                await streams[0].readuntil(b"done\r\n0\r\n\r\n")
                await leaving
        assert asked == ["/"]
        more.set()

    tried(streaming(is_exact, more, asked), work)


def test_a_connection_that_did_not_fit_is_handed_over_after_its_answer() -> None:
    """And not closed: nothing of it is in progress."""

    async def work(served: Served, server: CoveringServer) -> None:
        streams = await served.connect()
        await ask(streams, GET % b"", b"text")
        (connection,) = server.covers.open
        assert isinstance(connection, CoveredConnection)
        assert connection.cover is not None
        connection.cover.lose()
        await server.leave(10.0)
        assert connection.cover.slot is not None
        assert connection in server.covers.open

    tried(plain, work)


def test_a_server_that_leaves_waits_for_answers_without_a_slot() -> None:
    more = asyncio.Event()

    async def work(served: Served, server: CoveringServer) -> None:
        _, uncovered = await served.connect(), await served.connect()
        await until(lambda: len(server.covers.open) == 2)
        await ask(uncovered, GET % b"", b"begun")
        leaving = asyncio.ensure_future(server.leave(10.0))
        await asyncio.wait({leaving}, timeout=0.1)
        assert not leaving.done()
        more.set()
        async with asyncio.timeout(60):
            assert b"done" in await uncovered[0].read()
            await leaving

    tried(streaming(True, more), work, slots=1)


@pytest.mark.parametrize("crashes", [True, False])
def test_a_request_that_crashes_every_proxy_is_given_up(crashes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process ends before it has answered; nothing is done in between. Deaths by others do not count."""

    async def ends(_: object, make: object, connection: socket.socket) -> None:
        connection.close()  # the keeper's descriptor remains

    monkeypatch.setattr(asyncio.SelectorEventLoop, "connect_accepted_socket", ends)

    async def main() -> None:
        served = Served(plain)
        with contextlib.closing(served), socket.create_connection(served.listener.getsockname()) as client:
            connection, _ = served.listener.accept()
            with served.process(crashes) as covers, connection:
                found = covers.new(connection)
                assert found is not None
                client.sendall(GET % b"")
                connection.recv_into(found[1].room_in(0))
            cuts = []
            for _ in range(adoption._MOST_CRASHES):
                with served.process(crashes) as covers:
                    await adoption.Adoption(covers, served.server(covers).protocol).run()
                    cuts.append(covers.counts.taken_over.cut)
            assert cuts == [0, 0, int(crashes)]
            if crashes:
                assert covers.counts.taken_over.reasons == ("3 proxies have crashed while they had its request",)

    asyncio.run(main())


def test_progress_begins_the_count_again() -> None:
    slot = Slot(memoryview(mmap.mmap(-1, PAGE + SLOT_BYTES)), 0)
    slot.take(1, 0, int)
    assert [slot.crashed(5), slot.crashed(5), slot.crashed(6), slot.crashed(6), slot.crashed(6)] == [1, 2, 1, 2, 3]
    slot.take(2, 0, int)
    assert slot.crashed(6) == 1
