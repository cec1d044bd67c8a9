"""The proxy's subscription to an engine's KV events, over real sockets: cut, gapped, repeated, restarted; it heals."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from pdctl.kv_events import Endpoints
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.prefixes import following, known, subscribing
from pdctl.proxy.engines.prefixes.blocks import names
from pdctl.proxy.engines.prefixes.following import follow_forever
from pdctl.proxy.engines.prefixes.subscribing import subscribe
from pdctl.proxy_wire import EngineAddress
from tests.fakes.kv_events import Cache, Publisher, serve

SIZE = 4
FIRST, SECOND, THIRD = ([number] * 12 for number in (1, 2, 3))


class Rig:
    """One engine, and the proxy's view of it."""

    def __init__(self, folder: Path) -> None:
        self.at = Endpoints(f"ipc://{folder}/e", f"ipc://{folder}/r")
        self.engine = Engine.of(EngineAddress("p0", "prefill", "vllm", "127.0.0.1", 1, kv_events=self.at), "s")
        self.engine.healthy, self.wanted = True, True
        self.cache = Cache(SIZE)
        self.publisher: Publisher | None = None
        self._serving: asyncio.Task[None] | None = None

    def start(self, kept: int = 10_000) -> None:
        """A new start of the engine, which has nothing."""
        self.cache, self.publisher = Cache(SIZE), Publisher(*self.at, kept=kept)
        self._serving = asyncio.create_task(serve(self.publisher))

    async def stop(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)

    def compute(self, *prompts: list[int]) -> None:
        assert self.publisher is not None
        for prompt in prompts:
            self.publisher.publish(self.cache.compute(prompt))

    @property
    def found(self) -> set[int]:
        return set(self.engine.prefixes.batches.index._names)

    @property
    def there(self) -> set[int]:
        return {list(names(SIZE, tokens))[-1] for tokens in self.cache.blocks.values()}

    async def begins(self, *prompts: list[int]) -> None:
        """The engine starts and computes, and that is known."""
        self.start()
        self.compute(*prompts)
        await self.heals()

    async def heals(self) -> None:
        """The proxy comes to know exactly what is there."""
        known = self.engine.prefixes
        await until(lambda: known._told_at is not None and known.batches.index.is_complete and self.found == self.there)
        known.batches.audit()


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0)


@asynccontextmanager
async def rig(folder: Path) -> AsyncIterator[Rig]:
    made = Rig(folder)
    task = asyncio.create_task(follow_forever(made.engine, subscribe, lambda: made.wanted))
    try:
        async with asyncio.timeout(60):
            yield made
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await made.stop()
        made.engine.client.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for long: what the tests check is what happens, not when."""
    monkeypatch.setattr(subscribing, "WAIT_S", 0.05)
    monkeypatch.setattr(subscribing, "_LATE_S", 1.0)
    monkeypatch.setattr(subscribing, "_LOOK_S", 0.01)
    monkeypatch.setattr(following, "_LOOK_S", 0.01)
    monkeypatch.setattr(following, "_FIRST_PAUSE_S", 0.01)


def run(work: Callable[[Rig], Coroutine[None, None, None]], folder: Path) -> None:
    async def within() -> None:
        async with rig(folder) as made:
            await work(made)

    uvloop.run(within())


def test_what_was_published_before_is_asked_for_and_what_comes_is_heard(tmp_path: Path) -> None:
    async def work(made: Rig) -> None:
        await made.begins(FIRST, SECOND)
        made.compute(THIRD, [*FIRST, 7, 7, 7, 7])
        await made.heals()
        assert made.publisher is not None
        made.publisher.publish(made.cache.drop(made.cache.chain(SECOND)[-1]))
        await made.heals()
        assert made.engine.prefixes.blocks == 9

    run(work, tmp_path)


def test_an_engine_that_has_published_nothing_has_nothing(tmp_path: Path) -> None:
    async def work(made: Rig) -> None:
        made.start()
        await made.heals()
        made.engine.prefixes.add([1, 2], 0.0)
        assert made.engine.prefixes.matched([1, 2], known._TOLD_WITHIN_S + 1.0) == 512.0, "its pieces are not tokenized"

    run(work, tmp_path)


@pytest.mark.parametrize("then", [[SECOND], []], ids=["a gap tells", "nothing tells"])
def test_a_batch_that_was_lost_is_asked_for(then: list[list[int]], tmp_path: Path) -> None:
    async def work(made: Rig) -> None:
        made.start()
        await made.heals()
        assert made.publisher is not None
        made.publisher.lost = 1
        made.compute(FIRST, *then)
        await made.heals()

    run(work, tmp_path)


def test_an_answer_with_gaps_is_asked_for_again_from_the_gap_on(tmp_path: Path) -> None:
    async def work(made: Rig) -> None:
        made.start()
        assert made.publisher is not None
        made.publisher.lost, made.publisher.holes = 9, {2, 3}
        made.compute(*([number] * 8 for number in range(8)))
        await made.heals()
        assert made.publisher.replays >= 2

    run(work, tmp_path)


def test_answers_that_always_have_gaps_are_no_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(made: Rig) -> None:
        made.start()
        assert made.publisher is not None
        made.publisher.holes, made.publisher.always = {1}, True
        with caplog.at_level("INFO"):
            made.compute(FIRST, SECOND, THIRD)
            await until(lambda: "its answers have gaps" in caplog.text)
        made.publisher.holes = set()
        await made.heals()

    run(work, tmp_path)


def test_batches_that_come_twice_count_once(tmp_path: Path) -> None:
    async def work(made: Rig) -> None:
        await made.begins(FIRST)
        assert made.publisher is not None
        made.publisher.publish(made.cache.drop(made.cache.chain(FIRST)[-1]))
        for _ in range(3):
            made.publisher.again(0)
        made.compute(SECOND)
        await made.heals()

    run(work, tmp_path)


def test_what_the_engine_does_not_keep_is_not_known_until_it_clears_all(tmp_path: Path) -> None:
    async def work(made: Rig) -> None:
        made.start(kept=2)
        made.compute(FIRST, SECOND, THIRD, [*FIRST, 7, 7, 7, 7])
        await until(lambda: made.engine.prefixes.blocks == 3)
        index = made.engine.prefixes.batches.index
        assert not index.is_complete
        assert made.found < made.there
        assert made.publisher is not None
        made.publisher.publish(made.cache.clear())
        await made.heals()

    run(work, tmp_path)


@pytest.mark.parametrize("more", [0, 1, 5], ids=["nothing yet", "fewer batches", "more batches"])
def test_of_an_engine_that_was_restarted_nothing_old_is_believed(more: int, tmp_path: Path) -> None:
    async def work(made: Rig) -> None:
        await made.begins(FIRST, SECOND)
        await made.stop()
        made.start()
        made.compute(*([10 + number] * 8 for number in range(more)))
        await made.heals()

    run(work, tmp_path)


def test_numbers_that_go_on_after_a_restart_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscribing, "WAIT_S", 100.0)

    async def work(made: Rig) -> None:
        await made.begins(FIRST, SECOND)
        await made.stop()
        made.start()
        assert made.publisher is not None
        made.publisher.lost = 2
        made.compute([10] * 8, [11] * 8)
        await made.publisher.subscribed()
        made.compute(THIRD)
        await made.heals()

    run(work, tmp_path)


def test_an_engine_that_was_away_is_asked_for_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscribing, "WAIT_S", 100.0)

    async def work(made: Rig) -> None:
        await made.begins(FIRST)
        made.engine.renewed()
        assert made.engine.prefixes.blocks == 0
        await made.heals()
        assert made.engine.prefixes.blocks == 3

    run(work, tmp_path)


def test_one_that_does_not_answer_is_not_believed_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscribing, "_LATE_S", 0.05)

    async def work(made: Rig) -> None:
        await made.begins(FIRST)
        assert made.publisher is not None
        made.publisher.silent = True
        await until(lambda: made.engine.prefixes._told_at is None)
        assert made.engine.prefixes.blocks == 0
        made.publisher.silent = False
        await made.heals()

    run(work, tmp_path)


@pytest.mark.parametrize("payload", [b"\xc1", b"\x92\x00\x91\x81\xa4type\xa3\xffoh"], ids=["no msgpack", "no UTF-8"])
def test_what_is_no_event_is_followed_by_a_new_beginning(
    payload: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(made: Rig) -> None:
        await made.begins(FIRST)
        assert made.publisher is not None
        await made.publisher.subscribed()
        with caplog.at_level("INFO"):
            made.publisher.send(1, payload)
            await until(lambda: "another form than vLLM's" in caplog.text)
        await made.heals()

    run(work, tmp_path)


def test_nobody_is_asked_who_is_not_wanted(tmp_path: Path) -> None:
    async def work(made: Rig) -> None:
        await made.begins(FIRST)
        made.wanted = False
        await until(lambda: not made.engine.prefixes.blocks)
        made.wanted = True
        await made.heals()

    run(work, tmp_path)


def test_without_zeromq_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pdctl.proxy.engines.prefixes.sockets", None)
    engine = Rig(tmp_path).engine
    assert asyncio.run(subscribe(engine, lambda: True)) == "reading its KV events needs pyzmq"
    engine.client.close()
