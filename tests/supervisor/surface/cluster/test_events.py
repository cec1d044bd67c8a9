"""The events of all nodes in one stream: by time, and nothing twice or left out, whoever breaks off meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from pdctl.control_api import ControlClient, Event
from pdctl.errors import PdctlError
from pdctl.supervisor.rundir.journal import EVENTS
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.surface.cluster import events as cluster_events
from pdctl.supervisor.surface.control import serve_control
from tests.supervisor.surface.cluster.nodes import Cluster, Part, cluster, process, start_agent

pytestmark = pytest.mark.anyio


@dataclass
class Asked:
    """A cluster, and a client of the control socket of its node a."""

    cluster: Cluster
    client: ControlClient

    async def events(self, count: int | None, cursor: str = "", follow: bool = True) -> list[Event]:
        """The next so many events; all that there are for None."""

        def read() -> list[Event]:
            with closing(self.client.events(cursor, follow)) as events:
                return list(events if count is None else islice(events, count))

        return await asyncio.to_thread(read)


@asynccontextmanager
async def asked(folder: Path, *nodes: str) -> AsyncIterator[Asked]:
    parts = [Part(folder, node, f"127.0.0.{10 + number}", process(f"{node}-0")) for number, node in enumerate(nodes)]
    run_dir = RunDir(folder / "r")
    run_dir.acquire()
    async with cluster(*parts) as found:
        serving = asyncio.create_task(serve_control(run_dir.control_socket, found.control))
        yield Asked(found, ControlClient(folder / "r"))
        serving.cancel()
        await asyncio.wait([serving])
    run_dir.release()


def write(part: Part, *events: tuple[str, str]) -> None:
    """Events as they stand in a journal: time and message."""
    part.journal.folder.mkdir(parents=True, exist_ok=True)
    with (part.journal.folder / EVENTS).open("a") as file:
        for at, message in events:
            file.write(json.dumps({"at": at, "process": "x", "event": "note", "message": message, "n": 1}) + "\n")


def told(events: list[Event]) -> list[str]:
    return [f"{event.node}{event.message}" for event in events]


async def test_what_was_is_merged_by_time(tmp_path: Path) -> None:
    async with asked(tmp_path, "a", "b", "c") as found:
        parts = found.cluster.parts
        write(parts["a"], ("01", "0"), ("04", "1"), ("09", "2"))
        write(parts["b"], ("02", "0"), ("03", "1"), ("08", "2"))
        write(parts["c"], ("00", "0"), ("05", "1"))
        expected = ["c0", "a0", "b0", "b1", "a1", "c1", "b2", "a2"]
        assert told(await found.events(None, follow=False)) == expected
        events = await found.events(8)
        assert told(events) == expected
        assert events[0].detail == {"n": 1}
        for number, event in enumerate(events):
            assert told(await found.events(None, event.cursor, follow=False)) == expected[number + 1 :]


async def test_long_pasts_of_nodes_are_read_as_the_reader_reads(tmp_path: Path) -> None:
    count = 3 * cluster_events._AHEAD
    async with asked(tmp_path, "a", "b") as found:
        for offset, part in enumerate(found.cluster.parts.values()):
            write(part, *((f"{2 * number + offset:06}", str(number)) for number in range(count)))
        assert told(await found.events(None, follow=False)) == [f"{n}{i}" for i in range(count) for n in "ab"]


async def test_what_happens_is_told_with_its_node(tmp_path: Path) -> None:
    async with asked(tmp_path, "a", "b") as found:
        write(found.cluster.parts["b"], ("01", "0"))
        reading = asyncio.create_task(found.events(3))
        before = await found.events(1)
        found.cluster.parts["a"].journal.say("x", "1")
        found.cluster.parts["b"].journal.say("x", "2")
        assert sorted(told(await reading)) == ["a1", "b0", "b2"]
        assert sorted(told(await found.events(2, before[0].cursor))) == ["a1", "b2"]


async def test_a_node_that_breaks_off_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_events, "_AGAIN_S", 0.1)
    async with asked(tmp_path, "a", "b") as found:
        b = found.cluster.parts["b"]
        events = found.client.events()
        for start in (0, 100, 200):
            for number in range(start, start + 50):
                b.journal.say("x", str(number))
            assert told(await following(events, 50)) == [f"b{number}" for number in range(start, start + 50)]
            await found.cluster.end("b")
            for number in range(start + 50, start + 100):
                b.journal.say("x", str(number))
            await start_agent(found.cluster, b)
            assert told(await following(events, 50)) == [f"b{number}" for number in range(start + 50, start + 100)]
        await asyncio.to_thread(events.close)


async def following(events: Generator[Event, None, None], count: int) -> list[Event]:
    return await asyncio.to_thread(lambda: list(islice(events, count)))


async def test_a_node_that_is_silent_keeps_nobody_waiting_and_tells_later(tmp_path: Path) -> None:
    async with asked(tmp_path, "a", "b") as found:
        a, b = found.cluster.parts.values()
        write(a, ("02", "0"))
        write(b, ("01", "0"))
        await found.cluster.end("b")
        events = await found.events(None, follow=False)
        assert told(events) == ["a0"]
        await start_agent(found.cluster, b)
        assert told(await found.events(1, events[0].cursor)) == ["b0"], "though it was before"


async def test_a_node_that_comes_later_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_events, "_LOOK_S", 0.01)
    async with asked(tmp_path, "a", "b") as found:
        found.cluster.known, known = [], found.cluster.known
        write(found.cluster.parts["a"], ("02", "0"))
        write(found.cluster.parts["b"], ("01", "0"))
        events = found.client.events()
        assert told(await following(events, 1)) == ["a0"]
        found.cluster.known = known
        assert told(await following(events, 1)) == ["b0"]
        await asyncio.to_thread(events.close)


async def test_what_is_no_cursor_is_refused(tmp_path: Path) -> None:
    async with asked(tmp_path, "a", "b") as found:
        for cursor in ("yesterday", "0123456789ab.7", "a:0123456789ab.7,", "a:0123456789ab"):
            with pytest.raises(PdctlError, match="is no cursor of a cluster"):
                await found.events(1, cursor)


async def test_the_end_of_an_agent_tells_the_last_of_it(tmp_path: Path) -> None:
    async with asked(tmp_path, "a", "b") as found:
        found.cluster.parts["a"].journal.say("x", "0")
        events = found.client.events()
        assert told(await following(events, 1)) == ["a0"]
        found.cluster.parts["a"].journal.say("x", "1")
        rest = asyncio.create_task(following(events, 9))
    assert told(await rest) == ["a1"]


async def test_the_socket_of_one_node_answers_for_all(tmp_path: Path) -> None:
    async with asked(tmp_path, "a", "b") as found:
        status = await asyncio.to_thread(found.client.status)
        assert [(one.node, one.name) for one in status.processes] == [("a", "a-0"), ("b", "b-0")]
        await asyncio.to_thread(found.client.act, "b/b-0", "restart", True)
        with pytest.raises(PdctlError, match="no process 'c-0'; known: a-0, b-0"):
            await asyncio.to_thread(found.client.act, "c-0", "restart")
        with pytest.raises(PdctlError, match="a topology is published instead"):
            await asyncio.to_thread(found.client.apply, found.cluster.here.plan)
    assert found.cluster.parts["b"].asked == ["restart b-0, drained"]
