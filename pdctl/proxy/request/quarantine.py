"""Finds requests that kill engines, and refuses to send them to another engine.

Each request in an engine that died may be the cause, but most are not. Two deaths without a token between them make a
request a suspect. Suspects run one at a time: two deaths with no other suspect present are proof. A request that was
alone in both engines is already found at the second death.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from pdctl.net.openai.api import ApiError
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.shares.shared_bodies import DIGEST_BYTES, SharedBodies

_DEATHS = 2
# How long the same body is refused, in seconds, and the maximum number of bodies.
_REMEMBERED_S = 600.0
_MAX_REMEMBERED = 1024
_NONE: dict[bytes, float] = {}
# Within this time, probes show whether an engine is dead, seconds.
_CERTAIN_S = 0.5
_LOOK_S = 0.02
# Maximum wait of a suspect for its turn, seconds; then it continues without one. If a fleet loses many engines, most
# suspects are not the cause, and they must not fail.
_TURN_S = 20.0


class Quarantine:
    """Shared by all requests of a proxy: the lock that runs suspects one at a time, and the refused bodies.

    `secret`: of the service, so that whoever sees digests in the registry cannot try which prompts have them; `shared`:
    the bodies of all workers of this proxy.
    """

    def __init__(self, secret: str = "", shared: SharedBodies | None = None) -> None:
        self.count = 0
        self.one_at_a_time = asyncio.Lock()
        self._secret = secret.encode()[: hashlib.blake2b.MAX_KEY_SIZE]
        self._shared = shared
        self._until: OrderedDict[bytes, float] = OrderedDict()
        self._elsewhere: dict[bytes, float] = {}

    def put(self, body: bytes) -> ApiError:
        """Put a body in quarantine. Returns the error for its client."""
        self.count += 1
        name = self._digest(body)
        self._until[name] = until = time.monotonic() + _REMEMBERED_S
        if self._shared is not None:
            self._shared.put(name, until)
        # A body that is added again becomes the newest, so it is removed last.
        self._until.move_to_end(name)
        while len(self._until) > _MAX_REMEMBERED:
            self._until.popitem(last=False)
        return _refusal()

    def check(self, body: bytes) -> None:
        """Raises ApiError if the body is in quarantine."""
        by_workers = self._shared.bodies() if self._shared is not None else _NONE
        if not (self._until or self._elsewhere or by_workers):
            return
        name, now = self._digest(body), time.monotonic()
        if any(known.get(name, 0.0) > now for known in (self._until, self._elsewhere, by_workers)):
            raise _refusal()

    def found(self) -> dict[str, float]:
        """The bodies that this proxy found, and the seconds for which they are still refused."""
        now = time.monotonic()
        by_workers = self._shared.bodies() if self._shared is not None else _NONE
        return {name.hex(): until - now for name, until in {**by_workers, **self._until}.items() if until > now}

    def told(self, bodies: dict[str, float]) -> None:
        """The bodies that other proxies found are these. Raises ValueError for something else than digests."""
        now = time.monotonic()
        newest = sorted(bodies.items(), key=lambda body: -body[1])[:_MAX_REMEMBERED]
        self._elsewhere = {bytes.fromhex(name): now + min(left_s, _REMEMBERED_S) for name, left_s in newest}

    def _digest(self, body: bytes) -> bytes:
        return hashlib.blake2b(body, digest_size=DIGEST_BYTES, key=self._secret).digest()


@dataclass(slots=True)
class Suspicion:
    """The suspicion against one request. `present`: the engines that failed with it since its last token, each with
    its life number and whether the request was the only suspect there."""

    quarantine: Quarantine
    present: list[tuple[Engine, int, bool]] = field(default_factory=list)
    failed_at: float = 0.0
    holds_turn: bool = False

    def failed(self, engine: Engine) -> None:
        """An engine failed while it had the request."""
        self.failed_at = time.monotonic()
        alone = self.holds_turn or engine.others_at_failure() == 0
        self.present.append((engine, engine.lives, alone))

    def cleared(self) -> None:
        """The request got a token or has ended: it was not the cause."""
        self.present.clear()
        if self.holds_turn:
            self.holds_turn = False
            self.quarantine.one_at_a_time.release()

    async def judge(self, body: bytes) -> None:
        """Return when the request may be tried again. Raises ApiError if it must not be."""
        if len(self.present) < _DEATHS:
            return
        deadline = time.monotonic() + _CERTAIN_S
        while True:
            dead = [alone for engine, life, alone in self.present if engine.has_died_since(life)]
            if sum(dead) >= _DEATHS:
                raise self.quarantine.put(body)
            # An apparent death may only be a lost connection.
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


def _refusal() -> ApiError:
    message = (
        f"{_DEATHS} engines died while they had this request and no other suspect: it is in quarantine, and the same "
        f"request is refused for {_REMEMBERED_S / 60:.0f} minutes"
    )
    # Not a 5xx: clients retry those automatically.
    return ApiError(422, message, "request_quarantined")
