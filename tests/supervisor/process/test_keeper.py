"""The keeper has connections until they end, or until a proxy claims them; no more than it may, and nothing else."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import pytest

from pdctl.net.keeping import CRASHED, DROP, END, KEEP, KEPT, REPORT, UNCOVERED, TakenOver, cookie_of, receive, send
from pdctl.supervisor.process import keeper as keepers
from pdctl.supervisor.process.keeper import Keeper, Keepers
from pdctl.supervisor.process.succession import KeptConnections


class Clients:
    """Connections of clients with a proxy."""

    def __init__(self, stack: ExitStack) -> None:
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._stack = stack

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Both ends: the client's, the proxy's."""
        client = self._stack.enter_context(socket.create_connection(self._listener.getsockname()))
        client.settimeout(60)
        served, _ = self._listener.accept()
        return client, self._stack.enter_context(served)


@pytest.fixture
def clients() -> Iterator[Clients]:
    with ExitStack() as stack:
        yield Clients(stack)


def body_of(connection: socket.socket) -> bytes:
    return cookie_of(connection.fileno()).to_bytes(8, "little")


def keep(channel: socket.socket, connection: socket.socket) -> None:
    send(channel, KEEP, body_of(connection), [connection.fileno()])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def received(channel: socket.socket) -> list[socket.socket]:
    """What a new proxy gets."""
    found: list[socket.socket] = []
    while (packet := receive(channel)) is not None and packet.kind != END:
        assert packet.kind == KEPT
        found += [socket.socket(fileno=descriptor) for descriptor in packet.descriptors]
    return found


def kept(work: Callable[[Keeper, list[TakenOver]], Awaitable[None]], slots: int = 8) -> None:
    async def run() -> None:
        told: list[TakenOver] = []
        keeper = Keeper("proxy", slots, told.append)
        try:
            await work(keeper, told)
        finally:
            keeper.close()

    asyncio.run(run())


def is_waiting(keeper: Keeper) -> bool:
    """Whether connections will be ended unless a proxy claims them."""
    return keeper._unclaimed is not None


def test_a_connection_outlives_its_proxy(clients: Clients) -> None:
    client, served = clients.connect()

    async def work(keeper: Keeper, told: list[TakenOver]) -> None:
        channel, memory = keeper.hand_over()
        assert received(channel) == []
        os.write(memory, b"journal")
        keep(channel, served)
        served.send(b"before ")
        served.close()
        channel.close()  # the proxy has died
        keeper.ended()
        assert keeper.held == 1
        again, same = keeper.hand_over()
        assert os.pread(same, 7, 0) == b"journal"
        (found,) = received(again)
        with found:
            found.send(b"after")
        report = TakenOver(connections=1, resumed=1, resent=5)
        send(again, REPORT, msgspec.json.encode(report))
        await until(lambda: keeper.takeovers == 1)
        assert told == [report]
        assert keeper.total.resent == 5
        again.close()

    kept(work)
    assert client.recv(100, socket.MSG_WAITALL) == b"before after"
    assert client.recv(100) == b""  # the keeper's end ends it


def test_a_supervisor_that_becomes_another_knows_that_the_proxy_crashed(clients: Clients) -> None:
    """The next proxy suspects the requests that were under way."""
    _, served = clients.connect()

    async def work(keeper: Keeper, told: list[TakenOver]) -> None:
        channel, _ = keeper.hand_over()
        keep(channel, served)
        channel.close()
        keeper.ended(crashed=True)
        kept_by_it = msgspec.json.decode(msgspec.json.encode(keeper.kept()), type=KeptConnections)
        owned = {cookie: os.dup(descriptor) for cookie, descriptor in kept_by_it.connections.items()}
        kept_by_it = msgspec.structs.replace(kept_by_it, memory=os.dup(kept_by_it.memory), connections=owned)
        after = Keeper.restored(kept_by_it, told.append)
        try:
            again, _ = after.hand_over()
            with again:
                first, end = receive(again), receive(again)
            assert first is not None
            os.close(first.descriptors[0])
            assert end is not None
            assert (end.kind, end.body) == (END, CRASHED)
        finally:
            after.close()

    kept(work)


def test_an_ended_connection_is_dropped(clients: Clients) -> None:
    client, served = clients.connect()

    async def work(keeper: Keeper, _: list[TakenOver]) -> None:
        channel, _memory = keeper.hand_over()
        keep(channel, served)
        await until(lambda: keeper.held == 1)
        body = body_of(served)
        served.close()
        send(channel, DROP, body)
        await until(lambda: keeper.held == 0)
        assert await asyncio.to_thread(client.recv, 1) == b""
        channel.close()

    kept(work)


def test_a_foreign_descriptor_is_refused(clients: Clients) -> None:
    _, served = clients.connect()
    _, other = clients.connect()

    async def work(keeper: Keeper, _: list[TakenOver]) -> None:
        channel, memory = keeper.hand_over()
        send(channel, KEEP, body_of(served), [other.fileno()])
        send(channel, KEEP, body_of(served), [memory])
        send(channel, KEEP, body_of(served))
        send(channel, KEEP, b"", [served.fileno(), other.fileno()])
        send(channel, b"?", b"x")
        send(channel, REPORT, b"no report")
        before = len(list(Path("/proc/self/fd").iterdir()))
        await until(lambda: keeper.refused == 6)
        assert keeper.held == 0
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
        channel.close()

    kept(work)


def test_it_keeps_no_more_than_it_may(clients: Clients) -> None:
    ends = [clients.connect() for _ in range(3)]

    async def work(keeper: Keeper, _: list[TakenOver]) -> None:
        channel, _memory = keeper.hand_over()
        for _client, served in ends:
            keep(channel, served)
        send(channel, UNCOVERED, bytes(8))
        await until(lambda: keeper.uncovered == 1)
        assert (keeper.held, keeper.refused) == (2, 0), "what is one too many is not malformed"
        channel.close()

    kept(work, slots=2)


def test_a_proxy_whose_end_nobody_saw_loses_nothing(clients: Clients) -> None:
    """It died while the supervisor became another version's."""
    _client, served = clients.connect()

    async def work(keeper: Keeper, _: list[TakenOver]) -> None:
        first, _memory = keeper.hand_over()
        keep(first, served)
        first.close()
        second, _memory = keeper.hand_over()
        [found] = received(second)
        assert body_of(found) == body_of(served)
        found.close()
        second.close()

    kept(work)


def test_what_no_proxy_claims_is_ended(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    client, served = clients.connect()
    monkeypatch.setattr(keepers, "_UNCLAIMED_S", 0.05)

    async def work(keeper: Keeper, _: list[TakenOver]) -> None:
        channel, _memory = keeper.hand_over()
        keep(channel, served)
        served.close()
        channel.close()
        keeper.ended()
        assert keeper.held == 1
        await until(lambda: keeper.held == 0)
        assert await asyncio.to_thread(client.recv, 1) == b""

    kept(work)


def test_a_proxy_that_says_anything_has_claimed_them(clients: Clients) -> None:
    """Its report may be late, or lost."""
    (_, served), (_, new) = clients.connect(), clients.connect()

    async def work(keeper: Keeper, _: list[TakenOver]) -> None:
        channel, _memory = keeper.hand_over()
        keep(channel, served)
        channel.close()
        keeper.ended()
        assert is_waiting(keeper)
        again, _memory = keeper.hand_over()
        keep(again, new)
        await until(lambda: keeper.held == 2)
        assert not is_waiting(keeper)
        again.close()

    kept(work)


def test_what_a_proxy_says_last_is_read(clients: Clients) -> None:
    ends = [clients.connect() for _ in range(5)]

    async def work(keeper: Keeper, _: list[TakenOver]) -> None:
        channel, _memory = keeper.hand_over()
        for _client, served in ends:
            keep(channel, served)
        channel.close()
        keeper.ended()  # without a turn of the loop in between
        assert keeper.held == 5

    kept(work)


def test_many_connections_are_handed_over(clients: Clients) -> None:
    ends = [clients.connect() for _ in range(450)]

    async def work(keeper: Keeper, _: list[TakenOver]) -> None:
        channel, _memory = keeper.hand_over()
        for number, (_client, served) in enumerate(ends, 1):
            keep(channel, served)
            if number % 50 == 0:
                await until(lambda number=number: keeper.held == number)  # type: ignore[misc]
        channel.close()
        keeper.ended()
        assert keeper.held == 450
        again, _memory = keeper.hand_over()
        found = received(again)
        assert len(found) == 450
        for connection in found:
            connection.close()
        again.close()

    kept(work, slots=512)


def test_keepers_outlive_changes_of_the_plan(clients: Clients) -> None:
    async def run() -> None:
        made = Keepers(lambda name, told: None)
        first = made.of("proxy", 4)
        assert first is not None
        assert made.of("proxy", 9) is first
        assert first.slots == 9
        assert made.of("other", 0) is None
        channel, _memory = first.hand_over()
        _, served = clients.connect()
        keep(channel, served)
        await until(lambda: first.held == 1)
        assert made.of("proxy", 3) is first
        assert first.slots == 9, "a change waits until it keeps nothing"
        assert made.of("proxy", 0) is None
        assert first.held == 0
        channel.close()
        with suppress(OSError):
            served.shutdown(socket.SHUT_RDWR)
        made.close()

    asyncio.run(run())
