"""Prefill calls that go on when their request leaves, and what they have kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pdctl.adapters import Prefilled
from pdctl.proxy.request import unfinished
from pdctl.proxy.request.unfinished import Called, Unfinished

DONE = Prefilled([], {}, None, 1, b"kept")
LONG_S = 60.0


def run(act: Callable[[Unfinished], Awaitable[None]]) -> None:
    async def main() -> None:
        calls = Unfinished()
        running = asyncio.ensure_future(calls.run_forever())
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await act(calls)
            await calls.settled(LONG_S)
        assert calls.left == 0
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


async def ends(event: asyncio.Event, found: Called = DONE) -> Called:
    await event.wait()
    return found


def never_wanted(_: Prefilled) -> None:
    raise AssertionError("somebody waits for it")


def test_a_request_that_waits_gets_the_result() -> None:
    async def act(calls: Unfinished) -> None:
        event = asyncio.Event()
        event.set()
        assert await calls.call(ends(event), LONG_S, never_wanted) is DONE
        failed = ValueError("x")
        assert await calls.call(ends(event, failed), LONG_S, never_wanted) is failed

    run(act)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_call_without_a_request_goes_on_and_what_it_keeps_is_released(leaves: bool) -> None:
    async def act(calls: Unfinished) -> None:
        event = asyncio.Event()
        released: list[Prefilled] = []
        waiting = asyncio.ensure_future(calls.call(ends(event), LONG_S if leaves else 0.01, released.append))
        await asyncio.sleep(0)
        if leaves:
            waiting.cancel()
        with pytest.raises(asyncio.CancelledError if leaves else TimeoutError):
            await waiting
        assert (calls.left, released) == (1, [])
        event.set()
        await calls.settled(LONG_S)
        assert released == [DONE]

    run(act)


def test_a_failure_that_nobody_waits_for_ends_nothing_else() -> None:
    async def act(calls: Unfinished) -> None:
        event = asyncio.Event()
        waiting = asyncio.ensure_future(calls.call(ends(event, ValueError("x")), LONG_S, never_wanted))
        await asyncio.sleep(0)
        waiting.cancel()
        event.set()
        await calls.settled(LONG_S)
        assert await calls.call(ends(event), LONG_S, never_wanted) is DONE

    run(act)


def test_there_is_a_limit_of_calls_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "_MAX_LEFT", 2)

    async def act(calls: Unfinished) -> None:
        event = asyncio.Event()
        released: list[Prefilled] = []
        waiting = [asyncio.ensure_future(calls.call(ends(event), LONG_S, released.append)) for _ in range(3)]
        await asyncio.sleep(0)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert calls.left == 2
        event.set()
        await calls.settled(LONG_S)
        assert released == [DONE] * 2

    run(act)
