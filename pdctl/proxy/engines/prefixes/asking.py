"""Asks an engine which beginnings of prompts it has: one call after the other, answered when something has changed."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from pdctl.net.http_client import Unreachable
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.prefixes.known import WAIT_S
from pdctl.wire import PIECES_PATH, BlocksReply

# An answer may be late by so much, seconds.
_LATE_S = 5.0

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(BlocksReply).decode


async def ask(engine: Engine, is_wanted: Callable[[], bool]) -> str:
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
