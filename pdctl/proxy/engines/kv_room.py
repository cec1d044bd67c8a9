"""How many tokens of KV the requests of this proxy worker may have at one prefill engine at the same time.

Some engines keep a prompt's KV for a decode engine, but overwrite it when a new prompt needs room. Decode then reads
another request's KV. So the proxy takes room for each prompt before it sends it, and gives it back when the KV is
freed. The number of tokens is unknown then. A prompt has no more tokens than bytes, so it takes that many, and after
the answer as many as it really has.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

# Tokens that a chat's template may add to a prompt.
_TEMPLATE_TOKENS = 512
# Longest queue of an engine; more requests are sent elsewhere.
_MAX_WAITING = 1024


class NoRoom(Exception):
    """There was no room in time."""


@dataclass(slots=True, eq=False)
class Share:
    """Tokens that one prompt has. `life`: of the engine; a share of an earlier one has ended with it."""

    tokens: int
    life: int


@dataclass(slots=True)
class KvRoom:
    """`tokens`: the limit; 0 before it is known. `used` includes `leaked`: KV that only a sweep frees.

    `sent`: calls so far, each of which may have left KV.
    """

    tokens: int = 0
    used: int = 0
    leaked: int = 0
    sent: int = 0
    _life: int = 0
    _waiting: deque[tuple[int, asyncio.Future[Share]]] = field(default_factory=deque)

    async def take(self, size: float, patience_s: float) -> Share:
        """Wait for room for a prompt of `size` bytes. Raises NoRoom."""
        wanted = int(size) + _TEMPLATE_TOKENS
        return await self._wait(wanted, patience_s) if self._waiting or not self._fits(wanted) else self._grant(wanted)

    def is_current(self, share: Share) -> bool:
        """Whether the engine has not been down since. After a restart, the names of what it held mean other things."""
        return share.life == self._life

    def settle(self, share: Share, tokens: int) -> None:
        """The prompt has this many tokens."""
        if 0 < tokens < share.tokens and self.is_current(share):
            self.used -= share.tokens - tokens
            share.tokens = tokens
            self._wake()

    def give_back(self, share: Share) -> None:
        """Its KV is free. A second time has no effect."""
        if self.is_current(share):
            self.used -= share.tokens
            share.tokens = 0
            self._wake()

    def leak(self, share: Share) -> None:
        """Its KV stays until a sweep: the engine did not say how to free it."""
        if self.is_current(share):
            self.leaked += share.tokens
            # A later give_back must not count it again.
            share.tokens = 0

    def swept(self) -> None:
        """All leaked KV is free."""
        self.used -= self.leaked
        self.leaked = 0
        self._wake()

    def renewed(self, tokens: int) -> None:
        """The engine is back after it was down, or seen for the first time. If it was only silent, it still has all KV,
        which nobody can name; and what earlier proxies have left there is unknown."""
        self.used = self.leaked = min(self.used, tokens) if self._life else tokens
        self.tokens = tokens
        self._life += 1
        self._wake()

    def audit(self) -> None:
        """Raises AssertionError if the counts are inconsistent."""
        assert 0 <= self.leaked <= self.used
        assert self.used <= self.tokens

    def _fits(self, wanted: int) -> bool:
        # A prompt that is too large for the engine is sent when it is alone there: the engine decides.
        return self.used + min(wanted, self.tokens) <= self.tokens

    def _grant(self, wanted: int) -> Share:
        share = Share(min(wanted, self.tokens), self._life)
        self.used += share.tokens
        return share

    async def _wait(self, wanted: int, patience_s: float) -> Share:
        if len(self._waiting) >= _MAX_WAITING:
            raise NoRoom(f"{_MAX_WAITING} requests wait for room for their KV")
        granted: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, granted))
        taken = False
        try:
            async with asyncio.timeout(patience_s):
                share = await granted
            taken = True
            return share
        except TimeoutError:
            raise NoRoom(f"no room for the KV of a prompt of up to {wanted} tokens within {patience_s:g} s") from None
        finally:
            if not taken and granted.done() and not granted.cancelled():
                # It was granted in the moment when it gave up.
                self.give_back(granted.result())
            self._wake()

    def _wake(self) -> None:
        """Grant room in order, so that large prompts have their turn."""
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            wanted, granted = self._waiting.popleft()
            if not granted.done():
                granted.set_result(self._grant(wanted))
