"""Follows the KV events of an engine: subscribes, asks for what it has missed, and begins anew after a restart."""

from __future__ import annotations

import time
from asyncio import sleep
from collections.abc import Callable
from contextlib import aclosing, closing
from typing import TYPE_CHECKING

from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.prefixes.batches import NotEvents, OtherForm, Verdict
from pdctl.proxy.engines.prefixes.known import WAIT_S, KnownPrefixes

if TYPE_CHECKING:
    from pdctl.proxy.engines.prefixes.sockets import EventSockets

# An answer may be late by so much, and whether the engine is still wanted is looked at so often, seconds.
_LATE_S, _LOOK_S = 5.0, 0.5


async def subscribe(engine: Engine, is_wanted: Callable[[], bool]) -> str:
    """Follow its events while it is wanted, there, and the same start; why that failed, or "". See follow_forever."""
    try:
        # Imported here: other services need neither ZeroMQ nor its threads.
        from pdctl.proxy.engines.prefixes.sockets import EventSockets
    except ImportError:
        return "reading its KV events needs pyzmq"
    life, at = engine.lives, engine.address.kv_events
    assert at is not None, "an engine without events is not wanted"

    def goes_on() -> bool:
        return is_wanted() and engine.healthy and engine.lives == life and engine.address.kv_events == at

    try:
        with closing(EventSockets(at)) as sockets:
            return await _follow(engine.prefixes, sockets, goes_on)
    except NotEvents as failure:
        return str(failure)


async def _follow(known: KnownPrefixes, sockets: EventSockets, goes_on: Callable[[], bool]) -> str:
    known.batches.begin()
    verdict, asked_at = Verdict.MISSED, 0.0
    while verdict is not Verdict.RESTARTED and goes_on():
        now = time.monotonic()
        if verdict is Verdict.MISSED or now - asked_at > WAIT_S:
            # Asked from time to time, too: of the last batches, no gap would tell that they were lost.
            verdict, asked_at = await _catch_up(known, sockets), now
        elif (found := await sockets.live(_LOOK_S)) is not None:
            verdict = known.heard_batch(*found, time.monotonic())
        # A batch that is there already is read without waiting, but requests must go on.
        await sleep(0)
    return "it was restarted" if verdict is Verdict.RESTARTED else ""


async def _catch_up(known: KnownPrefixes, sockets: EventSockets) -> Verdict:
    """Ask once for what is missing. MISSED: some of it has come, but not all. Raises NotEvents without any progress."""
    verdict, has_progress = Verdict.FOLLOWS, False
    try:
        async with aclosing(sockets.replay(known.batches.ask(), _LATE_S)) as replay:
            async for number, payload in replay:
                verdict = known.heard_replayed(number, payload)
                if verdict in {Verdict.MISSED, Verdict.RESTARTED}:
                    break
                has_progress = has_progress or verdict is Verdict.FOLLOWS
                await sleep(0)
    except OtherForm:
        raise
    except NotEvents:
        verdict = Verdict.MISSED
        if not has_progress:
            raise
    if verdict is Verdict.MISSED and not has_progress:
        raise NotEvents("its answers have gaps")
    return verdict if verdict in {Verdict.MISSED, Verdict.RESTARTED} else known.heard_end(time.monotonic())
