"""Limits of API keys: requests and tokens per minute, and answers at once. Pure: the caller passes the times.

A bucket of a minute's worth, as OpenAI's limits: all of it may come at once, and it refills evenly. A request is
charged its prompt and its `max_tokens`, and gets back what it did not use.

Several proxy workers count together: each adds what it took to totals that the others read (`shared_totals.py`). So do
the proxies of several nodes, through their agents (`elsewhere.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from pdctl.proxy_wire import KeySettings

_MINUTE_S = 60.0
# Tolerance for the sums of many small refills, in requests or tokens.
_TOLERANCE = 1e-6


@dataclass(slots=True)
class Bucket:
    """`limit` per minute. `used`: what has not been refilled at the moment `at`."""

    limit: float
    used: float = 0.0
    at: float = -math.inf

    def remaining(self, now: float) -> float:
        """What may be taken now."""
        return max(0.0, self.limit - self.level(now))

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0 if it may now. More than the limit may be taken if nothing is used."""
        missing = self.level(now) + min(amount, self.limit) - self.limit
        return missing * _MINUTE_S / self.limit if missing > _TOLERANCE else 0.0

    def take(self, amount: float, now: float) -> None:
        """Take some, or give it back if `amount` is negative."""
        self.used, self.at = max(0.0, self.level(now) + amount), max(self.at, now)

    def full_s(self, now: float) -> float:
        """Seconds until nothing is used any more."""
        return self.level(now) * _MINUTE_S / self.limit

    def raise_to(self, level: float, age_s: float, now: float) -> None:
        """Somebody who counts the same things had `level` some seconds ago: have no less."""
        refilled = age_s * self.limit / _MINUTE_S
        self.used, self.at = max(self.level(now), level - refilled), max(self.at, now)

    def level(self, now: float) -> float:
        """What is used and not refilled yet."""
        if not self.used:
            return 0.0
        return max(0.0, self.used - max(0.0, now - self.at) * self.limit / _MINUTE_S)


class Totals(NamedTuple):
    """What was taken from a key's limits: requests and tokens; and its answers now."""

    requests: float = 0.0
    tokens: float = 0.0
    streams: float = 0.0


NOTHING = Totals()


class Levels(NamedTuple):
    """What of a key's limits is used and not refilled yet: requests and tokens, as it was `age_s` ago."""

    requests: float = 0.0
    tokens: float = 0.0
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A limit is reached. `limit`: its name in the settings; `retry_after_s`: seconds."""

    limit: str
    retry_after_s: float


@dataclass(slots=True)
class KeyLimits:
    """The limits of one key. `own`: what this worker took since its start; `elsewhere`: answers now at other nodes."""

    settings: KeySettings
    own: Totals = NOTHING
    elsewhere: float = 0.0
    _others_streams: float = 0.0
    _requests: Bucket = field(init=False)
    _tokens: Bucket = field(init=False)

    def __post_init__(self) -> None:
        self._requests = Bucket(float(self.settings.requests_per_minute))
        self._tokens = Bucket(float(self.settings.tokens_per_minute))

    def follow(self, settings: KeySettings) -> None:
        """Apply other limits. What was used stays used."""
        self.settings = settings
        self._requests.limit = float(settings.requests_per_minute)
        self._tokens.limit = float(settings.tokens_per_minute)

    def others_took(self, others: Totals, now: float) -> None:
        """Count what other workers have taken since the last call, and their answers now."""
        self._others_streams = others.streams
        self.charge(others.requests, others.tokens, now)

    def charge(self, requests: float, tokens: float, now: float) -> None:
        """Count what somebody else has taken, or has given back."""
        if requests and self._requests.limit:
            self._requests.take(requests, now)
        if tokens and self._tokens.limit:
            self._tokens.take(tokens, now)

    def levels(self, now: float) -> Levels:
        """What is used and not refilled yet."""
        return Levels(*(bucket.level(now) if bucket.limit else 0.0 for bucket in (self._requests, self._tokens)))

    def raise_to(self, levels: Levels, now: float) -> None:
        """Begin where others are who have counted for longer."""
        for bucket, level in ((self._requests, levels.requests), (self._tokens, levels.tokens)):
            if bucket.limit:
                bucket.raise_to(level, levels.age_s, now)

    def take(self, tokens: float, streams: int, now: float) -> Exceeded | None:
        """Take a request with so many tokens and answers, if all limits allow it."""
        limits = self.settings
        if limits.streams and self.own.streams + self._others_streams + self.elsewhere + streams > limits.streams:
            return Exceeded("streams", 1.0)
        if limits.requests_per_minute and (wait_s := self._requests.wait_s(1.0, now)):
            return Exceeded("requests_per_minute", wait_s)
        if limits.tokens_per_minute and (wait_s := self._tokens.wait_s(tokens, now)):
            return Exceeded("tokens_per_minute", wait_s)
        if limits.requests_per_minute:
            self._requests.take(1.0, now)
        if limits.tokens_per_minute:
            self._tokens.take(tokens, now)
        own = self.own
        self.own = Totals(own.requests + 1, own.tokens + tokens, own.streams + streams)
        return None

    def settle(self, taken: float, tokens: float, streams: int, now: float) -> None:
        """A request that took `taken` tokens has ended and used `tokens`."""
        if self.settings.tokens_per_minute:
            self._tokens.take(tokens - taken, now)
        own = self.own
        self.own = Totals(own.requests, own.tokens + tokens - taken, own.streams - streams)

    def remaining(self, now: float) -> tuple[float, float]:
        """Requests and tokens that may be sent now."""
        return self._requests.remaining(now), self._tokens.remaining(now)

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """OpenAI's headers, of the limits that the key has."""
        found: list[tuple[bytes, bytes]] = []
        for name, bucket in ((b"requests", self._requests), (b"tokens", self._tokens)):
            if bucket.limit:
                found += (
                    (b"x-ratelimit-limit-" + name, b"%d" % bucket.limit),
                    (b"x-ratelimit-remaining-" + name, b"%d" % (bucket.remaining(now) + _TOLERANCE)),
                    (b"x-ratelimit-reset-" + name, duration(bucket.full_s(now)).encode()),
                )
        return found

    def audit(self) -> None:
        """Check that no book is negative."""
        assert min(self._requests.used, self._tokens.used, self.own.requests, self.own.streams) >= 0
        assert self.own.tokens >= -_TOLERANCE * max(1.0, self.own.requests)


def duration(seconds: float) -> str:
    """A duration in OpenAI's format: 850ms, 1.5s, 6m0s, 1h0m2s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < _MINUTE_S:
        return f"{math.ceil(seconds * 10) / 10:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
