"""What a proxy tells the keeper reaches it, also when the keeper is busy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

from pdctl.net.keeping import DROP, REPORT, UNCOVERED, Packet, TakenOver, channel, receive, send
from pdctl.proxy.takeover.covers import Covers
from pdctl.proxy.takeover.journal import Journal


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, Covers]]:
    keeper, proxy = channel()
    memory = os.memfd_create("pdctl-test")
    try:
        yield keeper, Covers(Journal(memory, 1), proxy)
    finally:
        os.close(memory)
        keeper.close()
        proxy.close()


def filled(proxy: socket.socket) -> int:
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            send(proxy, UNCOVERED, bytes(8))
            sent += 1
    return sent


async def told(keeper: socket.socket, count: int) -> list[Packet]:
    found: list[Packet] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            try:
                packet = receive(keeper)
            except BlockingIOError:
                await asyncio.sleep(0)
                continue
            assert packet is not None
            if packet.kind != UNCOVERED:
                found.append(packet)
    return found


def test_a_report_that_finds_the_keeper_busy_is_told_later() -> None:
    """Without it the keeper would end the connections of healthy clients after a minute."""
    async def main(keeper: socket.socket, covers: Covers) -> None:
        assert covers.keeper is not None
        assert filled(covers.keeper)
        covers.drop(7)
        covers.report(TakenOver(connections=3))
        covers.drop(8)
        found = await told(keeper, 3)
        assert [packet.kind for packet in found] == [DROP, REPORT, DROP]
        assert b'"connections":3' in found[1].body

    with connected() as ends:
        asyncio.run(main(*ends))


def test_a_report_to_a_supervisor_that_is_gone_is_dropped() -> None:
    async def main(keeper: socket.socket, covers: Covers) -> None:
        keeper.close()
        covers.report(TakenOver())
        covers.drop(1)
        assert covers.keeper is None

    with connected() as ends:
        asyncio.run(main(*ends))
