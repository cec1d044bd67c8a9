"""Asks an engine which beginnings of prompts it has: one call after the other, answered when something has changed."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Never

import msgspec

from pdctl.net.http_client import Unreachable
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.prefixes.known import WAIT_S
from pdctl.wire import PIECES_PATH, BlocksReply

_log = logging.getLogger(__name__)

# An answer may be late by so much, and an engine that is not to be asked is looked at so often, seconds.
_LATE_S, _LOOK_S = 5.0, 0.5
# Pauses after a failure, seconds: doubled from the first to the longest, with jitter.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(BlocksReply).decode


async def follow_forever(engine: Engine, is_wanted: Callable[[], bool]) -> Never:
    """Keep `engine.prefixes` up to date while it is wanted and the engine is there."""
    failures = 0
    while True:
        if not (is_wanted() and engine.healthy):
            engine.prefixes.lost()
            await asyncio.sleep(_LOOK_S)
            continue
        reason = await _ask(engine)
        if not reason:
            failures = 0
            continue
        engine.prefixes.lost()
        if not failures:
            _log.info("what %s has KV of is not known: %s", engine.name, reason)
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures, 10))
        await asyncio.sleep(pause_s * (0.5 + 0.5 * random.random()))  # noqa: S311 - jitter, no secret
        failures += 1


async def _ask(engine: Engine) -> str:
    """One call; why it failed, or "". An engine that was restarted meanwhile is asked from the beginning."""
    life, call = engine.lives, engine.prefixes.call()
    try:
        answer = await engine.client.request(
            "POST", PIECES_PATH, engine.headers, _encode(call), timeout_s=WAIT_S + _LATE_S
        )
        if answer.status != 200:
            return f"status {answer.status}"
        reply = _decode(answer.body)
    except Unreachable as failure:
        return str(failure)
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        return f"its answer is not one: {failure}"
    if engine.lives == life and not engine.prefixes.heard(reply, time.monotonic()):
        return "its answer does not follow the one before"
    return ""
