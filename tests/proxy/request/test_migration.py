"""A stream that its engine hands over in the middle of the answer, over scripted engines on real sockets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from pdctl.adapters import Condition
from pdctl.proxy.engines.engine import Engine, Ticket
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.engines.releases import Releases
from pdctl.proxy.request.migration import Migration, can_take, target_of
from pdctl.proxy_wire import EngineAddress
from tests.proxy.request.scripted import LEASE, Act, Scripted, half, held, relay, stream


def handed_over(tokens: Iterable[int]) -> Act:
    """Events for `tokens`, then the hand-over of a stream that goes on elsewhere."""

    async def act(writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for token in tokens:
            choice = {"index": 0, "text": chr(token), "token_ids": [token], "finish_reason": None}
            data = b"data: %b\n\n" % msgspec.json.encode({"choices": [choice]})
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        data = b"data: %b\n\ndata: [DONE]\n\n" % msgspec.json.encode({"kv_transfer_params": LEASE})
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
        await writer.drain()
        return True

    return act


def three(prefill: list[Act], first: list[Act], second: list[Act]) -> tuple[Scripted, Scripted, Scripted]:
    return Scripted("p0", "prefill", prefill), Scripted("d0", "decode", first), Scripted("d1", "decode", second)


def test_a_stream_goes_on_at_another_engine_with_the_kv_of_the_first() -> None:
    # Round robin begins with d1.
    prefill, second, first = three([held(65)], [stream(range(69, 73))], [handed_over([66, 67, 68])])
    outcome = asyncio.run(relay(prefill, second, first))
    assert outcome.sink.text == "ABCDEFGH"
    (went_on,) = second.generations
    assert went_on["kv_transfer_params"] == LEASE
    assert went_on["resume_token_ids"] == [65, 66, 67, 68]
    assert outcome.leg.failures == 0
    assert not first.bodies_at("/pdctl/v1/leases/release")
    assert outcome.shared.metrics.counters.values["moved", (first.name,)] == 1


def test_where_it_cannot_go_on_it_is_computed_again_and_the_kv_released() -> None:
    prefill, second, first = three(
        [held(65), held(69)], [half, stream(range(70, 73))], [handed_over([66, 67, 68]), stream(range(70, 73))]
    )
    outcome = asyncio.run(relay(prefill, second, first))
    assert outcome.sink.text == "ABCDEFGH"
    assert prefill.generations[1]["resume_token_ids"] == [65, 66, 67, 68]
    assert first.bodies_at("/pdctl/v1/leases/release") == [{**LEASE, "holder": "proxy"}]
    assert outcome.leg.failures == 1


def test_a_client_that_leaves_meanwhile_leaves_no_kv() -> None:
    async def leave() -> Scripted:
        waits = asyncio.Event()

        async def never(_: asyncio.StreamWriter) -> bool:
            waits.set()
            return await asyncio.Event().wait()

        prefill, second, first = three([held(65)], [never], [handed_over([66])])
        await relay(prefill, second, first, leave_when=waits.wait())
        return first

    assert asyncio.run(leave()).bodies_at("/pdctl/v1/leases/release") == [{**LEASE, "holder": "proxy"}]


class Exchange:
    """A call that runs."""

    waiting_since = 0.0


def pool_of(*roles: str, seats: int = 8) -> EnginePool:
    addresses = [EngineAddress(f"{role}-{at}", role, "builtin", "127.0.0.1", 1 + at) for at, role in enumerate(roles)]
    pool = EnginePool.of(addresses)
    for engine in pool.engines:
        engine.healthy = True
        engine.condition = Condition(True, seats=seats, kv_tokens_free=1000)
    return pool


def ticket(number: int, streaming: bool = True) -> Ticket:
    return Ticket(Exchange(), 1.0, streaming, attempt=f"a{number}")  # type: ignore[arg-type]


class Asked(Releases):
    """The moves that were asked for, by the target's port."""

    def __init__(self) -> None:
        super().__init__()
        self.ports: list[int] = []

    def put(self, engine: Engine, call: object, share: object = None) -> None:
        self.ports.append(int(msgspec.json.decode(call.body)["port"]))  # type: ignore[attr-defined]


def test_streams_move_a_few_at_a_time_to_the_least_loaded_and_are_asked_again() -> None:
    async def run() -> None:
        pool, asked = pool_of("prefill", "decode", "decode", "decode"), Asked()
        source, others = pool.engines[1], pool.engines[2:]
        others[0].streams.pending = 2.0
        source.tickets.update(ticket(number) for number in range(12))
        source.tickets.add(ticket(99, streaming=False))
        migration = Migration(pool, asked)
        migration.move_from(source, 100.0)
        assert sorted(asked.ports) == [3] * 3 + [4] * 5, "as if the first two had been here"
        migration.move_from(source, 100.5)
        assert len(asked.ports) == 8
        migration.move_from(source, 103.0)
        assert len(asked.ports) == 16

    asyncio.run(run())


def test_only_an_engine_that_can_takes_a_stream() -> None:
    async def run() -> None:
        pool = pool_of("prefill", "decode", "decode")
        prefill, source, other = pool.engines
        assert target_of(source, pool.engines, 0.0) is other
        for change in (
            {"draining": True}, {"healthy": False}, {"unlinked": frozenset({source.name})},
            {"condition": Condition(True, seats=0)}, {"condition": Condition(True, kv_tokens_free=0)},
        ):  # fmt: skip
            before = {name: getattr(other, name) for name in change}
            for name, value in change.items():
                setattr(other, name, value)
            assert target_of(source, pool.engines, 0.0) is prefill, f"{change}: only where no other can"
            for name, value in before.items():
                setattr(other, name, value)
        assert not can_take(source, source, 0.0)

    asyncio.run(run())


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 2**16))
def test_no_engine_gets_more_streams_than_it_has_seats(pending: list[int], seats: int, seed: int) -> None:
    async def run() -> None:
        chance = random.Random(seed)
        pool, asked = pool_of("decode", *["decode"] * len(pending), seats=seats), Asked()
        for engine, count in zip(pool.engines[1:], pending, strict=True):
            engine.streams.pending = float(count)
        source = pool.engines[0]
        source.tickets.update(ticket(number) for number in range(chance.randint(1, 20)))
        Migration(pool, asked).move_from(source, 50.0)
        for at, count in enumerate(pending):
            assert asked.ports.count(2 + at) <= max(0, seats - count)

    asyncio.run(run())
