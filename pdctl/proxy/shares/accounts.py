"""The limits of API keys, as requests meet them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from pdctl.net.openai.api import ApiError
from pdctl.proxy.shares.elsewhere import Elsewhere
from pdctl.proxy.shares.limits import Exceeded, KeyLimits
from pdctl.proxy.shares.rules import KeyRules
from pdctl.proxy.shares.shared_totals import SharedTotals
from pdctl.proxy_wire import KeySpent, SpentNews

_WORDS = {
    "requests_per_minute": "has sent its {limit} requests per minute",
    "tokens_per_minute": "has used its {limit} tokens per minute",
    "streams": "has its {limit} answers at once",
}


class LimitReached(ApiError):
    """429 for a limit of an API key. `limit`: its name in the settings."""

    def __init__(self, key: str, limit: str, value: int, retry_after: int) -> None:
        message = f"the API key {key!r} {_WORDS[limit].format(limit=value)}; try again in {retry_after} s"
        super().__init__(429, message, "rate_limit_exceeded", retry_after=retry_after)
        self.limit = limit


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request took of the limits of its key: tokens, and answers at once."""

    key: str
    tokens: float
    streams: int


class Accounts:
    """Counts requests against the limits of their keys. Only keys with limits have an entry."""

    def __init__(self, rules: KeyRules, shared: SharedTotals | None = None) -> None:
        self._rules = rules
        self._shared = shared
        self._limits: dict[str, KeyLimits] = {}
        self._elsewhere = Elsewhere()

    def follow(self, rules: KeyRules) -> None:
        """Apply other settings. What was used stays used."""
        self._rules = rules
        for key, limits in self._limits.items():
            limits.follow(rules.of(key))

    def claim(self, key: str, prompt: float, output: float, streams: int) -> Claim | None:
        """Take what a request may use; None if its key has no limits. The caller then calls `settle`.

        `prompt`: predicted tokens; `output`: most tokens of one answer. Raises ApiError 429, or 400 if it never fits.
        """
        limits = self._of(key)
        if limits is None:
            return None
        most = limits.settings.streams
        if most and streams > most:
            raise ApiError(400, f"the API key {key!r} may have {most} answers at once; this request wants {streams}")
        now, tokens = time.monotonic(), prompt + output * streams
        if self._shared is not None:
            limits.others_took(self._shared.others(key), now)
        if (exceeded := limits.take(tokens, streams, now)) is not None:
            raise _refusal(key, limits, exceeded)
        self._publish(key, limits, now)
        return Claim(key, tokens, streams)

    def settle(self, claim: Claim, tokens: float) -> None:
        """A request has ended and used so many tokens."""
        limits, now = self._limits[claim.key], time.monotonic()
        limits.settle(claim.tokens, tokens, claim.streams, now)
        self._publish(claim.key, limits, now)

    def spent(self) -> dict[str, KeySpent]:
        """What this worker has taken of each key's limits, and where they are."""
        now = time.monotonic()
        return {key: _spent(limits, now) for key, limits in self._limits.items()}

    def spent_elsewhere(self, news: SpentNews) -> None:
        """Count what the proxies of other nodes have taken."""
        now = time.monotonic()
        found = self._elsewhere.take(news, now)
        for key, levels in found.levels:
            if (limits := self._of(key)) is not None:
                limits.raise_to(levels, now)
        for key, taken in found.taken.items():
            if (limits := self._of(key)) is not None:
                limits.charge(taken.requests, taken.tokens, now)
        for key, limits in self._limits.items():
            limits.elsewhere = found.streams.get(key, 0.0)

    def headers(self, key: str) -> list[tuple[bytes, bytes]]:
        """Headers about the limits of a key."""
        limits = self._of(key)
        return [] if limits is None else limits.headers(time.monotonic())

    def remaining(self, key: str) -> tuple[float, float] | None:
        """Requests and tokens that a key may send now; None if it has no limits."""
        limits = self._of(key)
        return None if limits is None else limits.remaining(time.monotonic())

    def _of(self, key: str) -> KeyLimits | None:
        found = self._limits.get(key)
        if found is None:
            settings = self._rules.of(key)
            if settings.requests_per_minute or settings.tokens_per_minute or settings.streams:
                found = self._limits[key] = KeyLimits(settings)
                now = time.monotonic()
                for levels in self._shared.meet(key, now) if self._shared is not None else ():
                    found.raise_to(levels, now)
        return found

    def _publish(self, key: str, limits: KeyLimits, now: float) -> None:
        if self._shared is not None:
            self._shared.publish(key, limits.own, limits.levels(now), now)


def _spent(limits: KeyLimits, now: float) -> KeySpent:
    levels = limits.levels(now)
    return KeySpent(*limits.own, levels.requests, levels.tokens)


def _refusal(key: str, limits: KeyLimits, exceeded: Exceeded) -> LimitReached:
    value: int = getattr(limits.settings, exceeded.limit)
    return LimitReached(key, exceeded.limit, value, max(1, math.ceil(exceeded.retry_after_s)))
