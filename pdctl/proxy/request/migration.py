"""Moves streams off engines that are drained, stopped or get another role, instead of waiting for their end.

The proxy chooses the engine that takes a stream over, and asks the one that runs it. That one lets the target copy the
KV while it goes on, then ends the stream with a hand-over, and the relay continues it at the target, as after a
prefill. A stream that cannot move stays where it is; when its engine ends, failover computes it again elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.engines.releases import Releases

_LOOK_S = 0.05
# A stream that has not ended by then is asked again: its engine may have been unable to move it.
_AGAIN_S = 2.0
# Streams of an engine that move at once: the others go on meanwhile.
_AT_ONCE = 8


class Migration:
    """Asks for the moves."""

    def __init__(self, pool: EnginePool, releases: Releases) -> None:
        self._pool = pool
        self._releases = releases

    async def run_forever(self) -> None:
        """Look for streams to move."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for engine in self._pool.engines:
                if engine.moving and engine.tickets:
                    self.move_from(engine, time.monotonic())

    def move_from(self, source: Engine, now: float) -> None:
        """Have the next streams of an engine moved, as far as others have room."""
        asked = [ticket for ticket in source.tickets if now - ticket.move_at < _AGAIN_S]
        coming: dict[str, int] = {}
        for ticket in asked:
            coming[ticket.target] = coming.get(ticket.target, 0) + 1
        for ticket in tuple(source.tickets):
            if len(asked) >= _AT_ONCE:
                return
            if not ticket.streaming or not ticket.attempt or ticket in asked:
                continue
            target = target_of(source, self._pool.engines, now, coming)
            call = source.dialect.move_call(ticket.attempt, target.address) if target is not None else None
            if target is None or call is None:
                return
            ticket.target, ticket.move_at = target.name, now
            coming[target.name] = coming.get(target.name, 0) + 1
            asked.append(ticket)
            self._releases.put(source, call)


def can_take(source: Engine, target: Engine, now: float, coming: int = 0) -> bool:
    """Whether a stream of `source` can go on at `target`, where `coming` others will arrive."""
    seats, room = target.condition.seats, target.condition.kv_tokens_free
    return (
        target is not source
        and target.usable(now)
        and target.address.exchange == source.address.exchange
        and target.address.role in target.dialect.pairing.alone
        and source.name not in target.lost_peers(now)
        and (seats is None or target.streams.pending + coming < seats)
        and (room is None or room > 0)
    )


def target_of(
    source: Engine, engines: Iterable[Engine], now: float, coming: dict[str, int] | None = None
) -> Engine | None:
    """The engine that should take a stream over: one that decodes, with the fewest streams; a prefill engine only where
    nothing else can."""
    expected = coming or {}
    able = [engine for engine in engines if can_take(source, engine, now, expected.get(engine.name, 0))]

    def load(engine: Engine) -> tuple[bool, float]:
        return engine.address.role == "prefill", engine.streams.pending + expected.get(engine.name, 0)

    return min(able, key=load, default=None)
