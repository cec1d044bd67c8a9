"""The engines as the proxy sees them, over real sockets: who is there, who is stuck, and what becomes of calls."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl import adapters
from pdctl.adapters import Condition
from pdctl.adapters.builtin.dialect import BuiltinDialect
from pdctl.errors import PdctlError
from pdctl.latency import StepTimes, Work
from pdctl.net.http_client import Unreachable
from pdctl.net.openai.fields import KNOWN_FIELDS
from pdctl.proxy.engines import engine as engines
from pdctl.proxy.engines import fleet
from pdctl.proxy.engines import pool as pools
from pdctl.proxy.engines.engine import Engine, Ticket
from pdctl.proxy.engines.load import SharedLoads
from pdctl.proxy.engines.outlook import Outlook, Room
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.engines.routing import POLICIES, Ask, EnginePair, choose
from pdctl.proxy.request import calls
from pdctl.proxy.request.failover import FailoverPolicy
from pdctl.proxy_wire import EngineAddress

_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Server:
    """Answers `quick` requests at once, the next after `slow_s` (None: never), and the others at once."""

    def __init__(self, quick: int, slow_s: float | None) -> None:
        self.probes = 0
        self.probed_twice = asyncio.Event()
        self.connections: set[asyncio.Task[object]] = set()
        self._quick, self._slow_s = quick, slow_s

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.probes += 1
                if self.probes == 2:
                    self.probed_twice.set()
                if self._slow_s is None and self.probes > self._quick:
                    await reader.read()
                elif self._slow_s is not None and self.probes == self._quick + 1:
                    await asyncio.sleep(self._slow_s)
                writer.write(_OK)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def proven(server: Server) -> bool:
    """Whether the server's engine, healthy and with a slow probe running, proves that it is alive."""
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    pool = EnginePool.of([EngineAddress("d0", "decode", "vllm", "127.0.0.1", port)])
    watching = asyncio.ensure_future(pool.watch_forever())
    try:
        engine = pool.engines[0]
        async with asyncio.timeout(120):
            await server.probed_twice.wait()
            assert engine.healthy, "it has answered the first"
            return await pool.is_proven(engine, time.monotonic())
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        pool.close()
        listening.close()
        await asyncio.wait(server.connections, timeout=60)


def test_a_slow_probe_under_way_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_PROBE_TIMEOUT_S", 60.0)
    assert asyncio.run(proven(Server(quick=1, slow_s=2.5)))


def test_one_that_answers_no_more_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_PROBE_TIMEOUT_S", 0.3)
    assert not asyncio.run(proven(Server(quick=1, slow_s=None)))


STATE = {"blocks_total": 9, "blocks_free": 4, "block_size": 16, "max_num_seqs": 8, "links": []}


class Served:
    """An engine that answers probes with `state`, with silence where that is None, and other calls with a head and
    nothing more. `came`: a call is here; `probed`: a probe."""

    def __init__(self) -> None:
        self.state: object = STATE
        self.came = asyncio.Event()
        self.probed = asyncio.Event()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[object]] = set()

    def address(self, name: str = "d0", role: str = "decode", slot: int = 0) -> EngineAddress:
        return EngineAddress(name, role, "builtin", "127.0.0.1", self.port, slot=slot)

    async def start(self) -> None:
        """Listen, at the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._connections.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if b"/state" not in head:
                    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                    self.came.set()
                    continue
                self.probed.set()
                if self.state is None:
                    continue
                data = msgspec.json.encode(self.state)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(count: int = 1) -> AsyncIterator[list[Served]]:
    served = [Served() for _ in range(count)]
    for each in served:
        await each.start()
    try:
        yield served
    finally:
        for each in served:
            await each.stop()
        await asyncio.sleep(0)  # transports close in the loop's next turn


@asynccontextmanager
async def watched(pool: EnginePool) -> AsyncIterator[None]:
    """The pool at work, all its engines healthy."""
    watching = asyncio.ensure_future(pool.watch_forever())
    try:
        await all_healthy(pool)
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        pool.close()


async def all_healthy(pool: EnginePool) -> None:
    while not all(engine.healthy for engine in pool.engines):
        await pool.wait_for_change(60.0)


async def call(engine: Engine, served: Served, patience_s: float = 600.0, streaming: bool = False) -> asyncio.Task[str]:
    """A call that has its head and gets nothing more; it ends with the reason for which it was cut."""
    ticket = Ticket(engine.client.exchange("POST", "/v1/completions", body=b""), patience_s, streaming)
    engine.tickets.add(ticket)

    async def run() -> str:
        try:
            await ticket.exchange.head()
            return repr(await ticket.exchange.rest())
        except Unreachable as failure:
            return str(failure)
        finally:
            engine.tickets.discard(ticket)
            ticket.exchange.close()

    task, came = asyncio.ensure_future(run()), asyncio.ensure_future(served.came.wait())
    # On a slow machine it may be cut before the server has seen it.
    await asyncio.wait((task, came), return_when=asyncio.FIRST_COMPLETED)
    came.cancel()
    served.came.clear()
    return task


async def ended(*calls: asyncio.Task[str]) -> None:
    for each in calls:
        each.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


def idle(*addresses: EngineAddress, usable: bool = True, predicts: bool = False) -> EnginePool:
    """A pool that nobody watches."""
    pool = EnginePool.of(addresses, predicts=predicts)
    for engine in pool.engines:
        engine.healthy = usable
        engine.condition = Condition(usable)
    return pool


def at(name: str, role: str, kind: str = "builtin", slot: int = 0) -> EngineAddress:
    return EngineAddress(name, role, kind, "127.0.0.1", 9 + slot, slot=slot)


class TestFollow:
    def test_another_role_keeps_the_engine_and_its_calls(self) -> None:
        async def main() -> None:
            async with serving(2) as (one, two):
                pool = EnginePool.of([one.address("a", "prefill"), two.address("b", "decode", 1)])
                async with watched(pool):
                    before = list(pool.engines)
                    running = await call(pool.by_name["a"], one)
                    assert pool.only_pair() == EnginePair("a", "b")
                    pool.follow([one.address("a", "decode"), two.address("b", "prefill", 1)], [], predicts=False)
                    assert pool.engines == before
                    assert pool.by_name["a"].address.role == "decode"
                    assert pool.only_pair() == EnginePair("b", "a")
                    assert (before[0].lives, before[0].healthy) == (1, True)
                    await asyncio.sleep(0)
                    assert not running.done()
                    await ended(running)

        asyncio.run(main())

    def test_another_port_is_another_engine_and_calls_at_the_old_one_are_cut(self) -> None:
        async def main() -> None:
            async with serving(2) as (old, new):
                pool = EnginePool.of([old.address()])
                async with watched(pool):
                    before = pool.by_name["d0"]
                    watch = pool._watches[before]
                    running = await call(before, old)
                    pool.follow([new.address()], [], predicts=False)
                    assert await running == "d0 is no longer part of the service"
                    assert not before.healthy
                    assert pool.by_name["d0"] is not before
                    assert set(pool._watches) == set(pool.engines)
                    await asyncio.wait([watch])
                    assert watch.cancelled(), "nobody asks the old one again"
                    await all_healthy(pool)
                    assert new.probed.is_set()

        asyncio.run(main())

    def test_an_engine_that_is_added_is_used_once_it_answers(self) -> None:
        async def main() -> None:
            async with serving(2) as (one, two):
                pool = EnginePool.of([one.address("a")])
                async with watched(pool):
                    pool.follow([one.address("a"), two.address("b", slot=1)], [], predicts=False)
                    assert [view.usable for view in pool.views()] == [True, False]
                    await all_healthy(pool)
                    assert [view.usable for view in pool.views()] == [True, True]
                    assert pool.only_pair() is None

        asyncio.run(main())

    def test_a_secret_that_cannot_be_read_changes_nothing(self, tmp_path: Path) -> None:
        pool = idle(at("a", "prefill"))
        before = pool.engines
        new = EngineAddress("b", "decode", "vllm", "127.0.0.1", 9, secret_file=str(tmp_path / "missing"))
        with pytest.raises(PdctlError, match="missing cannot be read"):
            pool.follow([new], [], predicts=True)
        assert pool.engines is before
        assert pool.engines[0].healthy
        assert set(pool.by_name) == {"a"}

    def test_each_engine_is_told_the_secret_that_is_its_own(self, tmp_path: Path) -> None:
        file = tmp_path / "key"
        file.write_text(" theirs\n")
        attached = EngineAddress("b", "decode", "vllm", "127.0.0.1", 9, secret_file=str(file))
        pool = EnginePool.of([at("a", "prefill"), attached], secret="ours")
        assert [engine.headers for engine in pool.engines] == [
            b"authorization: Bearer ours\r\n", b"authorization: Bearer theirs\r\n",
        ]  # fmt: skip

    def test_one_that_drains_gets_nothing_new_and_keeps_its_calls(self) -> None:
        async def main() -> None:
            async with serving() as (one,):
                pool = EnginePool.of([one.address()])
                async with watched(pool):
                    running = await call(pool.engines[0], one)
                    pool.follow([one.address()], ["d0"], predicts=False)
                    assert (pool.engines[0].healthy, pool.views()[0].usable, pool.only_pair()) == (True, False, None)
                    await asyncio.sleep(0)
                    assert not running.done()
                    pool.follow([one.address()], [], predicts=False)
                    assert pool.only_pair() == EnginePair("d0", "d0")
                    await ended(running)

        asyncio.run(main())


class TestWatch:
    def test_an_engine_that_is_down_ends_its_calls_and_comes_back_as_a_new_one(self) -> None:
        async def main() -> None:
            async with serving() as (one,):
                pool = EnginePool.of([one.address()])
                async with watched(pool):
                    engine = pool.engines[0]
                    for _ in range(4):
                        engine.breaker.failed(time.monotonic())
                    engine.prefixes.add([1], time.monotonic())
                    engine.handed_over("p0", time.monotonic(), time.monotonic(), good=False)
                    running = await call(engine, one)
                    life = engine.lives
                    await one.stop()
                    pool.suspect(engine)
                    assert (await running).startswith(("d0 is down: ", "127.0.0.1"))
                    while engine.healthy:
                        await asyncio.sleep(0)
                    assert engine.misses == 1, "a refused connection is an answer"
                    assert engine.has_died_since(life)
                    await one.start()
                    await all_healthy(pool)
                    assert engine.lives == life + 1
                    assert engine.has_died_since(life)
                    assert not engine.has_died_since(engine.lives)
                    assert engine.breaker.state == "closed"
                    assert (engine.prefixes.matched([1], time.monotonic()), engine.pair_losses) == (0.0, {})

        asyncio.run(main())

    def test_one_slow_probe_is_no_death_and_four_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            async with serving() as (one,):
                pool = EnginePool.of([one.address()])
                async with watched(pool):
                    engine = pool.engines[0]
                    running = await call(engine, one)
                    one.state = None
                    assert "did not answer within 0.1 s" in await running
                    assert engine.misses == 4

        monkeypatch.setattr(pools, "_HEALTHY_S", 0.0)
        monkeypatch.setattr(pools, "_PROBE_TIMEOUT_S", 0.1)
        asyncio.run(main())

    def test_an_engine_that_says_it_cannot_serve_is_down(self) -> None:
        async def main() -> None:
            async with serving() as (one,):
                pool = EnginePool.of([one.address()])
                async with watched(pool):
                    running = await call(pool.engines[0], one)
                    one.state = {**STATE, "blocks_total": 0}
                    pool.suspect(pool.engines[0])
                    assert await running == "d0 is down: its probe failed"

        asyncio.run(main())

    def test_a_call_that_is_silent_for_longer_than_its_patience_is_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            async with serving() as (one,):
                pool = EnginePool.of([one.address()])
                async with watched(pool):
                    engine = pool.engines[0]
                    patient = await call(engine, one)
                    assert (await (await call(engine, one, patience_s=0.0))).startswith("d0 sent nothing for ")
                    assert not patient.done()
                    assert engine.breaker.state == "closed", "others may be answered"
                    await ended(patient)

        monkeypatch.setattr(pools, "_WATCH_S", 0.01)
        asyncio.run(main())

    def test_streams_that_all_wait_are_cut_and_the_engine_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            async with serving() as (one,):
                pool = EnginePool.of([one.address()])
                async with watched(pool):
                    engine = pool.engines[0]
                    prefill = await call(engine, one)
                    streams = [await call(engine, one, streaming=True) for _ in range(2)]
                    for each in (*streams, prefill):
                        assert (await each).startswith("d0 produced no token for ")
                    assert engine.breaker.state == "open"
                    assert (engine.healthy, pool.views()[0].usable) == (True, False)

        monkeypatch.setattr(pools, "_WATCH_S", 0.01)
        monkeypatch.setattr(engines, "_STALL_S", (0.0, 0.0))
        asyncio.run(main())


@given(
    gap_s=st.floats(0.0, 5.0), silent_s=st.floats(0.0, 120.0), heard_s=st.floats(-10.0, 120.0),
    later_s=st.floats(0.0, 120.0),
)  # fmt: skip
def test_an_engine_is_stuck_after_many_of_its_own_gaps_within_bounds(
    gap_s: float, silent_s: float, heard_s: float, later_s: float
) -> None:
    """`heard_s`: when the last token of any stream came, after the first one began to wait; `later_s`: when the other
    one did."""
    [engine] = idle(at("d0", "decode")).engines
    began = time.monotonic()
    for streaming, since in ((True, began), (True, began + later_s), (False, began - 500.0)):
        ticket = Ticket(engine.client.exchange("POST", "/"), 600.0, streaming)
        ticket.exchange._opened_at = since
        engine.tickets.add(ticket)
    engine.gap_s, engine.heard_at = gap_s, began + heard_s
    limit = 5.0 if gap_s < 0.1 else min(60.0, 50 * gap_s)
    silent = silent_s - max(0.0, heard_s)
    if abs(silent - limit) < 1e-6:
        return
    found = engine.stuck_s(began + silent_s)
    assert found == (pytest.approx(silent) if silent > limit else None)
    for ticket in engine.tickets:
        ticket.streaming = False
    assert engine.stuck_s(began + 1000.0) is None, "a prefill has a patience of its own"


def test_an_engine_that_is_only_slow_gets_more_time_after_each_stall() -> None:
    """On a machine with far too much load, cutting every stream after five seconds would end in errors for clients."""
    [engine] = idle(at("d0", "decode")).engines
    ticket = Ticket(engine.client.exchange("POST", "/"), 600.0, streaming=True)
    began = ticket.exchange._opened_at = engine.heard_at = time.monotonic()
    engine.tickets.add(ticket)

    def limit() -> float:
        return next(seconds for seconds in range(1, 100) if engine.stuck_s(began + seconds + 0.01))

    found = []
    for _ in range(5):
        found.append(limit())
        engine.stalls += 1
    assert found == [5, 10, 20, 40, 60]
    engine.paced(0.01)
    assert engine.stalls == 4, "each stream that goes well counts"
    engine.renewed()
    assert limit() == 5, "a new process begins anew"


def test_a_peer_is_lost_after_three_losses_and_for_longer_each_time() -> None:
    pool = idle(at("p0", "prefill"), at("d0", "decode", slot=1))
    engine, now = pool.by_name["d0"], time.monotonic()
    for count, pause_s in ((1, 0.0), (2, 0.0), (3, 5.0), (4, 10.0), (5, 15.0)):
        engine.handed_over("p0", now, now, good=False)
        assert engine.lost_peers(now + 0.01) == (frozenset({"p0"}) if pause_s else frozenset()), count
        assert engine.lost_peers(now + pause_s - 0.01 if pause_s else now) == engine.lost_peers(now + 0.01)
        assert engine.lost_peers(now + pause_s + 0.01) == frozenset()
    assert pool.only_pair() is None
    assert pool.views()[1].lost == {"p0"}
    engine.condition = Condition(True, lost_peers=frozenset({"p9"}))
    assert engine.lost_peers(now) == {"p0", "p9"}
    engine.handed_over("p0", now, now, good=True)
    assert engine.lost_peers(now) == {"p9"}


def test_hand_overs_that_are_lost_together_count_once_and_no_pause_is_endless() -> None:
    pool = idle(at("p0", "prefill"), at("d0", "decode", slot=1))
    engine, now = pool.by_name["d0"], time.monotonic()
    for late_s in range(20):
        engine.handed_over("p0", now - 1.0, now + late_s / 100, good=False)
    assert engine.lost_peers(now + 0.3) == frozenset()
    for _ in range(50):
        engine.handed_over("p0", now + 1.0, now + 1.0, good=False)
    assert engine.lost_peers(now + 60.9) == {"p0"}
    assert engine.lost_peers(now + 61.1) == frozenset()


class TestOutlook:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Seats and room are looked at each time."""
        monkeypatch.setattr(fleet, "_ROOM_S", -1.0)

    def pool(self, *conditions: tuple[str, int | None, int | None], predicts: bool = False) -> EnginePool:
        """Engines of these roles, seats and tokens of room."""
        made = idle(*(at(f"e{n}", role, slot=n) for n, (role, _, _) in enumerate(conditions)), predicts=predicts)
        for engine, (_, seats, room) in zip(made.engines, conditions, strict=True):
            engine.condition = Condition(True, seats, room)
        return made

    def test_seats_are_those_of_engines_that_decode(self) -> None:
        pool = self.pool(("prefill", 100, 100), ("decode", 8, 100), ("hybrid", 4, 100))
        assert pool.outlook(0.0, 0).seats == 12
        pool.engines[1].draining = True
        assert pool.outlook(0.0, 0).seats == 4
        pool.engines[2].healthy = False
        assert pool.outlook(0.0, 0).seats == 100, "with none that decodes, the others compute it all"

    def test_one_engine_that_does_not_say_makes_the_sum_unknown(self) -> None:
        assert self.pool(("decode", 8, 100), ("decode", None, 100)).outlook(0.0, 0).seats is None
        assert self.pool(("decode", 8, 100), ("decode", 8, None)).outlook(1e9, 10**9).kv_room

    def test_room_is_needed_in_one_engine_for_prompt_and_output(self) -> None:
        pool = self.pool(("decode", 8, 60), ("decode", 8, 50))
        assert pool.outlook(90.0, 30).kv_room
        assert not pool.outlook(90.0, 31).kv_room
        assert not pool.outlook(183.0, None).kv_room

    def test_nobody_there_is_no_reason_to_refuse(self) -> None:
        pool = self.pool(("decode", 8, 60))
        pool.engines[0].healthy = False
        assert pool.outlook(1e9, 10**9) == Outlook(None, 0.0, tokens=pool.tokens_of(1e9))

    def test_the_first_token_is_predicted_where_that_is_wanted(self) -> None:
        pool = self.pool(("prefill", 8, 60), ("prefill", 8, 60), ("decode", 8, 60), predicts=True)
        for engine, speed, pending in zip(pool.engines, (10.0, 20.0, 1000.0), (100.0, 300.0, 0.0), strict=True):
            engine.prompts.speed, engine.prompts.pending = speed, pending
        assert pool.outlook(50.0, 0).ttft_s == 15.0
        pool.engines[0].healthy = False
        assert pool.outlook(50.0, 0).ttft_s == 17.5
        pool.engines[1].prompts.speed = 0.0
        assert pool.outlook(50.0, 0).ttft_s == 0.0, "not known yet"
        pool.follow([engine.address for engine in pool.engines], [], predicts=False)
        pool.engines[1].prompts.speed = 20.0
        assert pool.outlook(50.0, 0).ttft_s == 0.0

    def test_what_other_workers_have_at_an_engine_counts(self, tmp_path: Path) -> None:
        addresses = [at("p0", "prefill"), at("d0", "decode", slot=1)]
        tables = [SharedLoads(tmp_path / "loads", 2, 2, worker) for worker in (0, 1)]
        ours, theirs = (EnginePool.of(addresses, shared=table, predicts=True) for table in tables)
        for engine in ours.engines:
            engine.healthy, engine.condition = True, Condition(True, 8, 100)
        for pool, streams in ((ours, 2), (theirs, 3)):
            for engine in pool.engines:
                engine.prompts.speed, engine.prompts.pending = 10.0, 100.0
                for _ in range(streams):
                    engine.streams.begin(1.0, 0.0)
                pool.publish(engine)
        assert ours.outlook(0.0, 0) == Outlook(5, 10.0, prompts=4096.0, prefills=1)
        assert [view.streams.pending for view in ours.views()] == [5.0, 5.0]
        for _ in range(20):
            theirs.engines[1].streams.begin(1.0, 0.0)
        theirs.publish(theirs.engines[1])
        assert ours.outlook(0.0, 0).seats == 1, "one is always left"
        # One that was dropped still ends its calls; its place in the table is another's by then.
        dropped = theirs.engines[1]
        theirs.follow([addresses[0], at("d1", "decode", slot=1)], [], predicts=True)
        dropped.streams.begin(1.0, 0.0)
        theirs.publish(dropped)
        assert ours.views()[1].streams.pending == 2.0


def test_seats_and_room_are_not_looked_at_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_ROOM_S", 600.0)
    pool = idle(at("d0", "decode"))
    pool._room_at, pool._room = time.monotonic(), Room(3, 10, 700.0, 1)
    assert pool.outlook(30.0, 1) == Outlook(3, 0.0, kv_room=False, tokens=10.0, prompts=700.0, prefills=1)
    assert pool.outlook(30.0, 0).kv_room
    assert pool.tokens_of(30.0) == 10.0


def test_two_steps_of_prompts_keep_an_engine_busy() -> None:
    pool = idle(at("p0", "prefill"), at("p1", "prefill", slot=1), at("d0", "decode", slot=2))
    pool.engines[0].condition = Condition(True, work=Work(StepTimes((0.01, 0.0, 0.0, 0.0, 0.0)), 512))
    found = pool.outlook(0.0, None)
    assert (found.prompts, found.prefills) == (2 * 512 + 2 * 2048.0, 2)


def test_fields_are_known_where_an_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(BuiltinDialect):
        def known_fields(self, path: str) -> frozenset[str] | None:
            return frozenset({"prompt", "of_its_own"})

    path = "/v1/completions"
    pool = idle(at("a", "hybrid", "vllm"))
    assert pool.known_fields(path) is None
    pool.follow([at("a", "hybrid", "vllm"), at("b", "hybrid", slot=1)], [], predicts=False)
    assert pool.known_fields(path) == KNOWN_FIELDS[path]
    module = ModuleType("_other_engines.dialect")
    monkeypatch.setattr(module, "DIALECT", Other(), raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(adapters, "_registry", lambda: {**adapters._REGISTRY, "other": "_other_engines"})
    pool.follow([at("b", "hybrid", slot=1), at("c", "hybrid", "other", slot=2)], [], predicts=False)
    assert pool.known_fields(path) == frozenset({"prompt"}), "a request may come to any of them"


@pytest.mark.parametrize(
    ("engines", "pair"),
    [
        ([at("a", "hybrid")], ("a", "a")),
        ([at("a", "decode"), at("b", "prefill")], ("b", "a")),
        ([at("a", "prefill"), at("b", "prefill")], None),
        ([at("a", "hybrid"), at("b", "decode")], None),
        ([at("a", "prefill"), at("b", "decode", "vllm")], None),
        ([at("a", "prefill"), at("b", "decode"), at("c", "decode")], None),
    ],
)
def test_where_there_is_one_pair_it_is_the_choice(engines: list[EngineAddress], pair: tuple[str, str] | None) -> None:
    assert idle(*engines).only_pair() == (EnginePair(*pair) if pair else None)
    assert idle(*engines, usable=False).only_pair() is None


def test_prompts_from_the_cache_do_not_shorten_what_is_expected_of_an_engine() -> None:
    pool = EnginePool.of([EngineAddress("p0", "prefill", "builtin", "127.0.0.1", 1)])
    engine = pool.engines[0]
    assert pool.predicted_s(engine) == 0.0, "nothing predicts it yet"
    # A second for 1,000 tokens.
    engine.condition = Condition(True, work=Work(StepTimes((0.0, 1e-3, 0.0, 0.0, 0.0)), 512))
    engine.prompts.begin(30_000.0, 0.0)
    engine.prompts.end(30_000.0, 0.01, done=True)
    engine.prompts.begin(9_000.0, 1.0)
    assert engine.prompts.pending / engine.prompts.speed < 0.01, "it was fast, with prompts that it had"
    assert pool.predicted_s(engine) == pytest.approx(3.0)
    leg = SimpleNamespace(in_one_piece=False, shared=SimpleNamespace(pool=pool, failover=FailoverPolicy()))
    assert calls._patience_s(leg, engine) == pytest.approx(30.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ago_s", "known"), [(31.0, False), (20.0, True)])
def test_an_engine_that_was_slow_once_is_tried_again(ago_s: float, known: bool) -> None:
    pool = idle(at("p0", "prefill"), at("p1", "prefill", slot=1), at("d0", "decode", slot=2))
    now = time.monotonic()
    for engine, took_s, end in ((pool.engines[0], 20.0, now - ago_s), (pool.engines[1], 0.1, now)):
        engine.prompts.begin(100.0, end - took_s)
        engine.prompts.end(100.0, end, True)
        engine.prefill_s.add(took_s)
    views = pool.views()
    assert (views[0].prompts.speed > 0) == known
    assert (views[0].prefill_s.samples > 0) == known
    assert pool.expected_s(pool.engines[0]) == 0.0, "how long it may take is known all the same"
    chosen = {choose(POLICIES["min_expected_latency"], views, Ask(100.0, number, 0.0, 1.0, 1.0)) for number in range(4)}
    assert ({pair.prefill for pair in chosen if pair} == {"p1"}) == known


def test_a_proxy_that_stood_still_blames_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_STALL_S", (0.3, 60.0))

    async def work() -> None:
        pool = idle(at("d0", "decode"))
        [engine] = pool.engines
        ticket = Ticket(engine.client.exchange("POST", "/"), 0.3, streaming=True)
        watching = asyncio.ensure_future(pool._watch_calls())
        await asyncio.sleep(pools._WATCH_S / 2)  # it has begun to wait
        ticket.exchange._opened_at = engine.heard_at = time.monotonic()
        engine.tickets.add(ticket)
        time.sleep(1.5)  # this loop stands still
        for _ in range(10):
            await asyncio.sleep(0)
        before = (engine.stalls, ticket.exchange._cut)
        async with asyncio.timeout(60):
            while not engine.stalls:
                await asyncio.sleep(0.01)
        assert before == (0, None)
        assert ticket.exchange._cut is not None, "an engine that stays silent is blamed"
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        pool.close()

    asyncio.run(work())
