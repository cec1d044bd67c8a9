"""What a node tells the registry, over the one in memory: its engines, their ends, and itself again after a loss."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from pdctl.registry import Change, Listing, Put, Unavailable
from pdctl.supervisor.cluster.entries import GONE, EngineEntry, Keys, NodeEntry, engine_of
from pdctl.supervisor.cluster.presence import Presence
from tests.news import News
from tests.registry.late import LateRegistry

pytestmark = pytest.mark.anyio
KEYS = Keys("service")


def engine(name: str, state: str = "ready") -> EngineEntry:
    return EngineEntry("a", name, "builtin", "decode", "10.0.0.1", 8000, "e1", state)


class Rig(News):
    """A registry, one node, and what a watcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = LateRegistry()
        self.engines: list[EngineEntry] = []
        self.states: list[str | None] = []
        self.seen: list[tuple[str, str | None]] = []
        self.presence = self.node("boot-1")

    def node(self, boot: str) -> Presence:
        node = NodeEntry("a", "10.0.0.1", boot, "1")
        return Presence(self.registry, KEYS, node, 30, lambda: self.engines, self.state)

    def state(self, failure: str | None) -> None:
        self.states.append(failure)
        self.tell()

    def changed(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            entry = engine_of(change.entry) if change.entry is not None else None
            self.seen.append((change.key.removeprefix(KEYS.engines), entry.state if entry else None))
        self.tell()


@asynccontextmanager
async def running() -> AsyncIterator[Rig]:
    rig = Rig()
    async with asyncio.TaskGroup() as tasks:
        started = [
            tasks.create_task(rig.registry.watch(KEYS.engines, 0, rig.changed)),
            tasks.create_task(rig.presence.run_forever()),
        ]
        yield rig
        for task in started:
            task.cancel()


async def test_engines_are_told_when_they_change_and_gone_before_they_are_deleted() -> None:
    async with running() as rig:
        await rig.until(lambda: rig.states == [None])
        rig.engines = [engine("decode-0"), engine("decode-1")]
        rig.presence.changed()
        await rig.until(lambda: len(rig.seen) == 2)
        rig.engines = [engine("decode-1", "draining")]
        rig.presence.changed()
        await rig.until(lambda: len(rig.seen) == 5)
        assert rig.seen == [
            ("a/decode-0", "ready"), ("a/decode-1", "ready"),
            ("a/decode-1", "draining"), ("a/decode-0", GONE), ("a/decode-0", None),
        ]  # fmt: skip


async def test_a_lost_lease_is_replaced_and_everything_told_again() -> None:
    async with running() as rig:
        rig.engines = [engine("decode-0")]
        await rig.until(lambda: rig.seen == [("a/decode-0", "ready")])
        [node] = (await rig.registry.list(KEYS.nodes)).entries
        await rig.registry.revoke(node.lease)
        await rig.until(lambda: rig.seen[1:] == [("a/decode-0", None)])
        rig.presence.changed()
        await rig.until(lambda: rig.seen[2:] == [("a/decode-0", "ready")])
        assert next(state for state in rig.states if state).startswith("lease")
        await rig.until(lambda: rig.states[-1] is None)


async def test_a_node_that_leaves_says_that_its_engines_are_gone() -> None:
    async with running() as rig:
        rig.engines = [engine("decode-0")]
        await rig.until(lambda: rig.seen == [("a/decode-0", "ready")])
        await rig.presence.leave()
        await rig.until(lambda: rig.seen[1:] == [("a/decode-0", GONE), ("a/decode-0", None)])
        assert (await rig.registry.list(KEYS.all)).entries == ()


async def test_a_later_agent_of_the_node_takes_its_key_over_and_another_machine_does_not() -> None:
    async with running() as rig:
        rig.engines = [engine("decode-0")]
        await rig.until(lambda: rig.seen == [("a/decode-0", "ready")])
        for boot, taken in (("boot-1", False), ("boot-2", True)):
            rig.states.clear()
            async with asyncio.TaskGroup() as tasks:
                later = tasks.create_task(rig.node(boot).run_forever())
                await rig.until(lambda: bool(rig.states))
                later.cancel()
            assert ("another machine is registered as node 'a'" in (rig.states[0] or "")) == taken
        [node] = (await rig.registry.list(KEYS.nodes)).entries
        assert msgspec.json.decode(node.value, type=NodeEntry).boot == "boot-1"


@pytest.mark.parametrize("value", [b"\xff", b"{}", b"[" * 9])
async def test_a_key_of_our_node_that_is_not_understood_is_told(value: bytes) -> None:
    rig = Rig()
    await rig.registry.write([Put(KEYS.node("a"), value)])
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(rig.presence.run_forever())
        await rig.until(lambda: bool(rig.states))
        task.cancel()
    assert rig.states[0] == "another machine is registered as node 'a': one with another version of pdctl"


async def test_a_write_of_an_agent_that_lost_its_node_changes_nothing() -> None:
    async with running() as rig:
        await rig.until(lambda: rig.states == [None])
        [node] = (await rig.registry.list(KEYS.nodes)).entries
        await rig.registry.revoke(node.lease)
        other = msgspec.json.encode(NodeEntry("a", "10.0.0.9", "boot-9", "1"))
        lease = await rig.registry.grant(30)
        await rig.registry.write([Put(KEYS.node("a"), other, lease)])
        rig.engines = [engine("decode-0")]
        rig.presence.changed()
        await rig.until(lambda: "another machine" in (rig.states[-1] or ""))
        assert rig.seen == []


@asynccontextmanager
async def unanswered(*engines: EngineEntry) -> AsyncIterator[Rig]:
    """A node whose decode-0 was ready, and which tells of these engines while its member of the registry is frozen."""
    async with running() as rig:
        rig.engines = [engine("decode-0")]
        await rig.until(lambda: rig.seen == [("a/decode-0", "ready")])
        rig.registry.is_frozen = True
        rig.engines = [*engines]
        rig.presence.changed()
        await rig.until(lambda: rig.states[-1] == "the member is frozen")
        yield rig


async def told(rig: Rig) -> list[bytes]:
    return [entry.value for entry in (await rig.registry.list(KEYS.engines)).entries]


@pytest.mark.parametrize("wanted", ["ready", "draining", None])
async def test_a_member_that_thaws_does_not_bring_back_what_was_before(wanted: str | None) -> None:
    async with unanswered(engine("decode-0", "stopping"), engine("decode-1")) as rig:
        rig.registry.is_frozen = False
        rig.engines = [engine("decode-0", wanted)] if wanted else []
        await rig.until(lambda: rig.states[-1] is None)
        expected = [msgspec.json.encode(one) for one in rig.engines]
        assert await told(rig) == expected
        await rig.registry.thaw()
        assert await told(rig) == expected


async def test_what_a_lost_answer_has_written_is_seen_and_mended() -> None:
    async with unanswered(engine("decode-0", "draining"), engine("decode-1")) as rig:
        await rig.registry.thaw()
        rig.engines = [engine("decode-0")]
        await rig.until(lambda: rig.states[-1] is None)
        assert await told(rig) == [msgspec.json.encode(engine("decode-0"))]
        assert ("a/decode-1", GONE) in rig.seen


async def test_what_a_lost_answer_has_written_is_mended_also_if_the_next_look_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with unanswered(engine("decode-0", "draining"), engine("decode-1")) as rig:
        look = rig.registry.list

        async def silent(prefix: str) -> Listing:
            if prefix.startswith(KEYS.engines):
                raise Unavailable("no answer")
            return await look(prefix)

        monkeypatch.setattr(rig.registry, "list", silent)
        await rig.registry.thaw()
        rig.engines = [engine("decode-0")]
        await rig.until(lambda: rig.states[-1] == "no answer")
        monkeypatch.undo()
        await rig.until(lambda: rig.states[-1] is None)
        assert await told(rig) == [msgspec.json.encode(engine("decode-0"))]
