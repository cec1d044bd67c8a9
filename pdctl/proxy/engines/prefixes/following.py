"""Follows what an engine says it has: again after a failure, with pauses, and only while that is wanted."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Never

from pdctl.proxy.engines.engine import Engine

_log = logging.getLogger(__name__)

# An engine that is not to be followed is looked at so often, seconds.
_LOOK_S = 0.5
# Pauses after a failure, seconds: doubled from the first to the longest, with jitter.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0

# Hears from an engine while that is wanted, and keeps `engine.prefixes` up to date; why that failed, or "".
Hear = Callable[[Engine, Callable[[], bool]], Awaitable[str]]


async def follow_forever(engine: Engine, hear: Hear, is_wanted: Callable[[], bool]) -> Never:
    """Keep `engine.prefixes` up to date while it is wanted and the engine is there."""
    failures = 0
    while True:
        if not (is_wanted() and engine.healthy):
            engine.prefixes.lost()
            await asyncio.sleep(_LOOK_S)
            continue
        reason = await hear(engine, is_wanted)
        if not reason:
            failures = 0
            continue
        engine.prefixes.lost()
        if not failures:
            _log.info("what %s has KV of is not known: %s", engine.name, reason)
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures, 10))
        await asyncio.sleep(pause_s * (0.5 + 0.5 * random.random()))  # noqa: S311 - jitter, no secret
        failures += 1
