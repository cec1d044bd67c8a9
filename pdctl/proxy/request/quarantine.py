"""Requests that engines die of, and are not to be sent to another.

Whoever was in an engine when it died may be the cause, and most are not. Two deaths without a token between make a
request a suspect. Suspects go on one at a time: a death with no other suspect around, twice, is proof enough. One that
was alone in both engines is caught at the second death already.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from pdctl.net.openai_api import ApiError
from pdctl.proxy.engines.pool import Engine

_DEATHS = 2
# How long the same body is refused, seconds, and how many are remembered.
_REMEMBERED_S = 600.0
_MAX_REMEMBERED = 1024
# Probes have found out within this time whether an engine is dead, seconds.
_CERTAIN_S = 0.5
_LOOK_S = 0.02
# A suspect waits this long for its turn at most, seconds; then it goes on as it is. On a fleet that loses engine after
# engine most suspects are bystanders, and none of them shall fail for that.
_TURN_S = 20.0


class Quarantine:
    """What all requests of a proxy share: the turn of suspects, and the bodies that are refused."""

    def __init__(self) -> None:
        self.count = 0
        self.one_at_a_time = asyncio.Lock()
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def put(self, body: bytes) -> ApiError:
        """Remember a body; the answer to its client."""
        self.count += 1
        self._until[_digest(body)] = time.monotonic() + _REMEMBERED_S
        while len(self._until) > _MAX_REMEMBERED:
            self._until.popitem(last=False)
        return _refusal()

    def check(self, body: bytes) -> None:
        """Raises ApiError for a body that is in quarantine."""
        if self._until and self._until.get(_digest(body), 0.0) > time.monotonic():
            raise _refusal()


@dataclass(slots=True)
class Suspicion:
    """One request's. `present`: engines that failed with it inside since its last token: life, and whether it was the
    only suspect there."""

    quarantine: Quarantine
    present: list[tuple[Engine, int, bool]] = field(default_factory=list)
    failed_at: float = 0.0
    holds_turn: bool = False

    def failed(self, engine: Engine) -> None:
        """An engine failed with the request in it."""
        self.failed_at = time.monotonic()
        alone = self.holds_turn or engine.others_at_failure() == 0
        self.present.append((engine, engine.lives, alone))

    def cleared(self) -> None:
        """It got a token, or has ended: whatever happened was not its doing."""
        self.present.clear()
        if self.holds_turn:
            self.holds_turn = False
            self.quarantine.one_at_a_time.release()

    async def judge(self, body: bytes) -> None:
        """Return when the request may be tried again. Raises ApiError when it may not."""
        if len(self.present) < _DEATHS:
            return
        deadline = time.monotonic() + _CERTAIN_S
        while True:
            dead = [alone for engine, life, alone in self.present if engine.has_died_since(life)]
            if sum(dead) >= _DEATHS:
                raise self.quarantine.put(body)
            # What looks like a death may be no more than a lost connection.
            if len(dead) == len(self.present) or time.monotonic() > deadline:
                break
            await asyncio.sleep(_LOOK_S)
        if len(dead) >= _DEATHS and not self.holds_turn:
            await self._take_turn()

    async def _take_turn(self) -> None:
        try:
            async with asyncio.timeout(_TURN_S):
                await self.quarantine.one_at_a_time.acquire()
        except TimeoutError:
            return
        self.holds_turn = True


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()


def _refusal() -> ApiError:
    message = (
        f"{_DEATHS} engines died with this request in them and no other suspect: it is in quarantine, and the same "
        f"request is refused for {_REMEMBERED_S / 60:.0f} minutes"
    )
    # Not a 5xx: clients repeat those by themselves.
    return ApiError(422, message, "request_quarantined")
