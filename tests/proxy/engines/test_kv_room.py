"""Room for KV at an engine that does not protect it: never more than it has, in order, and nothing forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.proxy.engines.kv_room import _TEMPLATE_TOKENS, KvRoom, NoRoom, Share

LONG_S = 60.0


def of(tokens: int) -> float:
    """The size of a prompt that takes this many tokens."""
    return float(tokens - _TEMPLATE_TOKENS)


def with_room(tokens: int, act: Callable[[KvRoom], Awaitable[None]]) -> None:
    async def run() -> None:
        room = KvRoom()
        room.renewed(tokens)
        assert room.leaked == tokens, "what an earlier proxy has left is unknown"
        room.swept()
        await act(room)
        room.audit()

    asyncio.run(run())


def test_prompts_wait_until_there_is_room_in_their_order() -> None:
    async def act(room: KvRoom) -> None:
        first = await room.take(of(800), LONG_S)
        big = asyncio.ensure_future(room.take(of(900), LONG_S))
        await asyncio.sleep(0)
        small = asyncio.ensure_future(room.take(of(600), LONG_S))
        await asyncio.sleep(0)
        assert not small.done(), "it would fit after the first, but it came later"
        room.give_back(first)
        await big
        await asyncio.sleep(0)
        assert not small.done()
        room.give_back(await big)
        assert (await small).tokens == 600

    with_room(1000, act)


def test_a_prompt_takes_what_it_really_has_once_that_is_known() -> None:
    async def act(room: KvRoom) -> None:
        share = await room.take(of(900), LONG_S)
        room.settle(share, 100)
        assert room.used == 100
        room.settle(share, 0)
        assert room.used == 100, "the engine did not say"
        other = await room.take(of(900), LONG_S)
        room.give_back(share)
        room.give_back(share)
        room.give_back(other)
        assert room.used == 0

    with_room(1000, act)


def test_a_prompt_larger_than_the_engine_goes_alone() -> None:
    async def act(room: KvRoom) -> None:
        small = await room.take(of(600), LONG_S)
        large = asyncio.ensure_future(room.take(1e6, LONG_S))
        await asyncio.sleep(0)
        assert not large.done()
        room.give_back(small)
        assert (await large).tokens == 1000

    with_room(1000, act)


def test_no_room_in_time_is_an_error_and_leaves_the_queue() -> None:
    async def act(room: KvRoom) -> None:
        share = await room.take(of(1000), LONG_S)
        with pytest.raises(NoRoom, match="no room"):
            await room.take(of(600), 0.01)
        room.give_back(share)
        assert (await room.take(of(1000), LONG_S)).tokens == 1000

    with_room(1000, act)


def test_leaked_kv_keeps_its_room_until_a_sweep() -> None:
    async def act(room: KvRoom) -> None:
        share = await room.take(of(700), LONG_S)
        room.leak(share)
        room.give_back(share)
        assert (room.used, room.leaked) == (700, 700)
        waiting = asyncio.ensure_future(room.take(of(600), LONG_S))
        await asyncio.sleep(0)
        assert not waiting.done()
        room.swept()
        assert (await waiting).tokens == 600
        assert (room.used, room.leaked) == (600, 0)

    with_room(1000, act)


def test_what_an_engine_had_before_it_was_silent_counts_until_a_sweep() -> None:
    async def act(room: KvRoom) -> None:
        await room.take(of(700), LONG_S)
        room.renewed(2000)
        assert (room.used, room.leaked, room.tokens) == (700, 700, 2000)
        room.renewed(600)
        assert (room.used, room.leaked) == (600, 600)
        room.swept()
        assert room.used == 0

    with_room(1000, act)


def test_a_share_of_an_earlier_life_frees_nothing() -> None:
    async def act(room: KvRoom) -> None:
        old = await room.take(of(700), LONG_S)
        room.renewed(1000)
        room.swept()
        assert not room.is_current(old)
        new = await room.take(of(700), LONG_S)
        room.settle(old, 1)
        room.give_back(old)
        assert room.used == 700
        room.give_back(new)

    with_room(1000, act)


def test_room_granted_to_a_request_that_leaves_in_that_moment_is_not_lost() -> None:
    async def act(room: KvRoom) -> None:
        share = await room.take(of(1000), LONG_S)
        waiting = asyncio.ensure_future(room.take(of(600), LONG_S))
        await asyncio.sleep(0)
        room.give_back(share)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert room.used == 0

    with_room(1000, act)


STEPS = st.lists(st.tuples(st.sampled_from(["take", "back", "leak", "swept", "renewed", "settle", "cancel"]),
                           st.integers(0, 2000)), max_size=40)  # fmt: skip


class Played:
    """Requests at one room. `waiting`: for their share; `held`: that have one."""

    def __init__(self, room: KvRoom) -> None:
        self.room = room
        self.waiting: list[asyncio.Task[Share]] = []
        self.held: list[Share] = []

    def step(self, step: str, number: int) -> None:
        room = self.room
        if step == "take":
            self.waiting.append(asyncio.ensure_future(room.take(float(number), LONG_S)))
        elif step == "cancel" and self.waiting:
            self.waiting.pop(number % len(self.waiting)).cancel()
        elif step == "swept":
            room.swept()
        elif step == "renewed":
            room.renewed(500 + number)
        elif self.held:
            share = self.held[number % len(self.held)]
            {"back": room.give_back, "leak": room.leak}.get(step, lambda one: room.settle(one, number))(share)

    async def settled(self) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.held += [task.result() for task in self.waiting if task.done()]
        self.waiting = [task for task in self.waiting if not task.done()]
        self.room.audit()


@given(STEPS)
def test_used_never_exceeds_the_limit_and_returns_to_nothing(steps: list[tuple[str, int]]) -> None:
    async def act(room: KvRoom) -> None:
        played = Played(room)
        for step, number in steps:
            played.step(step, number)
            await played.settled()
        while played.waiting or played.held:
            for share in played.held:
                room.give_back(share)
            played.held.clear()
            room.swept()
            await played.settled()
        assert room.used == 0

    with_room(1500, act)
