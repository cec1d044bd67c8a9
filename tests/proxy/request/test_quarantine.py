"""Suspicion and quarantine: which request counts as the cause of deaths, and how long it is refused."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdctl.net.openai.api import ApiError
from pdctl.proxy.engines.engine import Engine, Ticket
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.request import quarantine as module
from pdctl.proxy.request.quarantine import Quarantine, Suspicion
from pdctl.proxy.shares.shared_bodies import SharedBodies
from pdctl.proxy_wire import EngineAddress

BODY = b'{"prompt":"hello"}'


def engines(count: int) -> list[Engine]:
    """Healthy engines without calls."""
    found = EnginePool.of([EngineAddress(f"d{n}", "decode", "builtin", "127.0.0.1", 1 + n) for n in range(count)])
    for engine in found.engines:
        engine.healthy = True
    return found.engines


def crowded(engine: Engine) -> Ticket:
    """Another request's call at `engine`."""
    ticket = Ticket(engine.client.exchange("POST", "/v1/completions"), 60.0)
    engine.tickets.add(ticket)
    return ticket


def die(engine: Engine) -> None:
    """A killed engine is replaced, as the pool records it."""
    engine.renewed()


def died_of(suspicion: Suspicion, engine: Engine, others: bool) -> None:
    """`engine` dies while it has the request and, if `others`, also another request."""
    if others:
        crowded(engine)
    suspicion.failed(engine)
    die(engine)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timeouts are too long to be reached: a test only ends when the event that it waits for happens."""
    monkeypatch.setattr(module, "_CERTAIN_S", 600.0)
    monkeypatch.setattr(module, "_TURN_S", 600.0)


@pytest.mark.usefixtures("patient")
class TestSuspicion:
    def test_one_death_says_nothing(self) -> None:
        async def main() -> None:
            suspicion = Suspicion(Quarantine())
            suspicion.failed(engines(1)[0])
            judging = asyncio.ensure_future(suspicion.judge(BODY))
            await asyncio.sleep(0)
            assert judging.done(), "and there is no wait to find out whether it died"
            assert not suspicion.holds_turn

        asyncio.run(main())

    def test_one_that_was_alone_in_both_deaths_is_caught(self) -> None:
        shared = Quarantine()
        suspicion = Suspicion(shared)
        for engine in engines(2):
            died_of(suspicion, engine, others=False)
        with pytest.raises(ApiError) as refused:
            asyncio.run(suspicion.judge(BODY))
        assert (refused.value.status, refused.value.kind) == (422, "request_quarantined")
        assert "2 engines died" in refused.value.message
        assert "10 minutes" in refused.value.message
        assert shared.count == 1
        with pytest.raises(ApiError, match="in quarantine"):
            shared.check(BODY)
        shared.check(BODY + b" ")

    @pytest.mark.parametrize("others", [(True, True), (False, True), (True, False)])
    def test_a_bystander_goes_on_when_its_turn_comes(self, others: tuple[bool, bool]) -> None:
        shared = Quarantine()
        suspicion = Suspicion(shared)
        for engine, crowd in zip(engines(2), others, strict=True):
            died_of(suspicion, engine, crowd)
        asyncio.run(suspicion.judge(BODY))
        assert suspicion.holds_turn
        assert shared.count == 0
        shared.check(BODY)

    def test_who_ends_last_in_a_dead_engine_was_not_alone_there(self) -> None:
        shared = Quarantine()
        first, last = Suspicion(shared), Suspicion(shared)
        for engine in engines(2):
            ticket = crowded(engine)
            first.failed(engine)  # `last` is still counted
            engine.tickets.discard(ticket)
            last.failed(engine)
            die(engine)
        assert [alone for _, _, alone in first.present + last.present] == [False] * 4

    def test_a_suspect_that_has_its_turn_is_alone_whoever_else_is_there(self) -> None:
        async def main() -> None:
            shared, there = Quarantine(), engines(4)
            suspicion = Suspicion(shared)
            for engine in there[:2]:
                died_of(suspicion, engine, others=True)
            await suspicion.judge(BODY)
            died_of(suspicion, there[2], others=True)
            await suspicion.judge(BODY)
            assert shared.count == 0, "one death is no proof"
            died_of(suspicion, there[3], others=True)
            with pytest.raises(ApiError):
                await suspicion.judge(BODY)

        asyncio.run(main())

    def test_a_token_clears(self) -> None:
        async def main() -> None:
            there = engines(2)
            suspicion = Suspicion(Quarantine())
            died_of(suspicion, there[0], others=False)
            suspicion.cleared()
            died_of(suspicion, there[1], others=False)
            await suspicion.judge(BODY)
            assert not suspicion.holds_turn

        asyncio.run(main())

    def test_an_engine_that_lives_is_waited_for_until_it_is_known_to_be_dead(self) -> None:
        async def main() -> None:
            there = engines(2)
            suspicion = Suspicion(Quarantine())
            for engine in there:
                suspicion.failed(engine)
            die(there[0])
            judging = asyncio.ensure_future(suspicion.judge(BODY))
            await asyncio.sleep(0)
            assert not judging.done()
            there[1].healthy = False  # an engine that does not answer counts as dead, like one that was replaced
            with pytest.raises(ApiError):
                await judging

        asyncio.run(main())

    def test_suspects_go_on_one_at_a_time(self) -> None:
        async def main() -> None:
            shared, there = Quarantine(), engines(4)
            first, second = Suspicion(shared), Suspicion(shared)
            for suspicion, pair in ((first, there[:2]), (second, there[2:])):
                for engine in pair:
                    died_of(suspicion, engine, others=True)
            await first.judge(BODY)
            waiting = asyncio.ensure_future(second.judge(BODY))
            await asyncio.sleep(0)
            assert (first.holds_turn, second.holds_turn, waiting.done()) == (True, False, False)
            first.cleared()
            await waiting
            assert (first.holds_turn, second.holds_turn) == (False, True)
            first.cleared()
            assert shared.one_at_a_time.locked(), "a suspect without the turn does not release it"
            second.cleared()
            assert not shared.one_at_a_time.locked()

        asyncio.run(main())


def test_lost_connections_are_no_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CERTAIN_S", 0.0)
    there = engines(3)
    suspicion = Suspicion(Quarantine())
    for engine in there[:2]:
        suspicion.failed(engine)
    die(there[0])
    asyncio.run(suspicion.judge(BODY))
    assert not suspicion.holds_turn, "one death and one lost connection"
    died_of(suspicion, there[2], others=True)
    asyncio.run(suspicion.judge(BODY))
    assert suspicion.holds_turn


def test_a_turn_that_does_not_come_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        shared, there = Quarantine(), engines(2)
        await shared.one_at_a_time.acquire()
        suspicion = Suspicion(shared)
        for engine in there:
            died_of(suspicion, engine, others=True)
        await suspicion.judge(BODY)
        assert not suspicion.holds_turn
        suspicion.cleared()
        assert shared.one_at_a_time.locked(), "another suspect has the turn"

    monkeypatch.setattr(module, "_TURN_S", 0.0)
    asyncio.run(main())


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0.0, 400.0)), max_size=40))
def test_the_newest_bodies_are_refused_for_their_time(puts: list[tuple[str, float]]) -> None:
    """Compare with a model without limits: the last time that each body was put."""
    with pytest.MonkeyPatch.context() as patch:
        now = 1000.0
        patch.setattr(module, "_MAX_REMEMBERED", 3)
        patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
        shared = Quarantine()
        last: OrderedDict[str, float] = OrderedDict()
        for name, pause_s in puts:
            shared.put(name.encode())
            last[name] = now
            last.move_to_end(name)
            now += pause_s
            for body in "abcdef":
                refused = body in list(last)[-3:] and now < last[body] + 600.0
                try:
                    shared.check(body.encode())
                except ApiError:
                    assert refused, (body, last, now)
                else:
                    assert not refused, (body, last, now)
        assert shared.count == len(puts)


def refuses(quarantine: Quarantine, body: bytes) -> bool:
    try:
        quarantine.check(body)
    except ApiError:
        return True
    return False


def test_a_body_that_one_proxy_found_is_refused_by_all_of_one_secret() -> None:
    one, other, stranger = Quarantine("secret"), Quarantine("secret"), Quarantine("another")
    one.put(BODY)
    bodies = one.found()
    assert list(bodies.values()) == [pytest.approx(600, abs=5)]
    for quarantine in (other, stranger):
        quarantine.told(bodies)
    assert refuses(other, BODY)
    assert not refuses(other, BODY + b" ")
    assert not refuses(stranger, BODY), "its digests are others"
    assert other.found() == {}, "what it was told is not told on"
    assert other.count == 0
    other.told({})
    assert not refuses(other, BODY)
    with pytest.raises(ValueError, match="hex"):
        other.told({"no digest": 5.0})


def test_what_is_told_is_limited_in_number_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 2)
    one, other = Quarantine(), Quarantine()
    for number in range(3):
        one.put(b"%d" % number)
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 1)
    first, second = one.found()
    other.told({first: 1e9, second: 5.0})
    assert refuses(other, b"1")
    assert not refuses(other, b"2")
    late = time.monotonic() + 600
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: late))
    assert not refuses(other, b"1")


def test_workers_refuse_what_one_of_them_found(tmp_path: Path) -> None:
    def worker(number: int) -> Quarantine:
        return Quarantine("secret", SharedBodies(tmp_path / "quarantine", 3, number))

    workers = [worker(number) for number in range(3)]
    assert not any(refuses(each, BODY) for each in workers)
    workers[1].put(BODY)
    assert all(refuses(each, BODY) for each in workers)
    assert [list(each.found()) for each in workers] == [list(workers[1].found())] * 3
    assert refuses(worker(1), BODY), "also after a restart"
    for number in range(300):
        workers[0].put(b"%d" % number)
    assert refuses(workers[2], b"299")
    assert not refuses(workers[2], b"0"), "only the newest of each worker"
    assert refuses(workers[2], BODY)
    [shared] = tmp_path.glob("quarantine*")
    shared.unlink()
    assert not refuses(worker(0), BODY)


@dataclass(eq=False)
class Suspect:
    """A request that became a suspect after two deaths, and its wait for a turn."""

    suspicion: Suspicion
    judging: asyncio.Task[None]


class Turns(RuleBasedStateMachine):
    """Suspects arrive, are cleared and leave in any order. At most one has the turn; none waits while it is free."""

    @initialize()
    def begin(self) -> None:
        self.limits = pytest.MonkeyPatch()
        self.limits.setattr(module, "_TURN_S", 600.0)
        self.runner = asyncio.Runner()
        self.shared = Quarantine()
        self.suspects: list[Suspect] = []

    def teardown(self) -> None:
        for suspect in self.suspects:
            suspect.judging.cancel()
        self._settle()
        self.runner.close()
        self.limits.undo()

    def _settle(self) -> None:
        """Run the loop a few times: for a release, the waiter's future and its task."""

        async def turns() -> None:
            for _ in range(6):
                await asyncio.sleep(0)

        self.runner.run(turns())

    @rule()
    def come(self) -> None:
        async def begin() -> Suspect:
            suspicion = Suspicion(self.shared)
            for engine in engines(2):
                died_of(suspicion, engine, others=True)
            return Suspect(suspicion, asyncio.ensure_future(suspicion.judge(BODY)))

        self.suspects.append(self.runner.run(begin()))
        self._settle()

    @precondition(lambda self: self.suspects)
    @rule(index=st.integers(0, 9))
    def end(self, index: int) -> None:
        """End like a relay: its wait is cancelled, then the suspicion is cleared."""
        suspect = self.suspects.pop(index % len(self.suspects))
        suspect.judging.cancel()
        if suspect.judging.done():
            suspect.suspicion.cleared()
        self._settle()

    @precondition(lambda self: self.suspects)
    @rule(index=st.integers(0, 9))
    def get_a_token(self, index: int) -> None:
        suspect = self.suspects[index % len(self.suspects)]
        if suspect.judging.done():
            suspect.suspicion.cleared()
            self.suspects.remove(suspect)
        self._settle()

    @invariant()
    def hold(self) -> None:
        holders = [suspect for suspect in self.suspects if suspect.suspicion.holds_turn]
        waiting = [suspect for suspect in self.suspects if not suspect.judging.done()]
        assert len(holders) <= 1
        assert len(holders) + len(waiting) == len(self.suspects)
        assert bool(holders) == self.shared.one_at_a_time.locked() == bool(self.suspects)


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=50, stateful_step_count=25)
