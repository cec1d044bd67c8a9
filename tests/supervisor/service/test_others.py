"""Engines of other nodes in this node's calls, over real sockets: linked, told of deaths, released, routed to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from pdctl.adapters import Ability
from pdctl.supervisor.cluster.entries import DRAINING, EngineEntry
from pdctl.supervisor.service.kv import KvWatch, Member
from pdctl.supervisor.service.others import Others, OthersKeeper
from tests.news import News

pytestmark = pytest.mark.anyio


class Front(News):
    """An engine's front that answers everything. `calls`: path and body of each, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.port = 0
        self.calls: list[tuple[str, dict[str, object]]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
                body = await reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)
                path = head.split()[1].decode()
                call = msgspec.json.decode(body) if body else {}
                self.calls.append((path, call))
                self.tell()
                writer.write(_answer(path, call))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def linked(self) -> list[str]:
        """The peers that it was told to link to."""
        return [peer["name"] for path, call in self.calls if path.endswith("links") for peer in call["peers"]]  # type: ignore[attr-defined]

    def released(self) -> list[object]:
        """The holders whose leases it was told to end."""
        return [call["holder"] for path, call in self.calls if path.endswith("release")]


def _answer(path: str, call: dict[str, object]) -> bytes:
    if path.endswith("links"):
        peers = msgspec.convert(call["peers"], list[dict[str, object]])
        body = msgspec.json.encode({"links": [{"peer": peer["name"], "epoch": peer["epoch"]} for peer in peers]})
    else:
        body = b'{"released":1}'
    return b"HTTP/1.1 200 X\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class Rig:
    """This node has decode-0 and prefill-0; `far`: what the registry tells of other nodes."""

    def __init__(self, fronts: dict[str, Front]) -> None:
        self.fronts = fronts
        self.far: tuple[EngineEntry, ...] = ()
        self.told = News()
        self.tells = 0
        self.others = Others(lambda: self.far)
        own = [Member(name, "builtin", name[:-2], "127.0.0.1", fronts[name].port, "e1") for name in OWN]
        self.kv = KvWatch(
            "secret", lambda: own, lambda: {m.holder for m in own} | self.others.holders(), lambda name, message: None,
            remote=self.others.members,
        )  # fmt: skip
        self.keeper = OthersKeeper(self.others, self.kv, self._tell)

    async def _tell(self) -> None:
        self.tells += 1
        self.told.tell()

    def entry(self, name: str, epoch: str = "e1", state: str = "ready") -> EngineEntry:
        port = self.fronts[name].port
        return EngineEntry("b", name, "builtin", name[:-2], "127.0.0.1", port, epoch, state)

    async def hears(self, *entries: EngineEntry) -> None:
        self.far = entries
        before = self.tells
        self.keeper.changed()
        await self.told.until(lambda: self.tells > before)


OWN, FAR = ("decode-0", "prefill-0"), ("decode-1", "prefill-1")


@asynccontextmanager
async def running() -> AsyncIterator[Rig]:
    fronts = {name: Front() for name in (*OWN, *FAR)}
    servers = []
    for front in fronts.values():
        servers.append(await asyncio.start_server(front.serve, "127.0.0.1", 0))
        front.port = servers[-1].sockets[0].getsockname()[1]
    rig = Rig(fronts)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(rig.keeper.run_forever())
        yield rig
        task.cancel()
    rig.kv.close()
    for server in servers:
        server.close()


async def test_readers_of_this_node_are_linked_to_servers_of_others_and_no_others() -> None:
    async with running() as rig:
        await rig.hears(rig.entry("prefill-1"), rig.entry("decode-1"))
        await rig.fronts["decode-0"].until(lambda: rig.fronts["decode-0"].linked() == ["prefill-1"])
        await rig.hears(rig.entry("prefill-1", "e2"), rig.entry("decode-1"))
        await rig.fronts["decode-0"].until(lambda: rig.fronts["decode-0"].linked() == ["prefill-1"] * 2)
    assert [rig.fronts[name].linked() for name in ("prefill-0", *FAR)] == [[], [], []]


async def test_a_death_here_is_told_to_engines_of_other_nodes_directly() -> None:
    async with running() as rig:
        await rig.hears(rig.entry("prefill-1"))
        await rig.kv.reclaim("decode-0", "decode-0@e1")
    assert rig.fronts["prefill-1"].released() == ["decode-0@e1"]
    assert rig.fronts["prefill-0"].released() == ["decode-0@e1"]
    assert rig.fronts["decode-0"].released() == []


async def test_holders_of_other_nodes_that_are_gone_are_released_here_only() -> None:
    async with running() as rig:
        await rig.hears(rig.entry("prefill-1"))
        rig.keeper.release(["decode-1@e1", "proxy@e7"])
        front = rig.fronts["prefill-0"]
        await front.until(lambda: sorted(map(str, front.released())) == ["decode-1@e1", "proxy@e7"])
    assert rig.fronts["prefill-1"].released() == []


async def test_proxies_are_holders_but_no_engines_and_an_unknown_kind_is_left_out() -> None:
    async with running() as rig:
        proxy = EngineEntry("b", "proxy", "proxy", "proxy", "127.0.0.1", 1, "e3")
        strange = EngineEntry("b", "decode-9", "of-tomorrow", "decode", "127.0.0.1", 1, "e1")
        drained = rig.entry("decode-1", state=DRAINING)
        await rig.hears(proxy, strange, drained)
        assert [address.name for address in rig.others.addresses()] == ["decode-1"]
        assert rig.others.draining() == {"decode-1"}
        assert {"proxy@e3", "decode-1@e1"} <= rig.others.holders()
        assert [m.name for m in rig.others.members() if Ability.STATE in m.control.abilities] == ["decode-1"]
